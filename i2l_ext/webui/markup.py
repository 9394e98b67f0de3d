"""HTML from values. Everything is escaped here and nowhere else: a text is shown as it is, unless it is Markup.

Numbers and names get an element of their own (``value``), so that a localisation finds the words (see languages).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape

from i2l_ext.webui.languages import all_words
from i2l_ext.webui.texts import WORDS

_VOID = frozenset({"img", "input"})


class Markup(str):
    """HTML that can be shown as it is."""


def element(tag: str, /, *content: object, **attributes: object) -> Markup:
    """An element. ``content``: Markup as it is, lists one by one, None not at all, anything else escaped. Names of
    attributes: ``_`` stands for ``-``, one at the end is dropped (``class_``, ``data_i2l``). An attribute that is None
    or False is left out, one that is True has no value."""
    told = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{escape(str(value))}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    return Markup(f"<{tag}{told}>" if tag in _VOID else f"<{tag}{told}>{join(*content)}</{tag}>")


def join(*content: object) -> Markup:
    """Content side by side, as in ``element``."""
    return Markup("".join(map(_html, content)))


def _html(content: object) -> str:
    if content is None:
        return ""
    if isinstance(content, (list, tuple)):
        return join(*content)
    return content if isinstance(content, Markup) else escape(str(content))


def word(key: str) -> Markup:
    """A text of WORDS, to be translated."""
    return element("span", WORDS[key], class_="i2l-word")


def translations(language: str) -> Markup:
    """All words of all languages, for the script; and the language that was chosen in the host, or ""."""
    told = json.dumps(all_words(), ensure_ascii=False)
    return element("i", told, id="i2l_words", hidden=True, data_i2l_language=language)


def value(content: object) -> Markup:
    """Something that is not to be translated."""
    return element("span", content, class_="i2l-value")


def error_line(text: str) -> Markup:
    return element("p", text, class_="i2l-error", role="alert")


def quiet_line(key: str, *values: object) -> Markup:
    """A text of WORDS and values, in a subdued colour."""
    return element("p", word(key), " ", [join(value(one), " ") for one in values], class_="i2l-quiet")


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> Markup:
    """``heads`` are keys of WORDS."""
    head = element("tr", [element("th", word(key), scope="col") for key in heads])
    body = [element("tr", [element("td", cell) for cell in row]) for row in rows]
    return element("div", element("table", element("thead", head), element("tbody", body)), class_="i2l-table")


def facts(*pairs: tuple[str, object]) -> Markup:
    """A list of (key of WORDS, content)."""
    rows = [element("div", element("dt", word(key)), element("dd", content)) for key, content in pairs]
    return element("dl", rows, class_="i2l-facts")


def button(
    key: str, action: str, text: str, target: str = "", named: str = "", *, primary: bool = False, **more: object
) -> Markup:
    """A button for the script's ``action`` with ``text`` and ``target``. Its label: a text of WORDS, and a name."""
    return element(
        "button", word(key), join(" ", value(named)) if named else None, type="button",
        class_="i2l-button i2l-primary" if primary else "i2l-button", data_i2l=action, data_i2l_text=text,
        data_i2l_target=target, **more,
    )  # fmt: skip


def action_button(
    key: str, action: str, *, named: str = "", primary: bool = False, goto: str = "", **said: object
) -> Markup:
    """A button for one of ACTIONS (actions.py), which is told ``said`` and the fields around the button; then the page
    goes to the pane ``goto``."""
    told = json.dumps({"action": action, **said})
    return button(key, "act", told, goto, named, primary=primary)


def sized(count: float, of: float | None = None) -> Markup:
    """Bytes, perhaps of how many; a size that is not known, 0, is "?"."""
    if not count and of is None:
        return value("?")
    return value(format_bytes(count) if of is None else f"{format_bytes(count)} / {format_bytes(of)}")


def format_bytes(count: float) -> str:
    """In powers of ten: 1.2 GB, 3.4 MB."""
    return f"{count / 1e9:.1f} GB" if count >= 50e6 else f"{count / 1e6:.1f} MB"


def format_seconds(seconds: float) -> str:
    """1:05 for 65 seconds; with hours from one hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def format_took(seconds: float) -> str:
    """4.2 s, and from one minute on as 1:05."""
    return f"{seconds:.1f} s" if seconds < 60 else format_seconds(seconds)


def format_share(share: float) -> str:
    """98.2% for 0.982."""
    return f"{share:.1%}"
