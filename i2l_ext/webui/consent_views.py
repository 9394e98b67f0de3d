"""Whose code a v2 model brings, and setting up the program through which it runs, as the page shows them."""

from __future__ import annotations

from collections.abc import Sequence

from i2l_ext.engine.job import Job
from i2l_ext.service.service import Service
from i2l_ext.webui.markup import Markup, action_button, element, facts, join, quiet_line, sized, table, value, word
from i2l_ext.webui.model_views import word_of


def show_trust(job: Job, service: Service, pane: str) -> Markup | None:
    """What would run, what shuts it in, and the button that agrees to exactly that. None for the answer itself."""
    if job.request.get("digest") or job.request.get("withdraw"):
        return None
    found = job.result
    link = element("a", found["source"], href=found["source"], target="_blank", rel="noopener noreferrer",
                   class_="i2l-value")  # fmt: skip
    pairs: list[tuple[str, object]] = [
        ("repository", value(found["repo"])), ("revision", value(found["revision"])),
        ("licence", value(found["licence"])), ("read_it", link), ("code_hash", value(found["code"])),
        ("digest", value(found["digest"])),
        ("runs_through", value(f"DiffSynth-Studio {found['diffsynth']}") if found["diffsynth"] else word("not_set_up")),
        ("cage_stops", _phrases(found["stops"])), ("cage_lets", _phrases(found["lets"]) or word("nothing_of_these")),
    ]  # fmt: skip
    hashes = table(("file", "sha256"), [(value(name), value(sha)) for name, sha in found["files"].items()])
    files = element("details", element("summary", word("all_hashes")), hashes)
    code = element("details", element("summary", word("read_code"), " ", value("model.py")),
                   element("pre", found["text"], tabindex=0, class_="i2l-code"))  # fmt: skip
    title = element("h4", word("whose_code"), " ", value(found["model"]))
    verdict = element("p", word("may_run" if found["agreed"] else "not_ours"))
    return element(
        "section",
        title,
        verdict,
        facts(*pairs),
        code,
        files,
        _buttons(job, service, pane),
        class_="i2l-offer i2l-consent",
    )


def _buttons(job: Job, service: Service, pane: str) -> Markup:
    model = job.title
    if not service.host.is_local:
        answer = element("p", word("agree_there"), " ", element("code", f"i2l models trust {model}"))
    elif job.result["agreed"]:
        answer = action_button("agree_no_longer", "withdraw", model=model, pane=pane)
    else:
        make = pane == "make"
        answer = action_button(
            "agree_and_make" if make else "agree_to_code", "agree", primary=True, token=service.consents.offer(job),
            pane=pane, make=make,
        )  # fmt: skip
    set_up = None if job.result["diffsynth"] else _set_up_button(pane)
    return element("div", answer, set_up, action_button("not_now", "close_offer", pane=pane), class_="i2l-buttons")


def _set_up_button(pane: str) -> Markup:
    return action_button("set_up_diffsynth", "plan_setup", pane=pane)


def _phrases(lines: Sequence[str]) -> Markup:
    return join([join(", " if number else None, word_of(line)) for number, line in enumerate(lines)])


def diffsynth_section(service: Service) -> Markup:
    """The place where it is set up; nothing where others reach the page."""
    if not service.host.is_local:
        return Markup()
    title = element("summary", element("b", "DiffSynth-Studio", class_="i2l-value"), " ", word("runs_v2"))
    return element("details", title, element("p", word("set_up_how")), _set_up_button("models"))


def show_setup_plan(job: Job, pane: str) -> Markup:
    """How large it is and where it goes, and the button that begins; or that it is there."""
    plan = job.result
    if plan["present"]:
        return element("div", quiet_line("is_set_up", f"DiffSynth-Studio {plan['version']}"), class_="i2l-offer")
    pairs = facts(
        ("size", sized(plan["download_bytes"])), ("on_disk", sized(plan["disk_bytes"])),
        ("goes_to", value(plan["folder"])), ("origin", value("PyPI")), ("torch_from", value(plan["origin"])),
    )  # fmt: skip
    buttons = element("div", action_button("set_up", "set_up", primary=True, pane=pane),
                      action_button("not_now", "close_offer", pane=pane), class_="i2l-buttons")  # fmt: skip
    title = element("h4", word("set_up_diffsynth"), " ", value(plan["version"]))
    return element("section", title, element("p", word("set_up_how")), pairs, buttons, class_="i2l-offer")


def show_set_up(job: Job) -> Markup:
    """That it is there now."""
    return element("p", word("is_set_up"), " ", element("b", value(f"DiffSynth-Studio {job.result['version']}")),
                   class_="i2l-result i2l-wide")  # fmt: skip
