"""What every trainer's file describes: which modules it trains, which key format it reads, and how it is started."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from ..architectures import Architecture
from ..errors import UserError

TODO = "path/to"
"""What begins a path that the user has to fill in: train.py starts nothing while one is left."""

STEPS = 2000
"""Pictures that a written run shows in all, one a step: each is repeated until that is reached."""

SAVES = 16
"""LoRAs that a run saves on its way and keeps: it begins with the style, so an early one may be the best."""

SAVE_STEPS = STEPS // SAVES

PICTURES = 8
"""That are reckoned with where they are not known."""

SIDE = 1024
"""Pixels. Pictures are trained at the area of a square of this side, each in its own shape."""

quoted: Callable[[str], str] = partial(json.dumps, ensure_ascii=False)
"""A text from outside as it is written into YAML, TOML or JSON, where it has no control characters. (YAML does not join
the two halves of an escaped emoji.) In Python it is its ``repr``."""

BASE_REPOS = {
    "qwen-image": "Qwen/Qwen-Image",
    "z-image": "Tongyi-MAI/Z-Image",
    "flux2-klein-4b": "black-forest-labs/FLUX.2-klein-base-4B",
    "flux2-klein-9b": "black-forest-labs/FLUX.2-klein-base-9B",
    "flux2-dev": "black-forest-labs/FLUX.2-dev",
    "hidream-o1": "HiDream-ai/HiDream-O1-Image",
}
"""Id or family of an architecture -> the repository of its base model on Hugging Face and ModelScope, as diffusers
keeps it."""


def base_repo(arch: Architecture) -> str:
    """The repository of the base model to train on. The miniature's is that of its family."""
    return BASE_REPOS.get(arch.id) or BASE_REPOS[arch.family]


FRESH_ROWS: Mapping[str, Callable[[int, int], float]] = {
    "kaiming": lambda d_in, rank: 1 / math.sqrt(3),
    "gaussian": lambda d_in, rank: math.sqrt(d_in) / rank,
}
"""How a trainer draws the down factor of a fresh LoRA -> the norm that a row of it has on average. Kaiming's is
U(-1/sqrt(d_in), 1/sqrt(d_in)), PEFT's default; PEFT's gaussian has the standard deviation 1/rank."""

BASE_PLACES = ("DIT", "VAE", "TE")
"""Names at the top of a train.py of the parts of the base model."""

NO_TRAINER = "This LoRA is of {}, the test model: no trainer has it. The folder only shows what a start looks like."

UNWRITABLE = ("Cc", "Cs", "Zl", "Zp")
"""Kinds of characters that no path may have: control codes, bytes that are no UTF-8, breaks of lines and paragraphs."""

NONCHARACTERS = "\ufffe\uffff"
"""What YAML refuses besides."""


def _to_fill_in(path: str) -> bool:
    return path.startswith(f"{TODO}/")


@dataclass(frozen=True)
class Dataset:
    """The pictures of a training run: JPEG and PNG files ``names`` in ``folder`` (absolute). ``captions``: the prompts
    of those that have their own; ``caption``: what the prompt of the others is, a trigger word, or "" for none. Without
    ``names`` the user is to fill the folder in."""

    folder: Path = Path(TODO, "dataset")
    names: tuple[str, ...] = ()
    caption: str = ""
    captions: Mapping[str, str] = field(default_factory=dict)

    def prompt(self, name: str) -> str:
        """Of the picture ``name``."""
        return self.captions.get(name, self.caption)

    def sample_prompts(self) -> list[str]:
        """To look at a run on its way: the prompts of two pictures at most, and something that none of them need
        show."""
        own = dict.fromkeys(filter(None, map(self.prompt, self.names)))
        other = ", ".join(filter(None, [self.caption, "a lighthouse by the sea"]))
        return [*list(own)[:2], other]

    def repeats(self, epochs: int) -> int:
        """How often each picture is to be shown in one of ``epochs``, so that all make about `STEPS`."""
        return max(1, round(STEPS / (epochs * (len(self.names) or PICTURES))))

    def repeats_comment(self, epochs: int) -> str:
        """What to write behind that number where the pictures are not known."""
        return "" if self.names else f"  # for {PICTURES} pictures: {STEPS} steps / ({epochs} epochs x your pictures)"


