"""What the person at the keyboard is told, and what he or she may say: stop."""


class UserError(Exception):
    """Something the user can mend: its text is one line that says what is wrong and what to do.

    The command line prints it and ends with exit code 1; the engine sends it to the tab.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class Cancelled(Exception):
    """The user said stop. Not an error: nothing is to be reported, nothing is left behind."""
