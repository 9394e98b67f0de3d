"""What a LoRA file is: model, key format, modules, ranks, scales, values, and what made it."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import files, keys
from .architectures import Architecture
from .networks import size
from .scales import NOWHERE, lora_file, read_scales
from .text_encoders import text_layers

MAKERS = {
    r"(?m)^i2l\.": "Image-to-LoRA",
    r"(?ms)^ss_network_module=.*networks\.lora_(qwen_image|zimage).*^ss_training_started_at": "musubi-tuner",
    r"(?m)^software=.*ai-toolkit": "ai-toolkit",
    r"(?m)^ss_network_module=lycoris": "LyCORIS",
    r"(?m)^ss_(session_id|training_started_at|learning_rate)": "sd-scripts or its like",
    r"(?m)^(modelspec\.implementation=.*diffusers|lora_adapter_metadata=)": "diffusers",
}
"""Pattern on lines KEY=VALUE of the metadata, sorted -> the program that writes it."""

KEY_FORMAT_MAKERS = {
    "flymyai": "flymyai-lora-trainer, another script of diffusers",
    "diffusers": "diffusers, a trainer built on it",
    "diffsynth": "DiffSynth-Studio",
    "kohya": "musubi-tuner",
    "peft": "PEFT",
    "lycoris": "LyCORIS",
}
"""Key format -> the programs that write it, where the metadata do not say: any converter may have, too."""


@dataclass(frozen=True)
class Inspection:
    """What a file holds.

    ``reading``: of its keys; ``ranks``, ``alphas`` (of tensors) and ``scales``: value -> number of modules;
    ``scale_sources``: where the scales stand -> number of modules; ``scale_problems``: why they are not to be relied
    on; ``dtypes``: -> number of keys; ``missing``: modules that the i2L models write and the file does not have;
    ``not_finite``: names of tensors with NaN or infinity, None where the values were not read; ``bytes``: size of the
    file. Of other networks the ranks are those of their exact factors; of a DoRA, that of the LoRA in it.
    """

    name: str
    reading: keys.Reading
    ranks: Mapping[int, int]
    alphas: Mapping[float | None, int]
    scales: Mapping[float, int]
    scale_sources: Mapping[str, int]
    scale_problems: tuple[str, ...]
    dtypes: Mapping[str, int]
    missing: tuple[str, ...]
    not_finite: tuple[str, ...] | None
    bytes: int
    maker: str | None
    metadata: Mapping[str, str] = field(repr=False)

    @property
    def arch(self) -> Architecture:
        return self.reading.arch

    @property
    def kinds_of_network(self) -> dict[str, int]:
        """Kind of network, such as LoRA or LoKr -> number of modules."""
        networks = self.reading.networks
        return _counted(networks[path].title if path in networks else "LoRA" for path in self.reading.modules)

    @property
    def text_encoders(self) -> tuple[dict[str, int], list[str]]:
        """Text encoder, such as CLIP-L -> number of its layers; and their keys that belong to no known layer."""
        layers, rest = text_layers(self.arch.id, self.reading.text_encoder)
        return _counted(layer.encoder.title for layer in layers), rest

    @property
    def problems(self) -> list[str]:
        """Why `i2l convert` refuses the file, and what other programs may fail on, a line each."""
        wrong = [alpha for alpha in self.alphas if alpha is not None and (not alpha or not math.isfinite(alpha))]
        reading = self.reading
        fp8 = [dtype for dtype in self.dtypes if dtype.startswith("F8")]
        return [
            *(f"alpha is {alpha:g} in {self.alphas[alpha]} modules: they do nothing or harm" for alpha in wrong),
            *(self.scale_problems if not wrong else ()),
            *(f"{path} has only one of its two factors" for path in reading.halves[:3]),
            *(f"{path} holds {kinds}: one network a module is read" for path, kinds in reading.mixed[:3]),
            *(
                f"two keys name the module {path}: {first!r} and {second!r}"
                for path, first, second in reading.collisions[:3]
            ),
            *(
                [f"NaN or infinity in {len(self.not_finite)} tensors, first {self.not_finite[0]}"]
                if self.not_finite
                else []
            ),
            *(["fp8 factors: most programs refuse them; --dtype fp32 on convert widens them"] if fp8 else []),
            *(
                [f"several key formats in one file: {_list(reading.key_formats)}"]
                if len(reading.key_formats) > 1
                else []
            ),
            *([f"{len(reading.biases)} bias differences: a LoRA has none"] if reading.biases else []),
            *self._other_networks(),
        ]

    def _other_networks(self) -> Iterator[str]:
        for title in dict.fromkeys(network.title for network in self.reading.networks.values()):
            base = " --base CHECKPOINT" if "DoRA" in title else ""
            yield f"{title} in {self.kinds_of_network[title]} modules: `i2l convert --rank K{base}` makes a plain LoRA"

    @property
    def finite(self) -> bool | None:
        return None if self.not_finite is None else not self.not_finite

    @property
    def key_format(self) -> str:
        """The name of the key format: "mixed" if there are several, "other" if it has no name."""
        return self.reading.key_format

    def json(self) -> dict[str, object]:
        """For programs: plain values only."""
        reading = self.reading
        return {
            "file": self.name,
            "arch": self.arch.id,
            "key_format": reading.key_format,
            "key_formats": dict(reading.key_formats),
            "modules": len(reading.modules),
            "networks": self.kinds_of_network,
            "kinds": _kinds(self.arch, reading.modules),
            "ranks": {str(rank): count for rank, count in self.ranks.items()},
            "alphas": {"none" if alpha is None else f"{alpha:g}": count for alpha, count in self.alphas.items()},
            "scales": {f"{scale:g}": count for scale, count in self.scales.items()},
            "scale_sources": dict(self.scale_sources),
            "dtype": next(iter(self.dtypes)) if len(self.dtypes) == 1 else "mixed",
            "dtypes": dict(self.dtypes),
            "finite": self.finite,
            "not_finite": list(self.not_finite or ()),
            "missing": _kinds(self.arch, self.missing),
            "halves": list(reading.halves),
            "doubled": list(reading.doubled),
            "stray_alphas": list(reading.stray_alphas),
            "foreign": list(reading.foreign),
            "text_encoder": list(reading.text_encoder),
            "text_encoders": self.text_encoders[0],
            "biases": list(reading.biases),
            "bytes": self.bytes,
            "problems": self.problems,
            "maker": self.maker,
            "metadata": dict(self.metadata),
        }


def inspect(path: Path | str, *, values: bool = True) -> Inspection:
    """What a LoRA file holds; ``values``: also check whether they are all finite. Does not need torch.

    Raises UserError where it is not a LoRA of a known model.
    """
    with files.TensorFile(lora_file(path)) as file:
        header = file.header
        reading = keys.parse_keys(header.shapes, file.path.name)
        slots, modules = reading.slots, {*reading.modules}
        scales = read_scales(file, reading)
        others = [network for path, network in reading.networks.items() if path not in slots]
        alphas = [slot.alpha for slot in slots.values()] + [network.keys.get("alpha") for network in others]
        ranks = [file.info(slot.down).shape[0] for slot in slots.values()]
        ranks += [size(network.kind, network.shapes(header.shapes))[2] for network in others]
        factors = dict.fromkeys(name for slot in slots.values() for name in (slot.down, slot.up))
        for network in reading.networks.values():
            factors |= dict.fromkeys(key for part, key in network.keys.items() if part != "alpha")
        return Inspection(
            name=file.path.name,
            reading=reading,
            ranks=_counted(ranks),
            alphas=_counted(file.number(key) if key else None for key in alphas),
            scales=_counted(scales.values.values()),
            scale_sources=_counted(scales.sources.values()),
            scale_problems=scales.problems,
            dtypes=_counted(file.info(name).dtype for name in factors),
            missing=tuple(path for path in reading.arch.i2l_modules if path not in modules),
            not_finite=tuple(name for name in factors if not _finite(file, name)) if values else None,
            bytes=header.data_start + sum(entry.nbytes for entry in header.tensors.values()),
            maker=_maker(header.metadata, reading),
            metadata=header.metadata,
        )


def _counted(values: Iterable) -> dict:
    return dict(Counter(values).most_common())


def _finite(file: files.TensorFile, name: str) -> bool:
    dtype = file.info(name).dtype
    return dtype in files.FLOAT_LIMITS and all(files.all_finite(piece, dtype) for piece in file.chunks(name))


def _maker(metadata: Mapping[str, str], reading: keys.Reading) -> str | None:
    lines = "\n".join(f"{key}={value}" for key, value in sorted(metadata.items()))
    for mark, maker in MAKERS.items():
        if re.search(mark, lines):
            return maker
    makers = KEY_FORMAT_MAKERS.get(reading.key_format)
    return f"{makers} or a converter" if makers else None


def _kinds(arch: Architecture, paths: Iterable[str]) -> dict[str, int]:
    return _counted(arch.modules[path].kind.name for path in paths)


def report_lines(found: Inspection) -> list[str]:
    """The report for a person, line by line."""
    arch, reading = found.arch, found.reading
    total = Counter(module.kind.name for module in arch.modules.values())
    told = {
        "model": f"{arch.title}, by names and shapes",
        "keys": _list(reading.key_formats) if len(reading.key_formats) > 1 else reading.key_format,
        "network": _list(found.kinds_of_network),
        "modules": f"{len(reading.modules)}; the model has {len(arch.modules)}, "
        f"i2L writes {len(arch.i2l_modules)} of them",
        "ranks": _list(found.ranks),
        "alpha": _list({"none" if alpha is None else f"{alpha:g}": count for alpha, count in found.alphas.items()}),
        "scale": _scale_line(found),
        "dtype": _list(found.dtypes),
        "values": {None: "not read", True: "all finite", False: "not finite"}[found.finite],
        "size": f"{found.bytes / 1e6:.1f} MB",
        "made by": found.maker or "unknown",
    }
    encoders, unknown = found.text_encoders
    if encoders:
        told["text enc."] = "layers of " + ", ".join(f"{title} ({count})" for title, count in encoders.items())
    for label, names in (
        ("half", reading.halves),
        ("doubled", reading.doubled),
        ("no factors", reading.stray_alphas),
        ("foreign", reading.foreign),
        ("text keys", unknown),
        ("biases", reading.biases),
    ):
        if names:
            told[label] = f"{len(names)}: {', '.join(names[:3])}{', …' if len(names) > 3 else ''}"
    report = [found.name, *(f"  {label:<10}{text}" for label, text in told.items())]
    report += [*(f"  problem   {problem}" for problem in found.problems), ""]
    have = _kinds(arch, reading.modules)
    missing: dict[str, list[str]] = {}
    for path in found.missing:
        missing.setdefault(arch.modules[path].kind.name, []).append(path)
    report.append(f"  {'kind':<44}{'here':>5}{'of':>5}  missing")
    for kind, count in total.items():
        if kind in have or kind in missing:
            report.append(
                f"  {kind:<44}{have.get(kind, 0):>5}{count:>5}  {_named(missing.get(kind, []), kind)}".rstrip()
            )
    shown = [f"  {key}: {value[:90]}{'…' if len(value) > 90 else ''}" for key, value in found.metadata.items()]
    return [*report, *(["", "  metadata", *shown] if shown else [])]


def _scale_line(found: Inspection) -> str:
    """The scales, and where they stand: ``0.25 (from alpha tensors)``."""
    scales = _list({f"{scale:g}": count for scale, count in found.scales.items()})
    told = {source: count for source, count in found.scale_sources.items() if source != NOWHERE}
    if not told:
        beside = "; PEFT has it in adapter_config.json, which is not here" if found.reading.key_format == "peft" else ""
        return f"{scales} (the file says none{beside})"
    return f"{scales} (from {_list(found.scale_sources)})"


def _named(paths: list[str], kind: str) -> str:
    """How many and, while that is short, where: ``2: layers.0, layers.7``."""
    where = ", ".join(path.removesuffix(kind).rstrip(".") for path in paths)
    return f"{len(paths)}: {where}" if paths and len(where) < 60 else f"{len(paths) or ''}"


def _list(counts: Mapping[Any, int]) -> str:
    """``a`` where there is one, ``a (3), b (2)`` where there are several."""
    if len(counts) == 1:
        return str(next(iter(counts)))
    shown = [f"{value} ({count})" for value, count in list(counts.items())[:6]]
    return ", ".join(shown) + (f", and {len(counts) - 6} more" if len(counts) > 6 else "")
