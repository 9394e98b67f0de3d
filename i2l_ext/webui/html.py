"""The parts of the page that gradio has no component for: its head, places to drop files, pictures, and a name's line.
Models are in model_views.py, jobs at work in job_views.py, results in results.py."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from i2l_ext.library.names import NameRefused
from i2l_ext.webui.markup import Markup, button, element, error_line, join, quiet_line, value, word
from i2l_ext.webui.texts import CONTROLS, WORDS


def heading(note: str | None, place: str, languages: Mapping[str, str]) -> Markup:
    """The top of the tab: a key of WORDS as a notice, with a ``place`` after it, and a choice of ``languages`` where no
    WebUI has one."""
    options = [element("option", name, value=code) for code, name in languages.items()]
    choice = element(
        "label", word("language"), " ",
        element("select", element("option", WORDS["by_browser"], value=""), options, data_i2l_language=True),
        class_="i2l-language",
    )  # fmt: skip
    told = (word(note), join(" ", element("code", place)) if place else None) if note else None
    notice = element("p", told, class_="i2l-notice", role="note") if told else None
    lost = element("p", word("unreachable"), class_="i2l-error", id="i2l_lost", role="alert", hidden=True)
    said = element("p", id="i2l_said", class_="i2l-unseen", role="status")
    head = element("p", word("line"))
    return element("div", choice if languages else None, head, notice, lost, said, class_="i2l-head")


def tips() -> Markup:
    """Tooltips, which the script puts on the controls."""
    return join([element("i", text.tip, data_i2l_for=f"i2l_{id}") for id, text in CONTROLS.items() if text.tip])


def drop_zone(id: str, key: str, *, accept: str, many: bool = False, place: str = "") -> Markup:
    """A place to drop files on, or to press; the script uploads them. ``place``: what the script calls it, where
    several have one label."""
    label = CONTROLS[id].label
    return element(
        "div", element("b", label), word(key),
        element("input", type="file", accept=accept, aria_label=label, multiple=many),
        element("em", word("uploading"), " ", element("i", class_="i2l-value"), hidden=True),
        element("p", word("not_uploaded"), class_="i2l-error", role="alert", hidden=True),
        class_="i2l-drop", data_i2l_drop=place or id,
    )  # fmt: skip


def tray(pictures: Sequence[Mapping[str, Any]], errors: Iterable[str] = (), turn: object = "") -> Markup:
    """The pictures for a LoRA: ``{id, picture, weight}``, and what was wrong with others. ``turn``: the upload that
    this answers; the script sends the next one after it."""
    cards = element("ul", [_card(number, one) for number, one in enumerate(pictures, 1)], class_="i2l-tray")
    empty = element("p", word("no_pictures"), class_="i2l-quiet")
    wrong = element("p", word("share_wrong"), class_="i2l-error", id="i2l_share_wrong", role="alert", hidden=True)
    shown = join(cards, wrong) if pictures else empty
    return element("div", shown, list(map(error_line, errors)), data_i2l_turn=turn)


def _card(number: int, one: Mapping[str, Any]) -> Markup:
    remove = element(
        "button", "×", type="button", class_="i2l-remove", data_i2l="remove", title=WORDS["remove"],
        aria_label=f"{WORDS['remove']} {number}",
    )  # fmt: skip
    crop = button(
        "crop", "act", json.dumps({"action": "crop", "id": one["id"]}), title=WORDS["crop_title"],
        aria_label=f"{WORDS['crop']} {number}",
    )  # fmt: skip
    share = "" if one["weight"] is None else f"{one['weight']:g}"
    weight = element("input", type="number", data_i2l="weight", min="0.01", step="any", value=share)
    image = element("img", src=one["picture"], alt="")
    count = element("i", number, class_="i2l-number")
    return element(
        "li", image, count, remove, crop, element("label", word("share"), weight), class_="i2l-card",
        data_i2l_id=one["id"],
    )  # fmt: skip


def name_line(error: NameRefused) -> Markup:
    """Why a name is refused, and one that is not."""
    better = element("button", value(error.better), type="button", class_="i2l-button", data_i2l="rename",
                     data_i2l_text=error.better)  # fmt: skip
    shown = [" ", value(error.character)] if error.character else None
    return element(
        "p", word(f"name_{error.fault}"), shown, " ", word("name_better"), " ", better, class_="i2l-error", role="alert"
    )


def saved_as_line(path: str) -> Markup:
    """Where a LoRA will be saved."""
    return quiet_line("saved_as", path)
