"""Which programs load a LoRA file: all of it, a part, or nothing; and what repairs it.

The rules are data. Those marked TRIED were found with each project's own loader (diffusers 0.42, DiffSynth 2.1.12,
musubi-tuner of June 2026, ai-toolkit of August 2026, ComfyUI 0.19.3, a Forge Neo 2.26 bundle). Those marked READ come
from reading its source.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from . import files, keys, spellings
from .scales import lora_file, read_scales

TRIED = "tried with its own loader"
READ = "read in its source"
ANY = "*"


@dataclass(frozen=True)
class Consumer:
    """A program that takes LoRA files, and its rules.

    ``source``: TRIED or READ. ``reads``: by model family, the dialects whose modules it loads; it cannot run a family
    that is not listed. ``untried``: families that it may run but nobody here has tried. ``wants``: the dialect to
    convert to. ``ignores_alpha``: (family, dialect) where it does not see an alpha. ``needs_alpha``: (family, dialect)
    where a module without alpha is an error. ``fixed_in``: the version in which both are repaired. ``alpha_fails``:
    why it misreads every alpha. ``lacks``: by (family, dialect), modules that it does not have, as a pattern.
    ``refuses_above``: share of unmatched tensors above which it loads nothing. ``one_rank``: groups of modules, as a
    pattern, that must have one rank (an empty pattern: all modules). ``trainer``: its name in `TRAINERS`, where
    `i2l export` repairs what conversion cannot. ``missing``: what to say of a family that is not listed.
    """

    id: str
    title: str
    source: str
    reads: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    untried: tuple[str, ...] = ()
    wants: str = "webui"
    ignores_alpha: tuple[tuple[str, str], ...] = ()
    needs_alpha: tuple[tuple[str, str], ...] = ()
    fixed_in: str | None = None
    alpha_fails: str | None = None
    lacks: Mapping[tuple[str, str], str] = field(default_factory=dict)
    refuses_above: float = 1.0
    one_rank: str | None = None
    trainer: str | None = None
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
        fixed_in="0.42",
        lacks={(Z, "kohya-fused"): _SINGLES},
        wants="diffusers",
    ),
    Consumer(
        "diffsynth",
        "DiffSynth-Studio",
        TRIED,
        {QWEN: ("webui", "diffsynth", "bare"), Z: ("webui", "diffsynth", "bare")},
        trainer="diffsynth",
    ),
    Consumer(
        "musubi-tuner",
        "musubi-tuner",
        TRIED,
        {QWEN: ("kohya",), Z: ("kohya",)},
        wants="kohya",
        ignores_alpha=((QWEN, ANY), (Z, ANY)),
        lacks={(QWEN, ANY): _SINGLES, (Z, ANY): _SINGLES + r"|.*(_modulation|_refiner)"},
        one_rank="",
        trainer="musubi-tuner",
    ),
    Consumer(
        "ai-toolkit",
        "ai-toolkit",
        TRIED,
        {QWEN: ("webui", "diffusers"), Z: ("webui", "diffusers")},
        ignores_alpha=((QWEN, ANY), (Z, ANY)),
        lacks={(QWEN, ANY): _SINGLES, (Z, ANY): r"(?!layers\.)"},
        trainer="ai-toolkit",
    ),
    Consumer(
        "flymyai",
        "flymyai-lora-trainer",
        READ,
        {QWEN: ()},
        trainer="flymyai",
        missing="it trains no such model",
    ),
    Consumer(
        "nunchaku",
        "Nunchaku",
        READ,
        {QWEN: ("webui", "diffusers", "diffsynth")},
        untried=(Z,),
        alpha_fails="alpha is divided by the rank of its fused layer",
        one_rank=r"attn\.(to|add)_[qkv]",
    ),
)


@dataclass(frozen=True)
class Repair:
    """What to do with a file so that a program loads all of it.

    ``options`` are fields of the request of that name in `i2l_ext.requests`: ``dialect`` for convert, ``rank`` for
    rank, ``trainer`` and ``rank`` for export.
    """

    operation: Literal["convert", "rank", "export"]
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Verdict:
    """What a program does with a file. ``status``: all, part, nothing, refused, ignores alpha, no model, untried;
    ``loads``: number of modules; ``detail``: why; ``repair``: what makes it "all", if anything does."""

    consumer: Consumer
    status: str
    loads: int = 0
    detail: str = ""
    repair: Repair | None = None

    def json(self) -> dict[str, object]:
        """For programs: plain values only. The repair is left out: its command belongs to the caller."""
        return {
            "consumer": self.consumer.id,
            "title": self.consumer.title,
            "status": self.status,
            "loads": self.loads,
            "detail": self.detail,
            "source": self.consumer.source,
        }


@dataclass(frozen=True)
class _Contents:
    """What is known of a file: its keys, and by module path the scale of the update and the rank."""

    reading: keys.Reading
    scales: Mapping[str, float]
    ranks: Mapping[str, int]


def check(path: Path | str) -> tuple[keys.Reading, list[Verdict]]:
    """What every program does with a LoRA file, in the order of `CONSUMERS`. Reads its header and its alphas only.

    Raises UserError where it is no LoRA of a known model.
    """
    with files.TensorFile(lora_file(path)) as file:
        reading = keys.parse_keys(file.header.shapes, file.path.name)
        scales = read_scales(file, reading).values
        ranks = {path: file.info(slot.down).shape[0] for path, slot in reading.slots.items()}
    contents = _Contents(reading, scales, ranks)
    verdicts = [_check_for(consumer, contents) for consumer in CONSUMERS]
    return reading, [_by_names(verdict) for verdict in verdicts] if reading.arch.caution else verdicts


def _by_names(verdict: Verdict) -> Verdict:
    """The same for a LoRA whose model no program has: the verdict is about its names only."""
    if not verdict.loads:
        return verdict
    return replace(verdict, detail="; ".join(filter(None, ["by names only, no model of these sizes", verdict.detail])))


def _check_for(consumer: Consumer, contents: _Contents) -> Verdict:
    """What one program does with a file."""
    reading = contents.reading
    family, slots = reading.arch.family, reading.slots
    if family in consumer.untried or family not in (QWEN, Z):
        return Verdict(consumer, "untried", detail="nobody here has tried this model with it")
    if family not in consumer.reads:
        return Verdict(consumer, "no model", detail=consumer.missing)
    if reading.networks:
        return Verdict(consumer, "untried", detail=_other_networks(reading))
    rank = max(contents.ranks.values(), default=1)
    convert = Repair("convert", {"dialect": consumer.wants})
    export = Repair("export", {"trainer": consumer.trainer, "rank": rank}) if consumer.trainer else None
    if not consumer.reads[family]:
        return Verdict(
            consumer, "nothing", detail="cannot load a LoRA itself; `i2l export` writes the code", repair=export
        )

    unread = [path for path, slot in slots.items() if not _reads(consumer, reading, path, slot)]
    lacking = [path for path, slot in slots.items() if _lacks(consumer, reading, path, slot)]
    loaded = [path for path in slots if path not in {*unread, *lacking}]
    tensors = 2 * len(slots) + len(reading.foreign) + len(reading.text_encoder)
    if 2 * len(unread) > consumer.refuses_above * tensors:
        detail = f"it does not know the names of {2 * len(unread) / tensors:.0%} of the tensors"
        return Verdict(consumer, "refused", detail=detail, repair=convert)
    no_alpha = [slot for slot in slots.values() if (family, slot.dialect) in consumer.needs_alpha and not slot.alpha]
    if no_alpha:
        detail = f"{len(no_alpha)} modules have no alpha: a KeyError{_until(consumer)}"
        return Verdict(consumer, "refused", detail=detail, repair=convert)
    if uneven := _uneven(consumer, {path: contents.ranks[path] for path in loaded}):
        repair = export or Repair("rank", {"rank": rank})
        return Verdict(consumer, "refused", detail=f"{uneven} differ in rank", repair=repair)
    if not loaded:
        return Verdict(consumer, "nothing", detail="it does not read this key format", repair=convert)
    problems = []
    if unread:
        problems.append(f"not {_counts(reading, unread)}: it does not know these names")
    if lacking:
        problems.append(f"not {_counts(reading, lacking)}: it has no such modules by default")
    wrong = _wrong_scale(consumer, contents)
    if problems:
        repair = (lacking and export) or convert
        return Verdict(consumer, "part", len(loaded), "; ".join([*problems, *wrong]), repair)
    if wrong:
        return Verdict(consumer, "ignores alpha", len(loaded), wrong[0], convert)
    return Verdict(consumer, "all", len(loaded))


def _other_networks(reading: keys.Reading) -> str:
    """What to do with a file that is no plain LoRA, before any program is asked."""
    titles = dict.fromkeys(network.title for network in reading.networks.values())
    base = " --base CHECKPOINT" if any(network.needs_base for network in reading.networks.values()) else ""
    return f"holds {', '.join(titles)}: make a plain LoRA of it first: `i2l convert FILE --rank K{base}`"


def _reads(consumer: Consumer, reading: keys.Reading, path: str, slot: keys.Slot) -> bool:
    """Whether the program knows the module by the name that it has in the file."""
    known = consumer.reads[reading.arch.family]
    if slot.dialect in known:
        return True
    # kohya's two spellings are one for a module that every implementation calls the same
    kohya = {"kohya", "kohya-fused"}
    same = path not in spellings.native_layers(reading.arch.id)
    return same and slot.dialect in kohya and bool(kohya.intersection(known))


def _lacks(consumer: Consumer, reading: keys.Reading, path: str, slot: keys.Slot) -> bool:
    """Whether the program does not have the module, whatever its name."""
    patterns = (consumer.lacks.get((reading.arch.family, dialect)) for dialect in (ANY, slot.dialect))
    return any(pattern is not None and re.match(pattern, path) for pattern in patterns)


def _uneven(consumer: Consumer, ranks: Mapping[str, int]) -> str | None:
    """The modules that must have one rank and do not, in words; else None."""
    if consumer.one_rank is None:
        return None
    groups: dict[str, set[int]] = {}
    for path, rank in ranks.items():
        found = re.search(consumer.one_rank, path)
        if found:
            group = path[: found.start()] + (found[1] if found.groups() else "") if consumer.one_rank else ""
            groups.setdefault(group, set()).add(rank)
    uneven = [group for group, group_ranks in groups.items() if len(group_ranks) > 1]
    return (f"q, k and v of {uneven[0]}" if uneven[0] else "modules") if uneven else None


def _wrong_scale(consumer: Consumer, contents: _Contents) -> list[str]:
    """What to say of scales that the program gets wrong, at most one line."""
    reading, scales = contents.reading, contents.scales
    if consumer.alpha_fails and any(slot.alpha for slot in reading.slots.values()):
        return [consumer.alpha_fails]
    errors = Counter(
        1 / scales[path]
        for path, slot in reading.slots.items()
        if scales[path] not in (0, 1)
        and {(reading.arch.family, ANY), (reading.arch.family, slot.dialect)} & set(consumer.ignores_alpha)
    )
    if not errors:
        return []
    error, count = errors.most_common(1)[0][0], errors.total()
    return [f"alpha ignored in {count} modules{_until(consumer)}: the update is {error:g} times what it should be"]


def _until(consumer: Consumer) -> str:
    return f" before version {consumer.fixed_in}" if consumer.fixed_in else ""


def _counts(reading: keys.Reading, paths: list[str]) -> str:
    """Modules by kind: ``60 attn.to_q, 60 attn.to_k and 2 kinds more``."""
    kinds = Counter(reading.arch.modules[path].kind.name for path in paths).most_common()
    shown = ", ".join(f"{count} {kind}" for kind, count in kinds[:3])
    return shown + (f" and {len(kinds) - 3} kinds more" if len(kinds) > 3 else "")


def summary(path: Path | str) -> str:
    """One line about a file that was just written: which programs load all of it, and how to see what repairs the
    rest. For a LoRA that no program can use, its architecture's caution. Raises UserError."""
    reading, verdicts = check(path)
    if reading.arch.caution:
        return reading.arch.caution
    loading = [verdict.consumer.title for verdict in verdicts if verdict.status == "all"]
    repairable = [verdict.consumer.title for verdict in verdicts if verdict.repair]
    parts = [f"loads in {', '.join(loading)}"] if loading else []
    parts += [f"for {', '.join(repairable)}: i2l check {shlex.quote(str(path))}"] if repairable else []
    return "; ".join(parts)
