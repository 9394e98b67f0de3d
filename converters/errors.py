"""What the person at the keyboard is told, and what he or she may say: stop."""

LONGEST = 900
"""Characters of a message. What a file or a client calls its things may be as long as it likes."""


def printable(text: str) -> str:
    """``text`` as any terminal and any page can show it: without control codes and half characters."""
    return "".join(char if char.isprintable() else "?" for char in text)


def one_line(text: str) -> str:
    """``text`` printable and in one line; where it is too long its beginning and its end."""
    text = printable(" ".join(text.split()))
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 250]} … {text[-240:]}"


class UserError(Exception):
    """Something the user can mend: its text is one line that says what is wrong and what to do.

    The command line prints it and ends with exit code 1; the engine sends it to the tab. ``code`` names the kind of
    error for programs: hints, translations and HTTP statuses hang on it, not on the English line.
    """

    def __init__(self, message: str, code: str = "invalid") -> None:
        super().__init__(one_line(message))
        self.code = code


class Cancelled(Exception):
    """The user said stop. Not an error: nothing is to be reported, nothing is left behind."""
