"""What came of a job, as the page shows it: a function for each kind, from the job to HTML."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from i2l_ext.engine.job import Job
from i2l_ext.webui.markup import (
    Markup,
    button,
    element,
    facts,
    format_bytes,
    format_share,
    join,
    table,
    value,
    word,
)
from i2l_ext.webui.texts import WORDS


def show_make(job: Job, in_webui: bool) -> Markup:
    """A LoRA that was made; with buttons for its prompt where there is a WebUI to put it into."""
    result, cached = job.result, job.view()["cached"]
    took = ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in result["seconds"].items())
    from_cache = join(" · ", word("cached"), ": ", value(len(cached))) if cached else None
    prompt = result["prompt"]
    buttons = [button("copy", "copy", prompt)]
    if in_webui:
        buttons += [button(f"to_{where}", "insert", prompt, where) for where in ("txt2img", "img2img")]
        buttons.append(button("open_lora", "open", ""))
    rows = facts(
        ("file", value(result["file"])), ("rank", value(result["rank"])), ("modules", value(result["modules"])),
        ("size", value(format_bytes(result["bytes"]))), ("time", join(value(took), from_cache)),
        ("dialect", value(result["dialect"])), *_loss(result),
    )  # fmt: skip
    body = element(
        "div", element("h3", value(result["name"])), rows, element("code", prompt, class_="i2l-prompt"),
        element("div", buttons, class_="i2l-buttons"),
    )  # fmt: skip
    drawn = _figure(result["drawn"], "drawn", caption=True) if result.get("drawn") else None
    return element(
        "article", element("img", src=result["picture"], alt=""), body, drawn, _consumers(result.get("check"), job.id),
        class_="i2l-result", data_i2l_id=job.id, data_i2l_made=1,
    )  # fmt: skip


def _figure(uri: str, key: str, *, caption: bool = False) -> Markup:
    below = element("figcaption", word(key)) if caption else None
    return element("figure", element("img", src=uri, alt=WORDS[key]), below)


def _consumers(check: Mapping[str, Any] | None, job: str) -> Markup | None:
    """Which programs load the LoRA of a job, as ``i2l check --json`` has it, with a button where one can be made to."""
    if not check:
        return None
    rows = []
    for one in check["consumers"]:
        verdict = element("span", ": ".join(filter(None, (one["status"], one["detail"]))))  # to be translated
        repair = None
        if one.get("mend"):
            named = button("repair_for", "repair", job, one["consumer"], one["title"])
            repair = join(named, element("code", value(one["mend"])))
        rows.append((element("b", value(one["title"])), verdict, repair))
    caution = element("p", value(check["caution"])) if check["caution"] else None
    return join(element("h4", word("who_loads")), caution, table(("program", "verdict", "repairs"), rows))


def show_inspect(job: Job) -> Markup:
    """What a LoRA is."""
    result = job.result
    ranks = ", ".join(f"{rank} ({count})" for rank, count in result["ranks"].items())
    finite = value("?") if result["finite"] is None else word("yes" if result["finite"] else "no")
    pairs: list[tuple[str, object]] = [
        ("architecture", value(result["arch"])), ("dialect", value(result["dialect"])),
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
    return _wide(job, element("h3", value(job.title)), facts(*pairs), plot, _consumers(result.get("check"), job.id))


def show_file(job: Job) -> Markup:
    """The name of a LoRA that was written."""
    saved = (word("saved_as_file"), " ", element("b", value(job.result["file"])))
    return _wide(job, saved, facts(*_loss(job.result)) if _loss(job.result) else None, made=True)


def _loss(result: Mapping[str, Any]) -> list[tuple[str, object]]:
    """What the number format of a file has lost, where that is worth telling."""
    return [("loss", value(result["loss"]))] if result.get("loss") else []


def show_repair(job: Job) -> Markup:
    """What a repair wrote: a file, or a start folder."""
    return show_export(job) if job.result["command"] == "export" else show_file(job)


def show_export(job: Job) -> Markup:
    """A start folder, and the command that starts the training."""
    result = job.result
    folder = PurePath(result["folder"]).as_posix()
    command = result["start"]
    line = element("div", element("code", command, class_="i2l-prompt"), button("copy", "copy", command),
                   class_="i2l-command")  # fmt: skip
    script = element("details", element("summary", word("script")), element("pre", result.get("said")))
    pairs = facts(("folder", value(folder)), ("kept", value(format_share(result["kept"]["all"]))))
    return _wide(job, pairs, element("h4", word("run_this")), line, script if result.get("said") else None)


def show_download(job: Job) -> Markup:
    return element("p", word("downloaded"), " ", element("b", value(job.title)), class_="i2l-result i2l-wide")


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
        "article", content, class_="i2l-result i2l-wide", data_i2l_id=job.id, data_i2l_made=1 if made else None
    )
