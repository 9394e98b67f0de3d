"""The one error that is meant for the person at the keyboard."""


class UserError(Exception):
    """Something the user can mend: its text is one line that says what is wrong and what to do.

    The command line prints it and ends with exit code 1; the engine sends it to the tab.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))
