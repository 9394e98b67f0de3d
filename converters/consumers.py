"""Who loads what: the programs that take a LoRA, what each makes of a file, and the command that mends it.

The rules are data. Those marked TRIED were found with each project's own loader (diffusers 0.42, DiffSynth 2.1.12,
musubi-tuner of June 2026, ai-toolkit of August 2026, ComfyUI 0.19.3, a Forge Neo 2.26 bundle); those marked READ by
reading its source.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from . import dialects, files
from .lora import scale

TRIED = "tried with its own loader"
READ = "read in its source"
ANY = "*"


@dataclass(frozen=True)
class Consumer:
    """A program and its rules.

    ``reads``: by family of models, the dialects whose modules it loads; a family that is not there it cannot run.
    ``untried``: families that it may run but nobody here has tried. ``wants``: the dialect to convert to.
    ``ignores_alpha``, ``needs_alpha``: (family, dialect) where an alpha is not seen, and where a module without one is
    an error; ``mended_in``: the version that does better. ``alpha_fails``: why any alpha at all is misread.
    ``lacks``: by (family, dialect), modules that it has no place for, as a pattern. ``refuses_above``: share of
    unmatched tensors above which it takes nothing. ``uniform``: groups of kinds, as a pattern, that must have one rank
    (an empty pattern: all modules). ``export``: the trainer's name for `i2l export`, where that mends it.
    """

    id: str
    title: str
    source: str
    reads: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    untried: tuple[str, ...] = ()
    wants: str = "webui"
    ignores_alpha: tuple[tuple[str, str], ...] = ()
    needs_alpha: tuple[tuple[str, str], ...] = ()
    mended_in: str | None = None
    alpha_fails: str | None = None
    lacks: Mapping[tuple[str, str], str] = field(default_factory=dict)
    refuses_above: float = 1.0
    uniform: str | None = None
    export: str | None = None
    missing: str = "it has no such model; it only lists the file"


QWEN, Z = "qwen-image", "z-image"
_SINGLES = r"(?!transformer_blocks\.|layers\.|context_refiner\.|noise_refiner\.)"
_COMFY = ("webui", "diffusers", "diffsynth", "bare", "flymyai", "lycoris")

CONSUMERS: tuple[Consumer, ...] = (
    Consumer(
        "forge-neo",
        "Forge Neo",
        TRIED,
        {QWEN: ("webui", "kohya", "diffusers", "diffsynth"), Z: ("webui", "kohya-fused", "diffusers", "diffsynth")},
        refuses_above=0.5,
    ),
    Consumer("comfyui", "ComfyUI", TRIED, {QWEN: (*_COMFY, "kohya"), Z: (*_COMFY, "kohya-fused")}),
    Consumer("forge", "Forge (lllyasviel)", TRIED),
    Consumer("a1111", "AUTOMATIC1111", TRIED),
    Consumer(
        "diffusers",
        "diffusers",
        TRIED,
        {
            QWEN: ("webui", "kohya", "diffusers", "diffsynth", "flymyai"),
            Z: ("webui", "kohya", "diffusers", "diffsynth", "flymyai", "kohya-fused"),
        },
        ignores_alpha=tuple((QWEN, dialect) for dialect in ("webui", "diffusers", "diffsynth", "flymyai")),
        needs_alpha=((QWEN, "kohya"),),
        mended_in="0.42",
        lacks={(Z, "kohya-fused"): _SINGLES},
        wants="diffusers",
    ),
    Consumer(
        "diffsynth",
        "DiffSynth-Studio",
        TRIED,
        {QWEN: ("webui", "diffsynth", "bare"), Z: ("webui", "diffsynth", "bare")},
        export="diffsynth",
    ),
    Consumer(
        "musubi-tuner",
        "musubi-tuner",
        TRIED,
        {QWEN: ("kohya",), Z: ("kohya",)},
        wants="kohya",
        ignores_alpha=((QWEN, ANY), (Z, ANY)),
        lacks={(QWEN, ANY): _SINGLES, (Z, ANY): _SINGLES + r"|.*(_modulation|_refiner)"},
        uniform="",
        export="musubi-tuner",
    ),
    Consumer(
        "ai-toolkit",
        "ai-toolkit",
        TRIED,
        {QWEN: ("webui", "diffusers"), Z: ("webui", "diffusers")},
        ignores_alpha=((QWEN, ANY), (Z, ANY)),
        lacks={(QWEN, ANY): _SINGLES, (Z, ANY): r"(?!layers\.)"},
        export="ai-toolkit",
    ),
    Consumer(
        "flymyai",
        "flymyai-lora-trainer",
        READ,
        {QWEN: ()},
        export="flymyai",
        missing="it trains no such model",
    ),
    Consumer(
        "nunchaku",
        "Nunchaku",
        READ,
        {QWEN: ("webui", "diffusers", "diffsynth")},
        untried=(Z,),
        alpha_fails="alpha is divided by the rank of its fused layer",
        uniform=r"attn\.(to|add)_[qkv]",
    ),
)


@dataclass(frozen=True)
class Verdict:
    """What a consumer makes of a file. ``status``: all, part, nothing, refused, ignores alpha, no model, untried;
    ``loads``: modules; ``mend``: the command that makes it "all", where there is one."""

    consumer: Consumer
    status: str
    loads: int
    detail: str = ""
    mend: str | None = None

    def json(self) -> dict[str, object]:
        return {
            "consumer": self.consumer.id,
            "title": self.consumer.title,
            "status": self.status,
            "loads": self.loads,
            "detail": self.detail,
            "mend": self.mend,
            "source": self.consumer.source,
        }


def check(path: Path | str) -> tuple[dialects.Reading, list[Verdict]]:
    """What every consumer makes of a LoRA file, told from its header and its alphas. Raises UserError."""
    with files.TensorFile(path) as file:
        reading = dialects.parse(file.header.shapes, file.path.name)
        scales = {path: scale(file, slot) for path, slot in reading.slots.items()}
        ranks = {path: file.entry(slot.down).shape[0] for path, slot in reading.slots.items()}
    verdicts = [judge(consumer, reading, scales, ranks, str(path)) for consumer in CONSUMERS]
    return reading, [_by_names(verdict) for verdict in verdicts] if reading.arch.caution else verdicts


def _by_names(verdict: Verdict) -> Verdict:
    """The same of a LoRA whose model no program has: what it says holds for the names alone."""
    if not verdict.loads:
        return verdict
    return replace(verdict, detail="; ".join(filter(None, ["by names only, no model of these sizes", verdict.detail])))


def judge(
    consumer: Consumer,
    reading: dialects.Reading,
    scales: Mapping[str, float],
    ranks: Mapping[str, int],
    name: str,
) -> Verdict:
    """What ``consumer`` makes of a file of which the keys, the scales and the ranks by module are known."""
    family = reading.arch.family
    if family in consumer.untried:
        return Verdict(consumer, "untried", 0, "nobody here has tried this model with it")
    if family not in consumer.reads:
        return Verdict(consumer, "no model", 0, consumer.missing)
    total = len(reading.slots)
    name, rank = shlex.quote(name), max(ranks.values(), default=1)
    convert = f"i2l convert {name} --to {consumer.wants}"
    export = f"i2l export {name} --for {consumer.export} --rank {rank} -o FOLDER" if consumer.export else None
    if not consumer.reads[family]:
        return Verdict(consumer, "nothing", 0, "it loads no LoRA; a few lines do it", export)

    unread = [path for path, slot in reading.slots.items() if not _reads(consumer, reading, path, slot)]
    no_place = _no_place(consumer, reading)
    skipped = {*unread, *no_place}
    loads = total - len(skipped)
    tensors = 2 * total + len(reading.foreign) + len(reading.text_encoder)
    if 2 * len(unread) > consumer.refuses_above * tensors:
        share = f"{2 * len(unread) / tensors:.0%} of the tensors have no name that it knows"
        return Verdict(consumer, "refused", 0, share, convert)
    alphaless = [s for s in reading.slots.values() if (family, s.dialect) in consumer.needs_alpha and not s.alpha]
    if alphaless:
        detail = f"{len(alphaless)} modules have no alpha: a KeyError{_until(consumer)}"
        return Verdict(consumer, "refused", 0, detail, convert)
    if uneven := _uneven(consumer, {path: ranks[path] for path in reading.slots if path not in skipped}):
        return Verdict(consumer, "refused", 0, f"{uneven} differ in rank", export or f"i2l rank {name} --rank {rank}")
    if not loads:
        return Verdict(consumer, "nothing", 0, f"no name in the dialect {reading.dialect} is known to it", convert)
    problems = []
    if unread:
        problems.append(f"not {_which(reading, unread)}: names unknown to it")
    if no_place:
        problems.append(f"not {_which(reading, no_place)}: it has no place for them by default")
    wrong = _wrong_scale(consumer, reading, scales)
    if problems:
        return Verdict(consumer, "part", loads, "; ".join([*problems, *wrong]), (no_place and export) or convert)
    if wrong:
        return Verdict(consumer, "ignores alpha", loads, wrong[0], convert)
    return Verdict(consumer, "all", loads)


def _reads(consumer: Consumer, reading: dialects.Reading, path: str, slot: dialects.Slot) -> bool:
    known = consumer.reads[reading.arch.family]
    if slot.dialect in known:
        return True
    # kohya's two spellings are one for a module that every implementation calls the same
    kohya = {"kohya", "kohya-fused"}
    same = path not in dialects.native_layers(reading.arch.id)
    return same and slot.dialect in kohya and bool(kohya.intersection(known))


def _no_place(consumer: Consumer, reading: dialects.Reading) -> list[str]:
    def lacks(path: str, dialect: str) -> bool:
        pattern = consumer.lacks.get((reading.arch.family, dialect))
        return pattern is not None and re.match(pattern, path) is not None

    return [path for path, slot in reading.slots.items() if lacks(path, ANY) or lacks(path, slot.dialect)]


def _uneven(consumer: Consumer, ranks: Mapping[str, int]) -> str | None:
    """The modules that the consumer wants of one rank and that are not, or None."""
    if consumer.uniform is None:
        return None
    groups: dict[str, set[int]] = {}
    for path, rank in ranks.items():
        found = re.search(consumer.uniform, path)
        if found:
            group = path[: found.start()] + (found[1] if found.groups() else "") if consumer.uniform else ""
            groups.setdefault(group, set()).add(rank)
    uneven = [group for group, seen in groups.items() if len(seen) > 1]
    return (f"q, k and v of {uneven[0]}" if uneven[0] else "modules") if uneven else None


def _wrong_scale(consumer: Consumer, reading: dialects.Reading, scales: Mapping[str, float]) -> list[str]:
    """What is said of scales that the consumer gets wrong, at most one line."""
    if consumer.alpha_fails and any(slot.alpha for slot in reading.slots.values()):
        return [consumer.alpha_fails]
    factors = Counter(
        1 / scales[path]
        for path, slot in reading.slots.items()
        if scales[path] != 1
        and {(reading.arch.family, ANY), (reading.arch.family, slot.dialect)} & set(consumer.ignores_alpha)
    )
    if not factors:
        return []
    factor = factors.most_common(1)[0][0]
    count = sum(factors.values())
    return [f"alpha ignored in {count} modules{_until(consumer)}: the update is {factor:g} times what it should be"]


def _until(consumer: Consumer) -> str:
    return f" before version {consumer.mended_in}" if consumer.mended_in else ""


def _which(reading: dialects.Reading, paths: list[str]) -> str:
    """Modules by kind: ``60 attn.to_q, 60 attn.to_k, and 2 kinds more``."""
    kinds = Counter(reading.arch.modules[path].kind.name for path in paths).most_common()
    shown = ", ".join(f"{count} {kind}" for kind, count in kinds[:3])
    return shown + (f" and {len(kinds) - 3} kinds more" if len(kinds) > 3 else "")


def summary(path: Path | str) -> str:
    """One line for a file that was just written: who loads all of it and who has to be helped, or what must be known
    before that."""
    reading, verdicts = check(path)
    if reading.arch.caution:
        return reading.arch.caution
    whole = [verdict.consumer.title for verdict in verdicts if verdict.status == "all"]
    helped = [verdict.consumer.title for verdict in verdicts if verdict.mend]
    parts = [f"loads in {', '.join(whole)}"] if whole else []
    parts += [f"for {', '.join(helped)}: i2l check {shlex.quote(str(path))}"] if helped else []
    return "; ".join(parts)


def lines(verdicts: list[Verdict], modules: int) -> list[str]:
    """The table for a person."""
    report = [f"  {'program':<22}{'loads':<15}{'modules':>9}  why, and what mends it"]
    for verdict in verdicts:
        count = f"{verdict.loads}/{modules}" if verdict.status not in ("no model", "untried") else "-"
        report.append(f"  {verdict.consumer.title:<22}{verdict.status:<15}{count:>9}  {verdict.detail}".rstrip())
        if verdict.mend:
            report.append(f"  {'':<46}  -> {verdict.mend}")
    return report
