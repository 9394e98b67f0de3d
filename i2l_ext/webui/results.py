"""What came of a job, as the page shows it: a function for each kind, from the job to HTML."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from i2l_ext.engine.job import Job
from i2l_ext.service.host import Host
from i2l_ext.service.model_list import MINIATURE
from i2l_ext.webui.markup import (
    Markup,
    action_button,
    button,
    element,
    facts,
    format_bytes,
    format_share,
    format_took,
    join,
    quiet_line,
    table,
    value,
    word,
)
from i2l_ext.webui.model_views import word_of
from i2l_ext.webui.texts import WORDS

STRENGTHS, RANKS = (0.5, 0.75, 1.25, 1.5), (4, 8, 16, 32)
"""Of the variants that are offered."""

POSITIVE_ONLY = frozenset({"z-image"})
"""Base models for which the authors apply a LoRA on the positive branch of guidance alone."""

MAX_DOUBLED = 8
"""Pictures for which a variant is offered."""


def show_make(job: Job, earlier: Sequence[Job], host: Host) -> Markup:
    """A LoRA that was made, what can be done with it, and those before it. Buttons for its prompt where there is a
    WebUI to put it into."""
    result, cached = job.result, job.view()["cached"]
    took = value(format_took((job.ended or 0) - (job.started or 0)))
    time = join(took, join(" · ", word("cached"), ": ", value(len(cached))) if cached else None)
    rows = facts(
        ("file", value(result["file"])), ("size", value(format_bytes(result["bytes"]))),
        ("rank", value(result["rank"])), ("modules", value(result["modules"])),
        ("key_format", value(result["key_format"])),
        ("time", time), *_loss(result), *([("grey", value(result["grey"]))] if result.get("grey") else []),
    )  # fmt: skip
    body = element("div", element("h3", value(result["name"])), _prompt(job, host), rows, class_="i2l-made")
    drawn = _figure(result["drawn"], "drawn", caption=True) if result.get("drawn") else None
    steps = element(
        "div", action_button("pane_train", "choose", file=result["file"], goto="train"),
        action_button("inspect", "choose", file=result["file"], goto="inspect"), class_="i2l-buttons",
    )  # fmt: skip
    older = [_earlier(one, host) for one in earlier]
    return element(
        "article", element("img", src=result["picture"], alt=""), body, drawn,
        _loaders(result.get("check"), result["arch"], job.id, "make"), steps, _variants(job),
        element("details", element("summary", word("made_before")), older) if older else None,
        class_="i2l-result", data_i2l_id=job.id, data_i2l_made="new", data_i2l_said=f"{job.title}: {WORDS['done']}",
    )  # fmt: skip


def _prompt(job: Job, host: Host) -> Markup:
    """The words for a prompt, and where they can be put. Where the authors advise the positive branch alone, and the
    program can do that, those for it come first."""
    prompt, in_webui = job.result["prompt"], host.settings_file is None
    opens = button("open_lora", "open", "") if in_webui else None
    if not (in_webui and host.applies_loras and job.result["arch"] in POSITIVE_ONLY):
        return element("div", _prompt_buttons(prompt, in_webui), opens, class_="i2l-buttons")
    rows = [
        element("div", _prompt_buttons(text, in_webui), element("em", word(key)), class_="i2l-buttons")
        for text, key in ((prompt.replace("<lora:", "<i2l:"), "positive_branch"), (prompt, "both_branches"))
    ]
    return element("div", rows, opens)


def _prompt_buttons(prompt: str, in_webui: bool) -> list[Markup]:
    """A text for a prompt, and the buttons that copy and insert it."""
    inserts = [button(f"to_{where}", "insert", prompt, where) for where in ("txt2img", "img2img")] if in_webui else []
    return [element("code", prompt, class_="i2l-prompt"), button("copy", "copy", prompt), *inserts]


def _earlier(job: Job, host: Host) -> Markup:
    """A LoRA in one row."""
    image = element("img", src=job.result["picture"], alt="")
    return element("div", image, element("b", value(job.result["name"])), _prompt(job, host), class_="i2l-earlier")


def _variants(job: Job) -> Markup | None:
    """Boxes to tick, and the button that makes what is ticked. The pictures are in the cache: it takes seconds."""
    if not job.request:
        return None
    count = len(job.request.get("pictures") or ())
    groups = [
        ("strength", STRENGTHS), ("rank", [rank for rank in RANKS if rank < job.result["rank"]]),
        ("twice", range(1, min(count, MAX_DOUBLED) + 1) if count > 1 else ()),
    ]  # fmt: skip
    boxes = [
        element("fieldset", element("legend", word(f"vary_{name}")), [
            element("label", element("input", type="checkbox", name=name, value=f"{one:g}"), value(f"{one:g}"))
            for one in choices
        ])
        for name, choices in groups if choices
    ]  # fmt: skip
    make = action_button("make_them", "vary", primary=True, job=job.id)
    title = element("summary", word("make_variants"))
    return element("details", title, boxes, make, class_="i2l-variants", data_i2l_fields=True)


def _figure(uri: str, key: str, *, caption: bool = False) -> Markup:
    below = element("figcaption", word(key)) if caption else None
    return element("figure", element("img", src=uri, alt=WORDS[key]), below)


def _loaders(check: Mapping[str, Any] | None, arch: str, job: str, pane: str) -> Markup | None:
    """Which programs load a LoRA, in one line, with the table behind it. One for whose model there is no program says
    so, and no table: a program that knows its names has no model of its sizes."""
    if not check:
        return None
    if check["caution"]:
        of_mini = arch == MINIATURE
        return element("p", word("mini_loads") if of_mini else word_of(check["caution"]), class_="i2l-loaders")
    groups: dict[str, list[str]] = {"loads": [], "loads_converted": [], "loads_not": []}
    for one in check["consumers"]:
        key = "loads" if one["status"] == "all" else "loads_converted" if one.get("repair") else "loads_not"
        groups[key].append(one["title"])
    line = [
        element("span", value(", ".join(titles)), ": ", word(key), class_="i2l-loads")
        for key, titles in groups.items() if titles
    ]  # fmt: skip
    summary = element("summary", element("b", word("who_loads")), " ", line)
    return element("details", summary, _consumers(check, job, pane), class_="i2l-loaders")


def _consumers(check: Mapping[str, Any], job: str, pane: str) -> Markup:
    """What each program does with the LoRA of a job, with a button where one can be made to load it."""
    rows = []
    for one in check["consumers"]:
        verdict = join(word_of(one["status"]), *([": ", word_of(one["detail"])] if one["detail"] else []))
        repair = None
        if one.get("repair"):
            repair = action_button("repair_for", "repair", named=one["title"], job=job, consumer=one["consumer"],
                                   pane=pane)  # fmt: skip
        rows.append((element("b", value(one["title"])), verdict, repair))
    return table(("program", "verdict", "repairs"), rows)


def show_inspect(job: Job) -> Markup:
    """What a LoRA is."""
    result = job.result
    ranks = ", ".join(f"{rank} ({count})" for rank, count in result["ranks"].items())
    finite = value("?") if result["finite"] is None else word("yes" if result["finite"] else "no")
    pairs: list[tuple[str, object]] = [
        ("architecture", value(result["arch"])), ("key_format", value(result["key_format"])),
        ("modules", value(result["modules"])), ("rank", value(ranks)), ("dtype", value(result["dtype"])),
        ("finite", finite),
    ]  # fmt: skip
    if result["missing"]:
        pairs.append(("missing", value(", ".join(f"{kind}: {count}" for kind, count in result["missing"].items()))))
    if result["foreign"]:
        pairs.append(("foreign", value(f"{len(result['foreign'])}: {', '.join(result['foreign'][:4])}")))
    if result.get("maker"):
        pairs.append(("made_by", value(result["maker"])))
    if result.get("unplotted"):
        pairs.append(("heat_map", value(result["unplotted"])))
    plot = _figure(result["plot"], "heat_map") if result.get("plot") else None
    loaders = _loaders(result.get("check"), result["arch"], job.id, "inspect")
    return _wide(job, element("h3", value(job.title)), facts(*pairs), loaders, plot)


def show_file(job: Job) -> Markup:
    """The name of a LoRA that was written."""
    saved = (word("saved_as_file"), " ", element("b", value(job.result["file"])))
    return _wide(job, saved, facts(*_loss(job.result)) if _loss(job.result) else None, made=True)


def _loss(result: Mapping[str, Any]) -> list[tuple[str, object]]:
    """What the number format of a file has lost, where that is worth telling."""
    return [("loss", value(result["loss"]))] if result.get("loss") else []


def show_repair(job: Job, host: Host) -> Markup:
    """What a repair wrote: a file, or a start folder."""
    return show_export(job, host) if job.result["command"] == "export" else show_file(job)


def show_export(job: Job, host: Host) -> Markup:
    """A start folder, where it is, and what starts the training. On this machine's own page the folder is a whole path;
    elsewhere it is told from where it lies: beside the LoRA folder."""
    result = job.result
    folder = PurePath(result["folder"])
    folder = host.lora_folder().parent / folder if host.is_local else folder
    where = join(value(folder.as_posix()), " ", None if host.is_local else join(word("beside_loras"), " "),
                 button("copy", "copy", folder.as_posix()))  # fmt: skip
    lines = f"python {shlex.quote((folder / result['run']).as_posix())}"
    code = element("code", lines, class_="i2l-prompt")
    told = element("div", code, button("copy", "copy", lines), class_="i2l-command")
    script = element("details", element("summary", word("script")), element("pre", result.get("said"), tabindex=0))
    pairs = facts(
        ("folder", where), ("kept", value(format_share(result["kept"]["all"]))), *_dataset(result), _base_model(result),
    )  # fmt: skip
    title = element("h4", word("run_this"), " ", word("in_folder"))
    no_trainer = element("p", word("mini_starts"), class_="i2l-loaders") if result.get("caution") else None
    button_here = _start_button(job, host)
    return _wide(job, pairs, no_trainer, title, told, button_here, script if result.get("said") else None)


def _dataset(result: Mapping[str, Any]) -> list[tuple[str, object]]:
    """The pictures of a start folder, and their prompt."""
    count = result.get("pictures", 0)
    if not count:
        return [("training_pictures", word("no_training_pictures"))]
    prompt = value(result["caption"]) if result.get("caption") else word("empty_prompt")
    return [("training_pictures", value(count)), ("training_prompt", prompt)]


def _base_model(result: Mapping[str, Any]) -> tuple[str, object]:
    bases = result.get("bases") or {}
    if bases:
        return "base_model", value(", ".join(dict.fromkeys(map(str, bases.values()))))
    return "base_model", word("base_downloads" if result.get("downloads") else "base_to_fill_in")


def _start_button(job: Job, host: Host) -> Markup | None:
    """What starts the training here, where the settings name a trainer."""
    if not host.is_local:
        return None
    if not host.option("i2l_trainer"):
        return quiet_line("run_settings")
    return element("div", action_button("start_run", "train", primary=True, job=job.id), class_="i2l-buttons")


def show_download(job: Job) -> Markup:
    return element("p", word("downloaded"), " ", element("b", value(job.title)), class_="i2l-result i2l-wide")


def show_discard(job: Job) -> Markup:
    """How many LoRAs were moved into the trash."""
    return _wide(job, word("discarded"), " ", element("b", value(len(job.result["files"]))))


def show_verify(job: Job) -> Markup:
    """What each file of a model was compared with."""
    rows = [(value(part["id"]), value(part["found"])) for part in job.result["parts"]]
    return _wide(job, element("h4", value(job.title)), table(("part", "verified"), rows))


def show_doctor(job: Job) -> Markup:
    """The text of a bug report, to be copied."""
    text = job.result["text"]
    return join(element("pre", text, class_="i2l-prompt", tabindex=0), button("copy", "copy", text))


def _wide(job: Job, *content: object, made: bool = False) -> Markup:
    return element(
        "article", content, class_="i2l-result i2l-wide", data_i2l_id=job.id, data_i2l_made="again" if made else None,
        data_i2l_said=f"{job.title}: {WORDS['done']}",
    )  # fmt: skip
