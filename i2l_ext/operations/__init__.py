"""What a user can ask for, without command line, page or HTTP."""
