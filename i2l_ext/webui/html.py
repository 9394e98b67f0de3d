"""The parts of the page that gradio has no component for: jobs, results, models, pictures. Values in, HTML out.

Everything that is not ours is escaped. Numbers and names stand in elements of their own, so that a WebUI's
localisation finds the words (see texts.py).
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import PurePath
from typing import Any

from i2l_ext.engine.queue import Job
from i2l_ext.webui.service import lacking
from i2l_ext.webui.texts import CONTROLS, STEPS, WORDS


def word(key: str) -> str:
    return f"<span>{escape(WORDS[key])}</span>"


def value(text: object) -> str:
    """Something that is not to be translated."""
    return f'<span class="i2l-value">{escape(str(text))}</span>'


def size(count: float) -> str:
    """Bytes for people, in powers of ten."""
    return f"{count / 1e9:.1f} GB" if count >= 50e6 else f"{count / 1e6:.1f} MB"


def duration(seconds: float) -> str:
    """1:05 for 65 seconds; with hours from one hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def percent(share: float) -> str:
    """98.2% for 0.982."""
    return f"{share:.1%}"


def heading(note: str | None, *, languages: Mapping[str, str] | None = None) -> str:
    """The top of the tab; with a choice of ``languages`` where no WebUI has one."""
    options = "".join(f'<option value="{code}">{escape(name)}</option>' for code, name in (languages or {}).items())
    choice = (
        f'<label class="i2l-language">{word("language")} <select data-i2l-language><option value="">'
        f"{escape(WORDS['by_browser'])}</option>{options}</select></label>"
    )
    notice = f'<p class="i2l-notice" role="note">{word(note)}</p>' if note else ""
    lost = f'<p class="i2l-error" id="i2l_lost" role="alert" hidden>{word("unreachable")}</p>'
    return f'<div class="i2l-head">{choice if languages else ""}<p>{word("line")}</p>{notice}{lost}</div>'


def tips() -> str:
    """Tooltips, for the script to put on the controls."""
    return "".join(f'<i data-i2l-for="i2l_{id}">{escape(text.tip)}</i>' for id, text in CONTROLS.items() if text.tip)


def drop_zone(id: str, key: str, *, accept: str, many: bool = False) -> str:
    """A place to drop files on, or to press; the script uploads them."""
    return (
        f'<div class="i2l-drop" data-i2l-drop="{id}"><b>{escape(CONTROLS[id].label)}</b>{word(key)}'
        f'<input type="file" accept="{accept}" aria-label="{escape(CONTROLS[id].label)}"{" multiple" if many else ""}>'
        f'<em hidden>{word("uploading")} <i class="i2l-value"></i></em>'
        f'<p class="i2l-error" role="alert" hidden>{word("not_uploaded")}</p></div>'
    )


def tray(pictures: Sequence[Mapping[str, Any]], errors: Iterable[str] = (), turn: object = "") -> str:
    """The pictures that are to make a LoRA: ``{id, picture, weight}``, and what was wrong with others. ``turn``: the
    upload that this answers, so that the script knows when the next one may follow."""
    cards = "".join(
        f'<li class="i2l-card" data-i2l-id="{escape(one["id"])}"><img src="{escape(one["picture"])}" alt="">'
        f'<button type="button" class="i2l-remove" data-i2l="remove" title="{escape(WORDS["remove"])}" '
        f'aria-label="{escape(WORDS["remove"])} {number}">×</button>'
        f'<label>{word("weight")}<input type="number" data-i2l="weight" min="0.1" max="100" step="0.1" '
        f'value="{one["weight"]:g}"></label></li>'
        for number, one in enumerate(pictures, 1)
    )
    body = f'<ul class="i2l-tray">{cards}</ul>' if cards else f'<p class="i2l-quiet">{word("no_pictures")}</p>'
    return f'<div data-i2l-turn="{escape(str(turn))}">{body}{"".join(error(text) for text in errors)}</div>'


def error(text: str) -> str:
    return f'<p class="i2l-error" role="alert">{escape(text)}</p>'


def quiet(key: str, *values: object) -> str:
    return f'<p class="i2l-quiet">{word(key)} {" ".join(map(value, values))}</p>'