@dataclass(frozen=True)
class TrainingStart:
    """The start of a training run: what a trainer's texts are made of.

    ``init``: absolute path of the LoRA to start from; ``name``: a run name that no earlier run has had; ``paths``: the
    modules in that LoRA. ``bases``: where files of the base model were found: ``folder`` (as diffusers keeps it),
    ``transformer``, ``vae``, ``text_encoder`` (a file, or the first of its shards). ``learning_rate``: as
    `ModelSupport` gives it. ``filled_in``: NAME -> path at the top of the train.py that stood there. Raises UserError
    where a path or text has a control character, which would end a comment.
    """

    arch: Architecture
    init: Path
    name: str
    rank: int
    seed: int
    paths: tuple[str, ...]
    dataset: Dataset = Dataset()
    bases: Mapping[str, Path] = field(default_factory=dict)
    learning_rate: float = 3.3e-5
    filled_in: Mapping[str, str] = field(default_factory=dict)

    def place(self, name: str, path: str) -> str:
        """The path at the top of train.py that is called ``name``: what a user had filled in there, unless ``path`` is
        of the start folder itself, or is known now and the old one is gone."""
        old = self.filled_in.get(name, TODO)
        ours = Path(path).is_relative_to(self.init.parent)
        return path if old.startswith(TODO) or ours or not (_to_fill_in(path) or Path(old).exists()) else old

    @property
    def obstacle(self) -> str:
        """Why nothing can be trained from it; "" where it can."""
        return NO_TRAINER.format(self.arch.id) if self.arch.caution else ""

    @property
    def model(self) -> str:
        """The base model for a trainer that reads a folder of diffusers: where it lies, else its repository, from which
        the trainer downloads it."""
        home = self.bases.get("folder")
        return home.as_posix() if home else base_repo(self.arch)

    def base(self, part: str, name: str) -> str:
        """Where a part of the base model lies; else a place to fill in, called ``name``."""
        return (self.bases.get(part) or Path(TODO, name)).as_posix()

    def beside(self, name: str) -> str:
        """The path of a file in the start folder."""
        return (self.init.parent / name).as_posix()

    @property
    def kinds(self) -> list[str]:
        """The kinds of layers in the LoRA, in the order of the model."""
        return list(dict.fromkeys(self.arch.modules[path].kind.name for path in self.paths))

    def __post_init__(self) -> None:
        found = [path.as_posix() for path in self.bases.values()]
        for text in (self.init.as_posix(), self.name, self.dataset.caption, *found):
            if any(unicodedata.category(char) in UNWRITABLE or char in NONCHARACTERS for char in text):
                raise UserError(f"{text!r} has a line break or another control character in it. Rename it.")


@dataclass(frozen=True)
class ModelSupport:
    """How a trainer trains one family of models.

    ``default``: the modules that it trains by default, as a pattern of the whole path; ``trainable``: those that it can
    train. ``fused``: it has the layers of the model's first implementation, so all paths are those of
    `Architecture.fused`. ``files``: makes the texts that start it, {file name: text}; ``trained``: the paths of the
    modules that those texts make it train, which may be more than the LoRA has. ``fresh_rate``: a usual learning
    rate of a fresh LoRA there.
    """

    default: str
    trainable: str
    files: Callable[[TrainingStart], Mapping[str, str]]
    trained: Callable[[TrainingStart], list[str]]
    fused: bool = False
    fresh_rate: float = 1e-4

    @property
    def learning_rate(self) -> float:
        """To begin with from an i2L LoRA: a third of that of a fresh one (docs/claims.md, rows `start`)."""
        return float(f"{self.fresh_rate / 3:.1e}")


