"""Prompts of mini: the words that it knows, and the ``<lora:name:weight>`` of WebUIs."""

from __future__ import annotations

import re
from pathlib import Path

from i2l_ext.converters.errors import UserError
from i2l_ext.converters.shell import shell_word

from . import looks, things, world

MAX_WORDS = 16
VOCABULARY = ("a", "picture", "and", "on", "lit", *things.THINGS, *filter(None, world.PLACES), *looks.TEXTURES,
              *looks.GROUNDS, *looks.OUTLINES, *looks.COLOURS)  # fmt: skip
"""The order is that of the rows of the trained word embeddings."""

_IGNORED = frozenset({"an", "the", "of"})
_LORA_TAG = re.compile(r"<lora:([^:>]+)(?::([^:>]*))?>")


def tokenize(prompt: str) -> list[str]:
    """The words of a prompt, all of them in the vocabulary. Raises UserError for an unknown word, for none and for
    too many."""
    words = [word for word in prompt.lower().replace(",", " ").split() if word not in _IGNORED]
    unknown = [word for word in words if word not in VOCABULARY]
    if unknown:
        known = ", ".join(things.THINGS)
        raise UserError(f"mini does not know the word '{unknown[0]}'; try 'a THING' with one of: {known}")
    if not words:
        raise UserError("the prompt is empty; try 'a star'")
    if len(words) > MAX_WORDS:
        raise UserError(f"mini reads {MAX_WORDS} words at most, the prompt has {len(words)}")
    return words


def split_lora_tags(prompt: str) -> tuple[str, list[tuple[str, float]]]:
    """The prompt without its ``<lora:name:weight>``, and their names and weights (1 where a tag has none).

    Raises UserError for a weight that is not a number.
    """
    found = []
    for name, weight in _LORA_TAG.findall(prompt):
        try:
            found.append((name, float(weight or 1)))
        except ValueError:
            raise UserError(f"<lora:{name}:{weight}>: the weight must be a number.") from None
    return _LORA_TAG.sub(" ", prompt).strip(), found


def find_lora_file(name: str, folder: Path) -> Path:
    """The file of a ``<lora:name:…>``: NAME.safetensors in the folder or below it. Raises UserError."""
    for path in sorted(folder.rglob("*.safetensors")):
        if path.stem == name:
            return path
    make = f"i2l make PICTURE --model mini --name {shell_word(name)} --lora-dir {shell_word(str(folder))}"
    raise UserError(f"{folder}: there is no LoRA {name!r} in it. Make one: {make}")