def model_choice(rows: Sequence[Mapping[str, Any]] | None, chosen: str) -> str:
    """One line for each model, to choose from."""
    if rows is None:
        return quiet("looking")
    lines = "".join(
        f'<label class="i2l-model"><input type="radio" name="i2l_model" value="{escape(row["name"])}"'
        f"{' checked' if row['name'] == chosen else ''}><b>{escape(row['name'])}</b>"
        f"<span>{escape(row['line'])}</span>{_mark(row)}</label>"
        for row in rows
    )
    note = f'<p class="i2l-quiet">{word("mini_note")}</p>' if any(row["name"] == "mini" for row in rows) else ""
    return f'<div class="i2l-models" role="radiogroup" aria-label="{escape(WORDS["model"])}">{lines}</div>{note}'


def _mark(row: Mapping[str, Any]) -> str:
    if row["ready"]:
        return f'<em class="i2l-ready">{word("ready")}</em>'
    return f'<em class="i2l-missing">{word("to_download")} {value(size(row["download_bytes"]))}</em>'


def model_table(rows: Sequence[Mapping[str, Any]] | None, *, places: bool) -> str:
    """All models, their parts, licences, and whether they are here; with ``places`` in which folders."""
    if rows is None:
        return quiet("looking")
    out = []
    for row in rows:
        parts = [
            (value(part["id"]), value(size(part["bytes"])), value(part["licence"]),
             _place(part, places))
            for part in row["parts"]
        ]  # fmt: skip
        title = f"<summary><b>{escape(row['name'])}</b> <span>{escape(row['line'])}</span> {_mark(row)}</summary>"
        out.append(f"<details>{title}{table(('part', 'size', 'licence', 'place'), parts)}</details>")
    return f'<div class="i2l-catalogue">{"".join(out)}</div>'


def to_download(row: Mapping[str, Any], *, places: bool) -> str:
    """What a model lacks, where that comes from and goes to (with ``places``), and a tick that agrees to its licences:
    to those of this model, so it goes with the model."""
    name, folder = escape(row["name"]), [("goes_to", value(row["download_folder"]))] if places else []
    parts = [[value(part["id"]), value(size(part["bytes"])), value(part["repo"]), value(part["licence"])]
             for part in lacking(row)]  # fmt: skip
    agree = f'<label class="i2l-agree"><input type="checkbox" name="i2l_agreed" value="{name}"> {word("agree")}</label>'
    due = [("to_download", value(size(row["download_bytes"])))] if parts else []
    told = table(("part", "size", "origin", "licence"), parts) + agree if parts else quiet("all_here")
    return f'<div data-i2l-choice="{name}">{facts([("model", value(row["name"])), *due, *folder])}{told}</div>'


def _place(part: Mapping[str, Any], places: bool) -> str:
    if places and (part["problem"] or part["path"]):
        return value(part["problem"] or part["path"])
    return word("here" if part["path"] and not part["problem"] else "not_here")


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Heads are keys of WORDS; cells are HTML."""
    head = "".join(f'<th scope="col">{word(key)}</th>' for key in heads)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="i2l-table"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Keys of WORDS, and HTML."""
    return '<dl class="i2l-facts">' + "".join(f"<div><dt>{word(k)}</dt><dd>{v}</dd></div>" for k, v in pairs) + "</dl>"


def activity(active: Sequence[Job], failed: Job | None) -> str:
    """What is at work, what waits, and what went wrong last. The script asks again while ``data-active`` is 1."""
    shown = [job for job in active if job.kind not in ("look", "models")]
    lines = "".join(map(_job, shown))
    if failed is not None:
        lines += failure(failed)
    return f'<div id="i2l_jobs" data-active="{int(bool(active))}" aria-live="polite">{lines}</div>'


def _job(job: Job) -> str:
    seen = job.view()
    cancel = (
        f'<button type="button" class="i2l-button" data-i2l="cancel" data-i2l-job="{job.id}">{word("cancel")}</button>'
    )
    head = f'<b>{word(job.kind)} {value(job.title)}</b> <em class="i2l-state">{word(job.state)}</em>'
    percent = round(100 * seen["share"], 1)
    bar = (
        f'<div class="i2l-bar" role="progressbar" aria-valuemin="0" aria-valuemax="100" aria-valuenow="{percent}" '
        f'aria-label="{escape(WORDS[job.kind])} {escape(job.title)}"><i style="width:{percent}%"></i></div>'
    )
    return (
        f'<section class="i2l-job" data-i2l-id="{job.id}"><header>{head}{cancel}</header>{bar}{_step(seen)}</section>'
    )


