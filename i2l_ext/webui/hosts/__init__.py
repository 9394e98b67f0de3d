"""The programs that the tab runs in: the protocol ``Host``, and a file for each."""
