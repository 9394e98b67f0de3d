"""The configuration of a training run: YAML into frozen dataclasses, every key checked.

Errors are one line. A wrong key is answered with the nearest right one.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from i2l_ext.converters.errors import UserError


@dataclass(frozen=True)
class Schedule:
    """How long and how fast something is trained.

    ``batch`` counts samples over all processes. ``learning_rate`` is AdamW's; with a ``matrix_rate`` other than 0,
    Muon trains the matrices at that rate. ``average`` is the decay of the averaged weights that are saved in the end
    (0: save the last weights). ``clip`` is the largest gradient norm.
    """

    steps: int
    batch: int = 32
    learning_rate: float = 2e-3
    matrix_rate: float = 0.0
    warmup: int = 100
    weight_decay: float = 0.0
    average: float = 0.99
    clip: float = 1.0
    log_every: int = 50
    save_every: int = 500


@dataclass(frozen=True)
class FoundationsConfig:
    """For mini only: how its autoencoder, its base model, its encoders and the report's classifier (``judge``) are
    trained, on so many ``pictures``."""

    autoencoder: Schedule
    base: Schedule
    siglip2: Schedule
    dinov3: Schedule
    qwen_vl: Schedule
    judge: Schedule
    pictures: int = 16384


@dataclass(frozen=True)
class BaseConfig:
    """The base model that LoRAs are for. ``kind`` is ``mini`` or ``qwen-image``; for the latter ``path`` is a folder
    in diffusers' layout (transformer, text_encoder, tokenizer, vae). The encoders are those that `i2l models` shows;
    ``encoders`` has no effect."""

    kind: str = "mini"
    path: str = ""
    encoders: str = ""


@dataclass(frozen=True)
class DataConfig:
    """The pictures to learn from.

    ``world``, for mini: ``styles`` styles of its world with ``contents`` pictures each. ``folder``, for
    Qwen-Image: one folder for each style under ``path``, pictures with a caption beside each (NAME.txt); ``size`` is
    their side in training, in pixels.
    """

    kind: str = "world"
    path: str = ""
    styles: int = 4096
    contents: int = 4
    size: int = 1024


@dataclass(frozen=True)
class QueriesConfig:
    """The transformer of the kind ``queries``, and the pictures that it learns from.

    ``width``, ``depth``, ``heads`` and ``mlp`` are its sizes. A step shows ``references`` pictures of a style at most,
    as many as its random numbers say. ``grey`` is the share of samples with grey pictures, whose target has any style:
    the LoRA of grey pictures then stands for no style on the negative branch of guidance. Each target is learnt at so
    many ``timesteps``: the LoRA, which costs more here than the base does, is made once for all of them.
    """

    width: int = 96
    depth: int = 2
    heads: int = 4
    mlp: int = 192
    references: int = 4
    grey: float = 0.1
    timesteps: int = 1


@dataclass(frozen=True)
class ExpertConfig:
    """One trained part of an i2L model. ``kind``: ``direct`` or ``core`` heads, ``queries``, heads behind a transformer
    that sees the patch tokens of all references together, or ``bias``, a static LoRA.

    ``target`` is the image to learn to generate: ``pair``, another picture of the reference's style, for ``queries``
    with another content than all references; ``self``, the reference; ``base``, an image that the base generates
    without a LoRA. ``neutral`` is the share of samples whose caption describes nothing. ``compress`` and ``rank`` are
    sizes of the heads. ``view`` is the side in pixels of the picture for Qwen-VL (0: no Qwen-VL), ``middle`` the width
    to which its tokens are projected. ``even`` whitens the embeddings or tokens, except for directions below this share
    of their mean power (0: no whitening); it needs many more pictures than an embedding has numbers. The experts named
    in ``upon`` are frozen, and their LoRAs applied too.
    ``view``, ``middle`` and ``upon`` are not for ``queries``, which has the section ``queries``.
    """

    name: str
    schedule: Schedule
    kind: str = "direct"
    target: str = "pair"
    compress: int = 16
    rank: int = 4
    view: int = 0
    middle: int = 16
    neutral: float = 0.0
    even: float = 0.0
    upon: tuple[str, ...] = ()
    queries: QueriesConfig = QueriesConfig()


@dataclass(frozen=True)
class TrainingConfig:
    """A training run.

    Results are written to the folder ``output``. ``lanes`` steps run at the same time, each in a process of
    ``threads`` threads. ``precision`` is ``no``, ``bf16`` or ``fp16``, as in accelerate.
    """

    name: str
    output: str
    experts: tuple[ExpertConfig, ...]
    seed: int = 0
    lanes: int = 1
    threads: int = 1
    precision: str = "bf16"
    gradient_checkpointing: bool = False
    base: BaseConfig = field(default_factory=BaseConfig)
    data: DataConfig = field(default_factory=DataConfig)
    foundations: FoundationsConfig | None = None


CHOICES: Mapping[tuple[type, str], tuple[str, ...]] = {
    (BaseConfig, "kind"): ("mini", "qwen-image"),
    (DataConfig, "kind"): ("world", "folder"),
    (ExpertConfig, "kind"): ("direct", "core", "queries", "bias"),
    (ExpertConfig, "target"): ("pair", "self", "base"),
    (TrainingConfig, "precision"): ("no", "bf16", "fp16"),
}


def read_config(path: Path) -> TrainingConfig:
    """The configuration in a YAML file. Raises UserError, one line, for anything that is wrong in it."""
    import yaml

    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML: {error}") from None
    config = parse_config(raw)
    names = [expert.name for expert in config.experts]
    for expert in config.experts:
        if names.count(expert.name) > 1:
            raise UserError(f"experts: the name {expert.name!r} stands twice.")
        for under in expert.upon:
            if under not in names[: names.index(expert.name)]:
                raise UserError(f"{expert.name}.upon: {under!r} is none of the experts before it.")
            if config.experts[names.index(under)].kind == "queries":
                raise UserError(f"{expert.name}.upon: {under!r} is of the kind queries, which stands alone.")
        if expert.kind == "queries":
            _check_queries(expert)
    for key, folder in (("base.path", config.base.path), ("data.path", config.data.path)):
        if folder and not Path(folder).is_dir():
            raise UserError(f"{key}: the folder {folder} does not exist.")
    if config.data.kind == "folder" and not config.data.path:
        raise UserError("data.path: say which folder holds the pictures.")
    for expert in config.experts:
        if (expert.target == "base" or expert.kind == "bias") and config.data.kind != "world":
            raise UserError(f"{expert.name}: a bias can be trained for mini only; leave it out.")
    return config


def _check_queries(expert: ExpertConfig) -> None:
    """Raises UserError where the settings of an expert do not go with its kind ``queries``, or not together."""
    sizes = expert.queries
    for wrong, words in (
        (expert.view or expert.upon, "queries takes patch tokens alone: leave out view and upon."),
        (expert.target == "base", "target: 'base' is for a bias; choose pair or self."),
        (not sizes.heads or sizes.width % sizes.heads, "queries.heads: the width must be a multiple of it."),
        (not (sizes.depth and sizes.mlp), "queries: depth and mlp must be at least 1."),
        (not sizes.references, "queries.references: at least 1."),
        (not sizes.timesteps, "queries.timesteps: at least 1."),
        (sizes.grey > 1, "queries.grey: a share, 0 to 1."),
    ):
        if wrong:
            raise UserError(f"{expert.name}: {words}")


def parse_config(raw: Any) -> TrainingConfig:
    """The configuration in what YAML gives: dicts, lists and plain values. Raises UserError."""
    return _parse_value(TrainingConfig, raw, "")


def _parse_value(kind: Any, raw: Any, where: str) -> Any:
    """``raw`` as a value of the type ``kind``; ``where`` is its path in the file, for the error."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        kind = next(part for part in typing.get_args(kind) if part is not type(None))
        return None if raw is None else _parse_value(kind, raw, where)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _parse_section(kind, raw, where)
    if typing.get_origin(kind) is tuple:
        if not isinstance(raw, list):
            raise UserError(f"{where}: a list is due, not {raw!r}.")
        return tuple(_parse_value(typing.get_args(kind)[0], item, f"{where}[{n}]") for n, item in enumerate(raw))
    if kind is float and type(raw) is int:
        return float(raw)
    if type(raw) is not kind:
        hint = " (write 2.0e-3, not 2e-3)" if kind is float else ""
        raise UserError(f"{where}: a value of type {kind.__name__} is due, not {raw!r}{hint}.")
    if kind in (int, float) and raw < 0:
        raise UserError(f"{where}: {raw} is negative.")
    return raw


def _parse_section(kind: type, raw: Any, where: str) -> Any:
    if not isinstance(raw, dict):
        raise UserError(f"{where or 'the configuration'}: a section with keys is due, not {raw!r}.")
    hints = typing.get_type_hints(kind)
    prefix = f"{where}." if where else ""
    for key in raw:
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1, cutoff=0.5)
            help = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(hints)}."
            raise UserError(f"{prefix}{key}: no such key; {help}")
    for item in dataclasses.fields(kind):
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if required and item.name not in raw:
            raise UserError(f"{prefix}{item.name}: this key is missing.")
    values = {key: _parse_value(hints[key], value, f"{prefix}{key}") for key, value in raw.items()}
    for key, value in values.items():
        allowed = CHOICES.get((kind, key))
        if allowed and value not in allowed:
            raise UserError(f"{prefix}{key}: {value!r} is none of {', '.join(allowed)}.")
    return kind(**values)