def _step(seen: Mapping[str, Any]) -> str:
    step, parts = seen["step"], []
    if step is not None:
        first, _, rest = step["title"].partition(" ")
        name = f"{word(STEPS[first])} {value(rest)}" if first in STEPS else value(step["title"])
        parts.append(f"{word('step')} {value('{number}/{of}'.format(**step))}: {name}")
        if total := step.get("bytes"):
            parts.append(value(f"{size(step['share'] * total)} / {size(total)}"))
        if step.get("layers"):
            parts.append(f"{value(_of(step))} {word('layers')}")
    if seen["started"]:
        parts.append(value(duration(seen["seconds"])))
    if seen["left"] is not None:
        parts.append(f"{value(duration(seen['left']))} {word('left')}")
    parts += [f"{value(title)} {word('cached')}" for title in seen["cached"]]
    return f'<p class="i2l-step">{" · ".join(parts)}</p>'


def _of(step: Mapping[str, Any]) -> str:
    return f"{round(step['share'] * step['layers'])} / {step['layers']}"


def failure(job: Job) -> str:
    """What went wrong, with the last words of the engine."""
    if job.state == "cancelled":
        return f'<section class="i2l-job"><b>{word(job.kind)} {value(job.title)}</b> <em>{word("cancelled")}</em></section>'  # noqa: E501
    hint = f"<p>{escape(job.hint)}</p>" if job.hint else ""
    tail = "\n".join(job.tail)
    last = f"<details><summary>{word('last_words')}</summary><pre>{escape(tail)}</pre></details>" if tail else ""
    head = f'<b>{word(job.kind)} {value(job.title)}</b> <em class="i2l-state">{word("failed")}</em>'
    return f'<section class="i2l-job i2l-failed"><header>{head}</header>{error(job.error or "")}{hint}{last}</section>'


def made(job: Job, in_webui: bool) -> str:
    """What came of a make."""
    r, seen = job.result, job.view()
    took = ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in r["seconds"].items())
    cached = f" · {word('cached')}: {value(len(seen['cached']))}" if seen["cached"] else ""
    prompt = escape(r["prompt"])
    buttons = button("copy", "copy", r["prompt"])
    if in_webui:
        buttons += "".join(button(f"to_{where}", "insert", r["prompt"], where) for where in ("txt2img", "img2img"))
        buttons += button("open_lora", "open", "")
    rows = facts((
        ("file", value(r["file"])), ("rank", value(r["rank"])), ("modules", value(r["modules"])),
        ("size", value(size(r["bytes"]))), ("time", f"{value(took)}{cached}"), ("dialect", value(r["dialect"])),
    ))  # fmt: skip
    drawn = _drawn(r.get("drawn"))
    return (
        f'<article class="i2l-result" data-i2l-id="{job.id}" data-i2l-made="1">'
        f'<img src="{escape(r["picture"])}" alt=""><div><h3>{value(r["name"])}</h3>{rows}'
        f'<code class="i2l-prompt">{prompt}</code><div class="i2l-buttons">{buttons}</div></div>'
        f"{drawn}{who_loads(r.get('check'), job.id)}</article>"
    )


def _drawn(uri: str | None) -> str:
    caption = f"<figcaption>{word('drawn')}</figcaption>"
    return f'<figure><img src="{escape(uri)}" alt="{escape(WORDS["drawn"])}">{caption}</figure>' if uri else ""


def button(key: str, action: str, text: str, target: str = "", named: str = "") -> str:
    return (
        f'<button type="button" class="i2l-button" data-i2l="{action}" data-i2l-text="{escape(text)}" '
        f'data-i2l-target="{escape(target)}">{word(key)}{" " + value(named) if named else ""}</button>'
    )


