"""Which programs load a LoRA file: all of it, a part, or nothing; and what repairs it.

What each program reads is data: `consumer_table`. Here it is applied to a file, and to what the file would be after a
repair, so that none is advised that does not help.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, NamedTuple

from . import consumer_table as table
from . import files, keys
from .consumer_table import CONSUMERS, Consumer, Fails, Notes, Reads, Rule
from .key_formats import KEY_FORMATS
from .scales import BESIDE, HEADER, NOWHERE, TENSORS, Scales, lora_file, read_scales
from .spellings import native_layers, spelling_of


@dataclass(frozen=True)
class Repair:
    """What to do with a file so that a program loads all of it.

    ``options`` are fields of the request of that name in `i2l_ext.requests`: ``key_format`` for convert, ``rank`` (and
    ``key_format``) for rank, ``trainer`` and ``rank`` for export.
    """

    operation: Literal["convert", "rank", "export"]
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Verdict:
    """What a program does with a file.

    ``status``: all; part; nothing; refused (with a message, an error or a picture of noise); ignores alpha (all of it,
    at another strength than the file says); wrong strength (the same for another reason); no model; untried. ``loads``:
    number of modules; ``detail``: why; ``repair``: what makes it "all", if anything does.
    """

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
            "version": self.consumer.version,
            "date": self.consumer.date,
        }


class _Look(NamedTuple):
    """What rules ask of a layer but its modules. ``names``: the kinds of its name; ``facts``: as in `Rule.has`."""

    prefix: str
    suffix: str
    names: frozenset[str]
    facts: frozenset[str]


@dataclass(frozen=True)
class _Layer:
    """A layer of a file: its first key, its look, our modules that it holds, and the number of its tensors."""

    key: str
    look: _Look
    paths: tuple[str, ...]
    tensors: int

    def has_all_in(self, modules: str) -> bool:
        """Whether all its modules fit a pattern; an empty one is for any."""
        return not modules or all(re.fullmatch(modules, path) for path in self.paths)


@dataclass(frozen=True, eq=False)
class _Contents:
    """What is known of a file: its keys, its layers, and by module path the scale of the update and the rank."""

    reading: keys.Reading
    keys: tuple[str, ...]
    layers: tuple[_Layer, ...]
    scales: Scales
    ranks: Mapping[str, int]
    _asked: dict[tuple[str, ...], bool] = field(default_factory=dict)
    _converted: dict[str, _Contents] = field(default_factory=dict)

    def has_key(self, patterns: tuple[str, ...]) -> bool:
        """Whether any key fits one of the patterns."""
        if patterns not in self._asked:
            self._asked[patterns] = any(fnmatchcase(key, pattern) for pattern in patterns for key in self.keys)
        return self._asked[patterns]

    def fits(self, rule: Rule, look: _Look) -> bool:
        """Whether a rule means layers of such a look, in some place."""
        return (
            (not rule.families or self.reading.arch.family in rule.families)
            and (not rule.prefixes or look.prefix in rule.prefixes)
            and (not rule.suffixes or any(re.fullmatch(suffix, look.suffix) for suffix in rule.suffixes))
            and (not rule.names or not look.names.isdisjoint(rule.names))
            and look.facts.issuperset(rule.has)
            and look.facts.isdisjoint(rule.lacks)
            and (not rule.if_keys or self.has_key(rule.if_keys))
            and not (rule.unless_keys and self.has_key(rule.unless_keys))
        )

    def converted(self, key_format_name: str) -> _Contents:
        """What the file will be after `i2l convert`: every module by our name, its scale in the factors."""
        if key_format_name not in self._converted:
            reading, key_format = self.reading, KEY_FORMATS[key_format_name]
            native = native_layers(reading.arch.id) if key_format.native else {}
            layers_there = dict.fromkeys(native[path].name if path in native else path for path in reading.slots)
            names = tuple(key for name in layers_there for key in key_format.keys(name) if key)
            scales = Scales(dict.fromkeys(reading.slots, 1.0), dict.fromkeys(reading.slots, NOWHERE))
            layers = tuple(_layer(layer, reading, scales) for layer in keys.layers_of(reading.arch, names))
            plain = keys.Reading(reading.arch, reading.slots, {key_format_name: len(names)})
            self._converted[key_format_name] = _Contents(plain, names, layers, scales, self.ranks)
        return self._converted[key_format_name]

    def matched(self, rules: Iterable[Rule]) -> Iterator[tuple[_Layer, list[Rule]]]:
        """Every layer with the rules that mean it, in order."""
        rules, by_look = tuple(rules), dict[_Look, list[Rule]]()
        for layer in self.layers:
            if layer.look not in by_look:
                by_look[layer.look] = [rule for rule in rules if self.fits(rule, layer.look)]
            yield layer, [rule for rule in by_look[layer.look] if layer.has_all_in(rule.modules)]


def check(path: Path | str) -> tuple[keys.Reading, list[Verdict]]:
    """What every program does with a LoRA file, in the order of `CONSUMERS`. Reads its header and its alphas only.

    Raises UserError where it is no LoRA of a known model.
    """
    with files.TensorFile(lora_file(path)) as file:
        reading = keys.parse_keys(file.header.shapes, file.path.name)
        scales = read_scales(file, reading)
        ranks = {path: file.info(slot.down).shape[0] for path, slot in reading.slots.items()}
        names = tuple(file.header.shapes)
    layers = keys.layers_of(reading.arch, names)
    contents = _Contents(reading, names, tuple(_layer(layer, reading, scales) for layer in layers), scales, ranks)
    verdicts = [_check_for(consumer, contents) for consumer in CONSUMERS]
    return reading, [_by_names(verdict) for verdict in verdicts] if reading.arch.caution else verdicts


def _layer(layer: keys.Layer, reading: keys.Reading, scales: Scales) -> _Layer:
    """A layer of a file as rules see it."""
    spelling, plain = layer.spelling, layer.name.replace(".refiner.", "_refiner.")
    other = spelling_of(reading.arch.id, plain) if plain != layer.name else None
    if spelling.exact and spelling.dotted is layer.prefix.endswith("_"):
        names = set()  # dots where underscores belong, or the reverse
    elif spelling.exact:
        names = {
            kind for kind, native in ((table.OURS, False), (table.NATIVE, True)) if spelling.native in (None, native)
        }
    else:
        names = {table.DOTTED if other and other.exact else table.ALIAS}
    paths = tuple(path for path, _ in spelling.targets)
    facts = set(layer.keys)
    told = [scales.values[path] for path in paths if scales.sources.get(path) == TENSORS]
    if "alpha" in facts and told:
        facts |= {name for name, true in (("other alpha", told[0] != 1), ("negative alpha", told[0] < 0)) if true}
    if any(HEADER in problem for problem in scales.problems):
        facts.add("false header")
    key = next(iter(layer.keys.values()))
    look = _Look(layer.prefix, layer.suffix, frozenset(names), frozenset(facts))
    return _Layer(key, look, paths, len(layer.keys))


def _by_names(verdict: Verdict) -> Verdict:
    """The same for a LoRA whose model no program has: the verdict is about its names only."""
    if not verdict.loads:
        return verdict
    return replace(verdict, detail="; ".join(filter(None, ["by names only, no model of these sizes", verdict.detail])))


def _check_for(consumer: Consumer, contents: _Contents) -> Verdict:
    """What one program does with a file, and what repairs it."""
    family = contents.reading.arch.family
    if family in consumer.uses:
        lender = next(one for one in CONSUMERS if one.id == consumer.uses[family])
        return replace(_check_for(lender, contents), consumer=consumer)
    consumer = consumer.for_family(family)
    if family in consumer.untried or family not in table.FAMILIES:
        return Verdict(consumer, "untried", detail="nobody here has tried this model with it")
    if family not in consumer.models:
        return Verdict(consumer, "no model", detail=consumer.missing)
    if contents.reading.networks:
        return Verdict(consumer, "untried", detail=_other_networks(contents.reading))
    if consumer.source == table.NOT_TRIED:
        return Verdict(consumer, "untried", detail=consumer.not_tried)
    verdict = _judge(consumer, contents)
    if verdict.status == "all":
        return verdict
    if reason := _unwritable(contents):
        return replace(verdict, detail="; ".join(filter(None, [verdict.detail, reason])))
    return replace(verdict, repair=_repair(consumer, contents))


def _judge(consumer: Consumer, contents: _Contents) -> Verdict:
    """What one program does with a file of a model that it has."""
    reading = contents.reading
    if not consumer.rules:
        return Verdict(consumer, "nothing", detail="cannot load a LoRA itself; `i2l export` writes the code")
    loaded: dict[str, list[tuple[_Layer, Reads]]] = defaultdict(list)
    notes = dict[str, None]()
    unmatched = len(reading.foreign)
    for layer, rules in contents.matched(consumer.rules):
        notes |= {rule.words: None for rule in rules if isinstance(rule, Notes)}
        rule = next((rule for rule in rules if not isinstance(rule, Notes)), None)
        if isinstance(rule, Fails):
            return Verdict(consumer, "refused", detail=f"{rule.because}: {layer.key}")
        missing = {"down", "up"} - layer.look.facts
        if not isinstance(rule, Reads):
            unmatched += layer.tensors
        elif len(missing) == 1 and missing.issubset(consumer.needs):
            return Verdict(consumer, "refused", detail=f"an error: {layer.key} has no {min(missing)} factor")
        elif not missing:
            for path in layer.paths:
                loaded[path].append((layer, rule))
    if unmatched > consumer.refuses_above * len(contents.keys):
        detail = f"it does not know the names of {unmatched / len(contents.keys):.0%} of the tensors"
        return Verdict(consumer, "refused", detail=detail)
    lacking = _lacking(consumer, reading)
    loads = {path: loaded[path] for path in reading.slots if path in loaded and path not in lacking}
    if uneven := _uneven(consumer, {path: contents.ranks[path] for path in loads}):
        return Verdict(consumer, "refused", detail=f"{uneven} differ in rank")
    unread = [path for path in reading.slots if path not in loads and path not in lacking]
    if not loads and consumer.nothing_fails and contents.has_key(consumer.nothing_fails):
        return Verdict(consumer, "refused", detail="an error: none of the names is that of a module")
    if not loads:
        detail = "it does not read this key format" if unread else "it has no such modules by default"
        detail = detail if reading.slots else "no module has both factors"
        return Verdict(consumer, "nothing", detail=detail)
    told = [
        *([f"not {_counts(reading, unread)}: it does not know these names"] if unread else []),
        *([f"not {_counts(reading, lacking)}: it has no such modules by default"] if lacking else []),
    ]
    scaled, twice = _wrong_scales(consumer, contents, loads), _twice(consumer, loads)
    status = "part" if told else "ignores alpha" if scaled else "wrong strength" if twice else "all"
    odd = [f"{len(reading.halves)} left out that have one factor only"] if reading.halves else []
    odd += [f"which of the keys of {path} counts was not tried" for path, *_ in reading.collisions[:1]]
    return Verdict(consumer, status, len(loads), "; ".join([*told, *scaled, *twice, *odd, *notes]))


def _repair(consumer: Consumer, contents: _Contents) -> Repair | None:
    """What makes a program load all of a file that it does not."""
    reading, rank = contents.reading, max(contents.ranks.values(), default=1)
    export = Repair("export", {"trainer": consumer.trainer, "rank": rank}) if consumer.trainer else None
    lacking = _lacking(consumer, reading)
    if len(lacking) == len(reading.slots):
        return None
    fused = consumer.trainer and KEY_FORMATS[consumer.wants].native  # its layers want one rank, which convert gives not
    if not consumer.rules or (export and (lacking or fused)):
        return export
    asked = replace(consumer, lacks={}, one_rank=None)  # what it has not stays out, in any key format
    read = _judge(asked, contents).status == "all"
    if not read and _judge(asked, contents.converted(consumer.wants)).status != "all":
        return None
    key_format = {} if read else {"key_format": consumer.wants}
    if _uneven(consumer, contents.ranks):
        return export or Repair("rank", {"rank": rank, **key_format})
    return Repair("convert", key_format) if key_format else None


def _unwritable(contents: _Contents) -> str | None:
    """Why `convert` and its kin cannot read a file, in words; else None."""
    reading = contents.reading
    if reading.halves:
        return "no repair: a factor is missing"
    if reading.mixed or reading.collisions:
        return f"no repair: more than one key names {(*reading.mixed, *reading.collisions)[0][0]}"
    return f"no repair as it is: {contents.scales.problems[0]}" if contents.scales.problems else None


def _other_networks(reading: keys.Reading) -> str:
    """What to do with a file that is no plain LoRA, before any program is asked."""
    titles = dict.fromkeys(network.title for network in reading.networks.values())
    base = " --base CHECKPOINT" if any(network.needs_base for network in reading.networks.values()) else ""
    return f"holds {', '.join(titles)}: make a plain LoRA of it first: `i2l convert FILE --rank K{base}`"


def _lacking(consumer: Consumer, reading: keys.Reading) -> list[str]:
    """The modules of a file that the program does not have, whatever their names."""
    pattern = consumer.lacks.get(reading.arch.family)
    return [path for path in reading.slots if pattern is not None and re.fullmatch(pattern, path)]


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


def _wrong_scales(
    consumer: Consumer, contents: _Contents, loads: Mapping[str, list[tuple[_Layer, Reads]]]
) -> list[str]:
    """What to say of scales that the program does not apply, a line for each place where they stand."""
    values, sources = contents.scales.values, contents.scales.sources
    if consumer.alpha_fails and any(sources[path] == TENSORS for path in loads):
        return [consumer.alpha_fails]
    errors: dict[str, list[float]] = defaultdict(list)
    for path, found in loads.items():
        place = sources[path]
        applied = {TENSORS: all(rule.alpha for _, rule in found), HEADER: consumer.header, BESIDE: False}
        if not applied.get(place, True) and values[path] not in (0, 1):
            errors[place].append(1 / values[path])
    words = {TENSORS: "alpha ignored", HEADER: f"scale in the {HEADER} ignored", BESIDE: f"scale in {BESIDE} ignored"}
    return [
        f"{words[place]} in {len(ratios)} modules: the update is {_span(ratios)} times what it should be"
        for place, ratios in errors.items()
    ]


def _span(ratios: Iterable[float]) -> str:
    low, high = min(ratios), max(ratios)
    return f"{low:.3g}" if f"{low:.3g}" == f"{high:.3g}" else f"{low:.3g} to {high:.3g}"


def _twice(consumer: Consumer, loads: Mapping[str, list[tuple[_Layer, Reads]]]) -> list[str]:
    """What to say of modules that are there in a fused layer and by themselves, where both count."""
    twice = [path for path, found in loads.items() if len({len(layer.paths) > 1 for layer, _ in found}) > 1]
    count = f"{len(twice)} modules are there twice, in a fused layer and alone, and count twice"
    return [count] if twice and consumer.adds_twice else []


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
