"""The pane of the LoRA library: what it shows, and what its buttons do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import gradio as gr

from i2l_ext.converters.consumers import CONSUMERS
from i2l_ext.converters.errors import UserError
from i2l_ext.converters.key_formats import KEY_FORMATS
from i2l_ext.service.library import PER_PAGE, SORTS, View
from i2l_ext.service.service import Service
from i2l_ext.webui.markup import Markup, action_button, element, error_line, format_bytes, join, quiet_line, value, word
from i2l_ext.webui.texts import WORDS

BLOCKS = ("library_error", "library_activity", "library_repaired", "library_result", "library_list")

RESIZED = ("4", "8", "16", "32", "64")

TITLES = {consumer.id: consumer.title for consumer in CONSUMERS}


def library_pane(service: Service, c: dict[str, Any]) -> None:
    """The LoRAs of the folder, and what can be done with them."""
    for id in BLOCKS:
        c[id] = gr.HTML(quiet_line("looking_loras") if id == "library_list" else "", elem_id=f"i2l_{id}")


def show_library(service: Service) -> Markup:
    """The list as it is viewed."""
    library = service.library
    rows = library.rows()
    if rows is None:
        job = library.job
        return error_line(job.error) if job is not None and job.error else quiet_line("looking_loras")
    shown, count = library.shown()
    thumbnails = library.thumbnails(shown)
    cards = [_card(row, thumbnails.get(row["file"])) for row in shown]
    last = max(count - 1, 0) // PER_PAGE
    turn = [
        action_button(key, "shelf", page=library.view.page + step)
        for key, step, there in (
            ("page_before", -1, library.view.page > 0),
            ("page_after", 1, library.view.page < last),
        )
        if there
    ]
    pages = element("p", value(f"{count} / {len(rows)}"), " ", turn, class_="i2l-quiet")
    listing = element("ul", cards, class_="i2l-shelf") if cards else quiet_line("no_loras")
    return element("div", _filters(library.view, rows), listing, pages, _deeds(rows), data_i2l_fields=True)


def _filters(view: View, rows: list[dict[str, Any]]) -> Markup:
    archs = {row["arch"]: row["model"] for row in rows if "arch" in row}
    programs = {
        id: TITLES.get(id, id) for row in rows for id, status in row.get("loads", {}).items() if status == "all"
    }
    search = element(
        "input", type="search", name="text", value=view.text, aria_label=WORDS["filter"], placeholder=WORDS["filter"]
    )
    return element(
        "div", search, _select("arch", {"": WORDS["every_model"], **archs}, view.arch),
        _select("loads", {"": WORDS["every_program"], **programs}, view.loads),
        _select("sort", {name: WORDS[f"sort_{name}"] for name in SORTS}, view.sort),
        action_button("show", "shelf", primary=True), action_button("reload", "shelf", reload=True),
        class_="i2l-buttons",
    )  # fmt: skip


def _select(name: str, choices: Mapping[str, str], chosen: str = "") -> Markup:
    options = [element("option", text, value=key, selected=key == chosen) for key, text in choices.items()]
    return element("select", options, name=name, aria_label=WORDS[f"by_{name}"])


def _card(row: Mapping[str, Any], thumbnail: str | None) -> Markup:
    tick = element("input", type="checkbox", name="file", value=row["file"], aria_label=row["file"])
    picture = element("img", src=thumbnail, alt="") if thumbnail else element("i", class_="i2l-no-picture")
    name = element("b", value(row["file"].removesuffix(".safetensors")))
    if "error" in row:
        return element("li", element("label", tick, picture, name), error_line(row["error"]))
    loading = [TITLES.get(id, id) for id, status in row["loads"].items() if status == "all"]
    facts = join(
        value(" · ".join((row["model"], row["key_format"], format_bytes(row["bytes"])))), " · ", word("rank"), " ",
        value(row["rank"]),
    )  # fmt: skip
    loads = join(word("loads_in"), " ", value(", ".join(loading))) if loading else word("loads_nowhere")
    weight = element(
        "label", word("merge_weight"), " ",
        element("input", type="number", name=f"weight {row['file']}", value="1", step="any"), class_="i2l-weight",
    )  # fmt: skip
    made = element("em", word("made_here"), class_="i2l-ready") if row["made"] else None
    return element("li", element("label", tick, picture, name), made, element("p", facts), element("p", loads), weight)


def _deeds(rows: list[dict[str, Any]]) -> Markup:
    """What is done with the ticked ones."""
    repairable = {id: TITLES.get(id, id) for row in rows for id in row.get("repairs", ())}
    parts = [
        join(_select("key_format", {one: one for one in KEY_FORMATS}),
             action_button("convert", "shelf_convert")),
        join(_select("consumer", repairable), action_button("repair", "shelf_repair")) if repairable else None,
        join(_select("rank", {one: one for one in RESIZED}, "16"), action_button("resize", "shelf_resize")),
        action_button("merge", "shelf_merge"), action_button("make_anew", "shelf_anew", goto="make"),
        action_button("discard", "shelf_discard"),
    ]  # fmt: skip
    return element("div", [element("span", part) for part in parts if part], class_="i2l-buttons i2l-deeds")


Said = Mapping[str, Any]


def _field(said: Said, name: str) -> list[str]:
    fields = said.get("fields")
    held = fields.get(name) if isinstance(fields, Mapping) else None
    return [one for one in held if isinstance(one, str)] if isinstance(held, list) else []


def _one(said: Said, name: str) -> str:
    return next(iter(_field(said, name)), "")


def _shelf(service: Service, said: Said) -> Mapping[str, Any]:
    """Show other rows, or look again."""
    if said.get("reload") is True:
        service.library.refresh()
    page, sort = said.get("page"), _one(said, "sort")
    service.library.view = View(
        _one(said, "text"), _one(said, "arch"), _one(said, "loads"), sort if sort in SORTS else "newest",
        page if type(page) is int else 0,
    )  # fmt: skip
    return {"library_list": show_library(service)}


def _weights(said: Said) -> dict[str, float]:
    weights = {}
    for file in _field(said, "file"):
        told = _one(said, f"weight {file}")
        try:
            weights[file] = float(told)
        except ValueError:
            raise UserError(f"The weight of {file} is no number.", "out_of_range") from None
    return weights


def _rank(said: Said) -> int:
    if _one(said, "rank") not in RESIZED:
        raise UserError("Choose a rank of the list.", "unknown_choice")
    return int(_one(said, "rank"))


def _does(act: Callable[[Service, Said], object]) -> Callable[[Service, Said], Mapping[str, Any]]:
    def run(service: Service, said: Said) -> Mapping[str, Any]:
        act(service, said)
        return {}

    return run


LIBRARY_ACTIONS: Mapping[str, tuple[Callable[[Service, Said], Mapping[str, Any]], str]] = {
    "shelf": (_shelf, "library_error"),
    "shelf_convert": (
        _does(lambda service, said: service.library.convert(_field(said, "file"), _one(said, "key_format"))),
        "library_error",
    ),
    "shelf_repair": (
        _does(lambda service, said: service.library.repair(_field(said, "file"), _one(said, "consumer"))),
        "library_error",
    ),
    "shelf_resize": (
        _does(lambda service, said: service.library.resize(_field(said, "file"), _rank(said))), "library_error",
    ),
    "shelf_merge": (
        _does(lambda service, said: service.library.merge(_field(said, "file"), _weights(said))), "library_error",
    ),
    "shelf_anew": (_does(lambda service, said: service.library.make_anew(_field(said, "file"))), "library_error"),
    "shelf_discard": (_does(lambda service, said: service.library.discard(_field(said, "file"))), "library_error"),
}  # fmt: skip
"""As ACTIONS of actions.py, which has them."""


def library_news(service: Service, seen: dict[str, Any]) -> dict[str, Any]:
    """The list, when it has been read anew since the page was told."""
    rows, job = service.library.rows(), service.library.job
    state = f"{job.id if job else ''} {job.state if job else ''} {rows is None}"
    if seen.get("library") == state or (job is not None and job.state not in ("done", "failed", "cancelled")):
        return {}
    seen["library"] = state
    return {"library_list": show_library(service)}