def who_loads(check: Mapping[str, Any] | None, job: str) -> str:
    """The table of programs, as `i2l check --json` has it of what the job made or looked into, with a button where
    there is something to mend; nothing where it is not known."""
    if not check:
        return ""
    rows = []
    for one in check["consumers"]:
        verdict = value(": ".join(filter(None, (one["status"], one["detail"]))))
        advice = f"<code>{value(one['mend'])}</code>" if one.get("mend") else ""
        mend = button("mend_for", "mend", job, one["consumer"], one["title"]) + advice if advice else ""
        rows.append([f"<b>{value(one['title'])}</b>", verdict, mend])
    caution = f"<p>{value(check['caution'])}</p>" if check["caution"] else ""
    return f"<h4>{word('who_loads')}</h4>{caution}{table(('program', 'verdict', 'mends'), rows)}"


def inspected(job: Job) -> str:
    """What came of an inspection."""
    r = job.result
    ranks = ", ".join(f"{rank} ({count})" for rank, count in r["ranks"].items())
    pairs = [("architecture", value(r["arch"])), ("dialect", value(r["dialect"])), ("modules", value(r["modules"])),
             ("rank", value(ranks)), ("dtype", value(r["dtype"])),
             ("finite", word("yes" if r["finite"] else "no") if r["finite"] is not None else value("?"))]  # fmt: skip
    if r["missing"]:
        pairs.append(("missing", value(", ".join(f"{kind}: {count}" for kind, count in r["missing"].items()))))
    if r["foreign"]:
        pairs.append(("foreign", value(f"{len(r['foreign'])}: {', '.join(r['foreign'][:4])}")))
    if r.get("maker"):
        pairs.append(("made_by", value(r["maker"])))
    plot = (
        f'<figure><img src="{escape(r["plot"])}" alt="{escape(WORDS["heat_map"])}"></figure>' if r.get("plot") else ""
    )
    return (
        f'<article class="i2l-result i2l-wide" data-i2l-id="{job.id}"><h3>{value(job.title)}</h3>{facts(pairs)}{plot}'
        f"{who_loads(r.get('check'), job.id)}</article>"
    )


def converted(job: Job) -> str:
    """What came of a conversion or a mending: the new file's name."""
    file = job.result["file"]
    return (
        f'<article class="i2l-result i2l-wide" data-i2l-id="{job.id}" data-i2l-made="1">'
        f"{word('saved_as_file')} <b>{value(file)}</b></article>"
    )


def mended(job: Job) -> str:
    """What came of a mending: a file, or for a trainer a folder."""
    return exported(job) if job.result["command"] == "export" else converted(job)


def exported(job: Job) -> str:
    """What came of an export: the folder and the command."""
    r = job.result
    folder = PurePath(r["folder"]).as_posix()
    starts = {".sh": "sh", ".yaml": "python run.py", ".py": "python"}
    command = f"{starts[PurePath(r['run']).suffix]} {shlex.quote(folder + '/' + r['run'])}"
    script = f"<summary>{word('script')}</summary><pre>{escape(r.get('said') or '')}</pre>"
    said = f"<details>{script}</details>" if r.get("said") else ""
    return (
        f'<article class="i2l-result i2l-wide" data-i2l-id="{job.id}">'
        f"{facts([('folder', value(folder)), ('kept', value(percent(r['kept']['all'])))])}<h4>{word('run_this')}</h4>"
        f'<div class="i2l-command"><code class="i2l-prompt">{escape(command)}</code>{button("copy", "copy", command)}'
        f"</div>{said}</article>"
    )


def downloaded(job: Job) -> str:
    """What came of a download."""
    return f'<p class="i2l-result i2l-wide">{word("downloaded")} <b>{value(job.title)}</b></p>'


def verified(job: Job) -> str:
    """What each part of a model was held against."""
    rows = [[value(part["id"]), value(part["found"])] for part in job.result["parts"]]
    return (
        f'<article class="i2l-result i2l-wide"><h4>{value(job.title)}</h4>{table(("part", "verified"), rows)}</article>'
    )


def doctor(job: Job) -> str:
    """The text of a bug report, to be copied."""
    text = job.result["text"]
    return f'<pre class="i2l-prompt" tabindex="0">{escape(text)}</pre>{button("copy", "copy", text)}'
