"""Models on the page: a choice, an offer to download one, and the list of all their files."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any
from urllib.parse import quote

from i2l_ext.service.model_list import MINIATURE, missing_parts
from i2l_ext.service.settings import HUB_TITLES
from i2l_ext.webui.markup import (
    Markup,
    action_button,
    element,
    facts,
    join,
    quiet_line,
    sized,
    table,
    value,
    word,
)
from i2l_ext.webui.texts import WORDS

Row = Mapping[str, Any]


def model_choice(rows: Sequence[Row] | None, chosen: str, fetching: Collection[str] = ()) -> Markup:
    """A radio button for each model, the real ones first. ``fetching``: those that are being downloaded."""
    if rows is None:
        return quiet_line("looking")
    real = [_choice(row, chosen, fetching) for row in rows if not _is_miniature(row)]
    small = [_choice(row, chosen, fetching) for row in rows if _is_miniature(row)]
    summary = element("summary", word("try_it"), " ", element("small", word("mini_note"), class_="i2l-quiet"))
    opened = any(_is_miniature(row) and row["name"] == chosen for row in rows)
    tries = element("details", summary, small, class_="i2l-try", open=opened) if small else None
    room = _room_line(rows) if any(not row["ready"] for row in rows) else None
    return element("div", real, room, tries, class_="i2l-models", role="radiogroup", aria_label=WORDS["model"])


def _is_miniature(row: Row) -> bool:
    return row.get("arch") == MINIATURE


def _choice(row: Row, chosen: str, fetching: Collection[str]) -> Markup:
    radio = element("input", type="radio", name="i2l_model", value=row["name"], checked=row["name"] == chosen)
    label = element("label", radio, element("b", row["name"]), element("span", word_of(row["line"])))
    return element("div", label, readiness(row, fetching, "make"), class_="i2l-model")


def word_of(line: str) -> Markup:
    """A text that is not of ours alone, to be translated where it is known."""
    return element("span", line, class_="i2l-word")


def readiness(row: Row, fetching: Collection[str], pane: str) -> Markup:
    """That a model is ready, or on its way, or a button that offers its download in the pane."""
    if row["ready"]:
        ready = element("em", word("ready"), class_="i2l-ready")
        see = action_button("see_code", "look_at_code", model=row["name"], pane=pane)
        return element("span", ready, " ", see, class_="i2l-missing") if row.get("has_code") else ready
    if row["name"] in fetching:
        return element("em", word("fetching"), class_="i2l-missing")
    key = "resume" if row.get("fetched_bytes") else "download"
    size = sized(row.get("fetched_bytes") or row["download_bytes"], row["download_bytes"] if key == "resume" else None)
    return element(
        "span", size, " ", action_button(key, "offer", model=row["name"], pane=pane), class_="i2l-missing"
    )  # fmt: skip


def download_offer(
    row: Row, pane: str, *, places: bool, then_make: bool = False, hubs: Sequence[str] = tuple(HUB_TITLES)
) -> Markup:
    """What a model lacks, where that comes from and goes to (with ``places``), how much room there is, a tick that
    agrees to its licences, one that packs the files, and the button. ``then_make``: the LoRA is made after it."""
    missing = missing_parts(row)
    if not missing:
        return element("div", quiet_line("all_here"), class_="i2l-offer")
    parts = [
        (value(part["id"]), sized(part["bytes"]), _repository(part["repo"]), value(part["licence"])) for part in missing
    ]
    pairs: list[tuple[str, object]] = [("size", sized(row["download_bytes"] - row.get("fetched_bytes", 0)))]
    if row.get("free_bytes") is not None:
        pairs.append(("free", sized(row["free_bytes"])))
    if places:
        pairs.append(("goes_to", value(row["download_folder"])))
    licences = dict.fromkeys(part["licence"] for part in missing)
    agree = _tick("agreed", row, word("agree"), ": ", value("; ".join(licences)))
    pack = None if row.get("has_code") else _tick("packed", row, word("pack_download"))  # v2 files are not packed
    options = [element("option", title, value=HUB_TITLES[title]) for title in hubs]
    hub = element("label", word("origin"), " ", element("select", options, name="source")) if len(hubs) > 1 else None
    key = "download_and_make" if then_make else "resume" if row.get("fetched_bytes") else "download"
    buttons = element(
        "div", action_button(key, "fetch", primary=True, model=row["name"], pane=pane, make=then_make),
        action_button("not_now", "close_offer", pane=pane), hub, class_="i2l-buttons",
    )  # fmt: skip
    files = element("details", element("summary", word("files_and_licences")),
                    table(("part", "size", "origin", "licence"), parts))  # fmt: skip
    title = element("h4", word("needs_download"), " ", value(row["name"]))
    return element(
        "section", title, facts(*pairs), agree, pack, buttons, files, class_="i2l-offer", data_i2l_fields=True
    )


def _repository(name: str) -> Markup:
    """A link to a repository's page, which shows its licence; both hubs have the same names."""
    return element("a", name, href=f"https://huggingface.co/{quote(name)}", target="_blank", rel="noopener noreferrer")


def _tick(name: str, row: Row, *words: object) -> Markup:
    tick = element("input", type="checkbox", name=name, value=row["name"])
    return element("label", tick, " ", element("span", *words), class_="i2l-agree")


def model_table(rows: Sequence[Row] | None, *, places: bool, fetching: Collection[str] = ()) -> Markup:
    """All models, their files, licences, and whether they are downloaded; with ``places`` in which folders."""
    if rows is None:
        return quiet_line("looking")
    details = []
    for row in sorted(rows, key=_is_miniature):
        parts = [
            (value(part["id"]), sized(part["bytes"]), value(part["licence"]), _place(part, places))
            for part in row["parts"]
        ]
        verify = action_button("verify", "verify", model=row["name"]) if row["ready"] else None
        title = element("summary", element("b", row["name"]), " ", element("span", word_of(row["line"])))
        more = element("details", title, table(("part", "size", "licence", "place"), parts), verify)
        details.append(element("div", more, readiness(row, fetching, "models"), class_="i2l-model-row"))
    return element("div", details, class_="i2l-catalogue")


def _place(part: Mapping[str, Any], places: bool) -> Markup:
    shown = word("here" if part["path"] and not part["problem"] else "not_here")
    if places and (part["problem"] or part["path"]):
        shown = value(part["problem"] or part["path"])
    return join(shown, " ", word("packed"), f" ({part['packed']})") if part.get("packed") else shown


def _room_line(rows: Sequence[Row]) -> Markup | None:
    """How much room the disk of downloads has."""
    free = next((row.get("free_bytes") for row in rows), None)
    return None if free is None else join(quiet_line("free", sized(free)))