@dataclass(frozen=True)
class Trainer:
    """A trainer. ``key_format``: that it reads; ``models``: by model family; ``notes``: lines for the read-me.
    ``usage``: what is to be done with train.py, for the read-me, where ``{start}`` stands for the whole command and
    ``{name}`` for the run's name; ``fresh_rows``: how it starts a fresh LoRA, a key of `FRESH_ROWS`. ``rate_place``:
    in which written file its learning rate stands, and under what name. ``captions``: whether it reads the prompt of a
    picture from a text file beside it; ``downloads``: whether it fetches a base model that is not here; ``memory``:
    family -> what of a card its authors say that training takes, as in docs/trainers.md. ``home``: a file or folder
    that its own folder has; ``results``: where in there a run writes LoRAs, in the key format that it reads, as a
    pattern of paths with ``{name}`` for the run's name."""

    id: str
    title: str
    key_format: str
    models: Mapping[str, ModelSupport]
    notes: tuple[str, ...] = ()
    usage: str = "in the trainer's own folder, `{start}` starts the run, which is called `{name}`."
    fresh_rows: str = "kaiming"
    rate_place: tuple[str, str] = ("train.py", "--learning_rate")
    captions: bool = True
    downloads: bool = True
    memory: Mapping[str, str] = field(default_factory=dict)
    home: str = ""
    results: str = ""

    def key_format_for(self, arch: Architecture) -> str:
        """The key format that it reads of a model that it trains."""
        return f"{self.key_format}-fused" if self.models[arch.family].fused else self.key_format


def modules_matching(arch: Architecture, pattern: str) -> list[str]:
    """The paths of the modules that a pattern matches from end to end, in the order of the model."""
    return [path for path in arch.modules if re.fullmatch(pattern, path)]


def missing_kinds(start: TrainingStart, support: ModelSupport) -> list[str]:
    """The kinds of layers that the trainer trains by default and the LoRA does not have."""
    kinds = dict.fromkeys(start.arch.modules[path].kind.name for path in modules_matching(start.arch, support.default))
    return [kind for kind in kinds if kind not in start.kinds]


def target_pattern(start: TrainingStart, *, exact: bool = False) -> str:
    """The LoRA's modules as PEFT takes them for targets: a regular expression of whole paths, by kind of layer.

    ``exact``: of the blocks that the LoRA has; else of all blocks. Ends of names are not enough: Z-Image has a SiLU
    that ends as its modulation's layer does. Nor is a list safe: DiffSynth-Studio takes one of one name for a regular
    expression.
    """
    blocks: dict[tuple[str, str], list[int]] = {}
    for path in start.paths:
        module = start.arch.modules[path]
        blocks.setdefault((module.stack or "", module.kind.name), []).append(module.block or 0)
    kinds: dict[str, list[str]] = {}
    for (stack, kind), numbers in blocks.items():
        whole = not exact or len(numbers) == start.arch.depths.get(stack)
        number = r"\d+" if whole else f"({'|'.join(map(str, sorted(numbers)))})"
        kinds.setdefault(rf"{re.escape(stack)}\.{number}\." if stack else "", []).append(kind)
    return "|".join(rf"{place}({'|'.join(map(re.escape, names))})" for place, names in kinds.items())


def matching_targets(start: TrainingStart) -> list[str]:
    """The paths of the modules that PEFT adapts for `target_pattern`."""
    return modules_matching(start.arch, target_pattern(start))


def target_names(start: TrainingStart) -> list[str]:
    """The LoRA's modules as PEFT takes them in a list: kinds of layers, which are ends of paths, or whole paths where a
    layer that is not linear ends like that: Z-Image's adaLN, or one that holds layers of another kind."""
    kinds = {module.kind.name for module in start.arch.modules.values()}
    unclear = {kind for kind in kinds if "adaLN" in kind or any(other.startswith(f"{kind}.") for other in kinds)}
    names = {path: start.arch.modules[path].kind.name for path in start.paths}
    return [*dict.fromkeys(path if name in unclear else name for path, name in names.items())]


def named_by_end(start: TrainingStart) -> list[str]:
    """The paths of the modules that PEFT adapts for `target_names`."""
    names = tuple(f".{name}" for name in target_names(start))
    return [path for path in start.arch.modules if f".{path}".endswith(names)]
