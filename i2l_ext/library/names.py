"""The names that a LoRA may have, on every system and in every WebUI: letters of any script, digits, '.', '_' and '-'.

A name stands in prompts, where it must not pass for another. So a word of it has letters of one script: East Asian ones
count as one, with Latin, of which they have no look-alikes. Words are parted by '.', '_', '-' and digits.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path

from i2l_ext.converters.errors import UserError, printable

LONGEST = 100
"""Characters of a name: with folder and suffixes the path stays within the limit of Windows."""

LONGEST_BYTES = 200
"""Of a name in UTF-8: with suffixes it stays within the 255 of most file systems."""

_ASCII = re.compile(r"[A-Za-z0-9._-]")
_WORD = re.compile(r"[^0-9._-]+")
_ENDINGS = re.compile(r"\.(safetensors|ckpt|pt|json|png|preview)$", re.IGNORECASE)
_RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{digit}" for port in ("com", "lpt") for digit in range(10))}
_UNSEEN = re.compile(r"^COMBINING|FILLER|SELECTOR|INHERENT")
"""In the Unicode names of letters and marks that are invisible, or that belong to no script."""

_COMPOSED = ("THAI", "LAO")
"""Scripts with letters that have a compatibility form, and are no look-alikes for that."""

_TOGETHER = frozenset(
    ("LATIN", "CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "BOPOMOFO", "HANGUL")
)

_FAULTS: tuple[tuple[Callable[[str], object], str, str], ...] = (
    (lambda name: not name, "empty", "is empty"),
    (lambda name: len(name) > LONGEST or len(name.encode()) > LONGEST_BYTES, "long",
     f"has more than {LONGEST} characters, or {LONGEST_BYTES} bytes"),
    (lambda name: name[0] in ".-" or name[-1] == ".", "ends", "begins with '.' or '-', or ends with '.'"),
    (lambda name: ".." in name, "dots", "has two dots in a row"),
    (lambda name: name.lower() == "none", "none", "means 'no LoRA' to a WebUI"),
    (lambda name: name.split(".")[0].lower() in _RESERVED, "reserved", "is reserved by Windows"),
    (_ENDINGS.search, "suffix", "ends like the name of a file"),
)  # fmt: skip
"""Test, key, and what is wrong, in words."""


class NameRefused(UserError):
    """``fault``: a key of what is wrong, for a translation; ``character``: the one at fault, for people, or "";
    ``better``: a name like it that is taken."""

    def __init__(self, name: str, fault: str, told: str, character: str = "") -> None:
        self.fault, self.character, self.better = fault, character, clean_name(name)
        super().__init__(
            f"The name '{printable(name[:LONGEST])}' {told}{character}. "
            f"Take letters, digits, '.', '_' and '-', for example {self.better}.", "name",
        )  # fmt: skip


def check_name(name: str) -> str:
    """``name`` in Unicode's form NFC, if every host and every system accepts it as a stem. Raises NameRefused."""
    name = unicodedata.normalize("NFC", name)
    if foreign := next(_foreign(name), ""):
        raise NameRefused(name, "character", "contains ", _describe(foreign))
    if stranger := next((word[len(first)] for word, [first, *more] in _scripts(name) if more), ""):
        raise NameRefused(name, "scripts", "mixes letters of two scripts in one word: ", _describe(stranger))
    for test, key, told in _FAULTS:
        if test(name):
            raise NameRefused(name, key, told)
    return name


def clean_name(text: str) -> str:
    """A name like ``text`` that check_name accepts."""
    for _ in range(3):  # a form may bring new characters, and a cut may bring new ends
        text = unicodedata.normalize("NFC", text)
        text = "".join(map(_nearest, text)) if any(map(_is_foreign, text)) else text
        for mark in set(_foreign(text)):
            text = text.replace(mark, "-")
        text = _WORD.sub(lambda word: "-".join(_parts(word[0])), text)
    text = re.sub(r"\.{2,}", ".", text)
    while (shorter := _ENDINGS.sub("", _cut(text.strip(".-")))) != text:
        text = shorter
    if not text or any(test(text) for test, *_ in _FAULTS):
        return f"lora-{text}".rstrip("-")
    return text


def with_number(name: str, number: int) -> str:
    """``name-number``; for number 1 the name itself. A long name is cut for it."""
    tail = "" if number == 1 else f"-{number}"
    room = LONGEST_BYTES - len(tail)
    return name[: LONGEST - len(tail)].encode()[:room].decode(errors="ignore") + tail


def grey_name(name: str) -> str:
    """The name of the LoRA of grey pictures that belongs to the LoRA ``name``: the authors put it on the negative
    branch."""
    return f"{name}-grey"


def suggest_name(paths: Sequence[Path | str]) -> str:
    """A name for a LoRA of these pictures: that of the first one, or of its folder if a folder was given."""
    first = Path(paths[0]).resolve()
    return clean_name(first.name if first.is_dir() else first.stem)


def _is_foreign(char: str) -> bool:
    """Whether no name has the character: it is no letter, or one that looks like another, or is not seen."""
    if char.isascii():
        return not _ASCII.match(char)
    called = unicodedata.name(char, "")
    letter = unicodedata.category(char) in ("Lu", "Ll", "Lt", "Lm", "Lo", "Mn", "Mc")
    compatible = unicodedata.decomposition(char).startswith("<") and not called.startswith(_COMPOSED)
    return not letter or compatible or not called or bool(_UNSEEN.search(called))


def _foreign(name: str) -> Iterator[str]:
    """The characters that no name has, and marks that stand on no letter."""
    for before, char in zip(("_", *name), name, strict=False):
        if _is_foreign(char) or (unicodedata.category(char)[0] == "M" and not _WORD.match(before)):
            yield char


def _script(char: str) -> str:
    """The script of a letter or mark: the first word of its Unicode name."""
    script = unicodedata.name(char, "").split(" ")[0]
    return "LATIN" if script in _TOGETHER else script


def _parts(word: str) -> list[str]:
    """A word in pieces of one script each."""
    return ["".join(piece) for _, piece in groupby(word, _script)]


def _scripts(name: str) -> Iterator[tuple[str, list[str]]]:
    """Every word of a name, and its parts."""
    return ((word, _parts(word)) for word in _WORD.findall(name))


def _nearest(char: str) -> str:
    """A character that names have in the place of ``char``; '-' where there is none."""
    plain = unicodedata.normalize("NFKC", char)
    return "-" if any(map(_is_foreign, plain)) else plain


def _cut(text: str) -> str:
    """So much of a text that a number or a word still fits behind it."""
    return text[: LONGEST - 10].encode()[: LONGEST_BYTES - 20].decode(errors="ignore")


def _describe(char: str) -> str:
    """``char`` for a message: as it is, and by its Unicode name where it may look like another, or is not seen."""
    if char == " ":
        return "a space"
    if char.isascii() and char.isprintable():
        return f"'{char}'"
    code = f"U+{ord(char):04X} {unicodedata.name(char, '(a control code)')}"
    return f"'{char}' ({code})" if char.isprintable() else code
