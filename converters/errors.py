"""Errors for the user, and how text from outside is made fit to show."""

from collections.abc import Sequence
from difflib import get_close_matches

LONGEST = 900
"""Characters of a message. Names from a file or a client may have any length."""


def printable(text: str) -> str:
    """``text`` with a question mark for every character that a terminal cannot show, such as control codes."""
    return "".join(char if char.isprintable() else "?" for char in text)


def one_line(text: str) -> str:
    """``text`` printable and in one line. Of a long one only the beginning and the end are left."""
    text = printable(" ".join(text.split()))
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 250]} … {text[-240:]}"


class UserError(Exception):
    """Something the user can correct. Its text is one line that says what is wrong and what to do.

    The command line prints it and ends with exit code 1; the engine sends it to the tab. ``code`` names the kind of
    error for programs: hints, translations and HTTP statuses hang on it, not on the English line.
    """

    def __init__(self, message: str, code: str = "invalid") -> None:
        super().__init__(one_line(message))
        self.code = code


def unknown_choice(what: str, given: str, choices: Sequence[str]) -> UserError:
    """The error for a name that is none of ``choices``, with the nearest that is one."""
    given, known = given[:80], ", ".join(choices)
    for near in get_close_matches(given.lower(), choices, 1, 0.65):
        return UserError(f"There is no {what} {given!r}. Did you mean {near}? There are: {known}.", "unknown_choice")
    return UserError(f"There is no {what} {given!r}. There are: {known}.", "unknown_choice")


class Cancelled(Exception):
    """The user asked to stop. Not an error: nothing is reported, and nothing is left behind."""
