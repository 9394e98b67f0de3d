"""The languages of the tab: JSON files from the English text to its translation.

CODE.json has the texts of the page (texts.py), CODE-phrases.json what the engine and the rooms below say: refusals,
hints, verdicts, lines about models. A key with ``{}`` stands for every text that has something in their places; the
translation has ``{}`` in the same order, or ``{2}`` and ``{1}``. They lie here and not in a folder ``localizations``: a
WebUI would put the words of that into its one dictionary for the whole page.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

LANGUAGES = {"en": "English", "zh_CN": "简体中文", "ru_RU": "Русский"}
"""Code -> name. English has phrases only: advice for the tab in place of commands, which only a terminal has."""


@cache
def all_words() -> dict[str, dict[str, str]]:
    """{code: {English: translation}}."""
    words = {code: {**read_words(code), **read_words(f"{code}-phrases")} for code in LANGUAGES if code != "en"}
    return {"en": read_words("en-phrases"), **words}


def read_words(name: str) -> dict[str, str]:
    """The words of one of the files."""
    return json.loads(Path(__file__).with_name(f"{name}.json").read_text(encoding="utf-8"))
