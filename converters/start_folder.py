"""What a start folder is, and what its read-me tells."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

from .architectures import ARCHITECTURES
from .trainers import Trainer
from .trainers.base import NO_TRAINER, SAVES, TODO

RUN = "train.py"
"""The script that starts a training."""

FEW = 0.1
"""Of the modules that a trainer trains by default: where fewer are there, the start changes little."""

ENOUGH = 0.9
"""Of the effect: below that a start is told to be weak."""

LOOKED_IN = "the caches of Hugging Face and ModelScope, the models folder of a WebUI or ComfyUI, and `I2L_MODELS`"

NAMED = 20
"""Pictures without a caption that are named."""

STAY = "Do not move this folder, it has absolute paths in it: export again where it is to be."


@dataclass(frozen=True)
class StartFolder:
    """A start folder that was written.

    ``folder``, ``init``: paths of the folder and of the LoRA in it; ``run``: name of the script, and ``start``: the
    command that runs it, in the trainer's folder; ``files``: names of the written texts, and ``blanks``: name -> paths
    in it that the user has to fill in; ``name``: of the training run. ``pictures``: number of those in the folder
    ``dataset``; ``captions``: how many of them have a prompt of their own, and ``caption``: that of the others;
    ``uncaptioned``: name there -> name before, of those that have neither; ``unused_captions``: texts beside the
    pictures in whose place the caption stands. ``more_folders``: the base model was looked for in folders that were
    named. ``by_default``: number of modules that the trainer trains unless told otherwise.
    ``bases``: part of the base model -> where it was found, or what the user had filled in for it, of those that the
    texts name; ``downloads``: whether the
    trainer fetches what was not. ``key_format``: of its keys, which those of the run's LoRAs have too;
    ``webui_format``: that which ComfyUI and WebUIs read of such a model. ``modules``: in the LoRA, of which ``filled``
    are fresh. ``fresh``: kind -> number of modules that the trainer trains and that start without an update;
    ``untrained``: kind -> number of those that it trains by default, but not in this run, as the LoRA lacks them;
    ``left_out``: kind -> number of modules of the file that the trainer cannot train. ``kept``: kind, or "all" -> share
    of the effect kept, 0 to 1. ``error``: the largest relative error of an update, beyond what the lower rank costs.
    ``fresh_rows``: the way in which fresh rows of the down factors are drawn, a key of `FRESH_ROWS`.
    ``learning_rate``: to begin with, as the texts have it; ``fresh_rate``: of a fresh LoRA there.
    ``scales``: alpha / rank of modules of the file, where not 1; it is in the factors now. ``caution``: why no real
    model can be trained from it, or empty.
    """

    trainer: str
    arch: str
    folder: str
    init: str
    run: str
    start: str
    name: str
    rank: int
    modules: int
    filled: int
    fresh: dict[str, int]
    untrained: dict[str, int]
    left_out: dict[str, int]
    kept: dict[str, float]
    error: float
    fresh_rows: str = "kaiming"
    learning_rate: float = 0.0
    fresh_rate: float = 0.0
    caution: str = ""
    files: tuple[str, ...] = ()
    blanks: dict[str, list[str]] = field(default_factory=dict)
    scales: tuple[float, ...] = ()
    dataset: str = ""
    pictures: int = 0
    caption: str = ""
    captions: int = 0
    uncaptioned: dict[str, str] = field(default_factory=dict)
    unused_captions: int = 0
    more_folders: bool = False
    by_default: int = 0
    bases: dict[str, str] = field(default_factory=dict)
    downloads: bool = True
    key_format: str = ""
    webui_format: str = ""

    @property
    def names(self) -> list[str]:
        """What was written into the folder, without what is in its folders."""
        pictures = [f"{Path(self.dataset).name}/"] if self.pictures else []
        return [*self.files, "README.md", Path(self.init).name, *pictures]

    @property
    def to_fill_in(self) -> str:
        """The paths to fill in, by file."""
        return "; ".join(f"{file}: {', '.join(paths)}" for file, paths in self.blanks.items())

    def json(self) -> dict[str, object]:
        """For programs: plain values only."""
        return asdict(self)


def readme(trainer: Trainer, written: StartFolder) -> str:
    """The text of README.md, for the person who opens the folder."""
    family = ARCHITECTURES[written.arch].family
    pictures = f"Pictures: {_pictures_line(trainer, written)}"
    start = [
        f"Base model: {_base_line(trainer, written)}. A LoRA of a variant (Turbo, Edit) needs that variant's.",
        pictures,
        _uncaptioned_line(trainer, written),
        f"Memory of the card, as its authors say: {trainer.memory.get(family, 'not stated')}.",
        f"`{written.run}`: {trainer.usage.format(start=written.start, name=written.name)} {STAY}",
    ]
    if written.caution:
        start = [
            f"Nothing can be started. `{written.run}` only says why.",
            pictures,
            _uncaptioned_line(trainer, written),
        ]
    lora = [
        f"`{Path(written.init).name}`: {written.modules} modules, rank {written.rank} = alpha, fp32, "
        f"{written.key_format} keys.",
        f"{_kept(written)} The file was read back and compared: an error of {written.error:.0e} at most.",
        _few_line(trainer, written),
        f"Fresh modules added: {written.filled}." if written.filled else "",
        _kinds_line("The trainer starts these without an update: {}. `--fill` writes them too.", written.fresh),
        _kinds_line(
            "Not trained, because the LoRA lacks them: {}. `--fill` adds those in the parts that it changes.",
            written.untrained,
        ),
        _kinds_line("Left out, because it cannot train them: {}.", written.left_out),
    ]
    run = [
        *trainer.notes,
        _rate_line(trainer, written),
        f"It saves about {SAVES} times. Look at early saves too: it begins with the style, so the best may come soon.",
        f"The run saves `{trainer.results.format(name=written.name)}` in the trainer's folder, {written.key_format} "
        f"keys{_for_webuis(written)}. `i2l check FILE` says who loads it.",
    ]
    lines = [
        f"# Start folder for {trainer.title}",
        *(["", f"{written.caution} {NO_TRAINER.format(written.arch)}"] if written.caution else []),
    ]
    for title, facts in (("To start", start), ("The LoRA in it", lora), ("The run", run)):
        lines += ["", f"## {title}", "", *(f"- {fact}" for fact in facts if fact)]
    return "\n".join(lines) + "\n"


def _kinds_line(words: str, kinds: dict[str, int]) -> str:
    return words.format(", ".join(f"{count} {kind}" for kind, count in kinds.items())) if kinds else ""


def _for_webuis(written: StartFolder) -> str:
    if written.key_format == written.webui_format:
        return ", as ComfyUI and WebUIs read them"
    return f"; `i2l convert FILE --to {written.webui_format} -o NEW.safetensors` writes it for ComfyUI and WebUIs"


def _few_line(trainer: Trainer, written: StartFolder) -> str:
    own = written.modules - written.filled
    if own >= FEW * written.by_default:
        return ""
    return (
        f"**Warning: the LoRA has only {own} of the {written.by_default} modules that {trainer.title} trains by "
        "default: the effect kept is that of these few, and the style may be faint.**"
    )


def _kept(written: StartFolder) -> str:
    share = written.kept["all"]
    if share >= ENOUGH:
        return f"Effect kept: {share:.2%}."
    return (
        f"**Warning: effect kept: only {share:.2%} at rank {written.rank}, so the run starts from a weaker style. "
        "Export it at a higher `--rank`.**"
    )


def _rate_line(trainer: Trainer, written: StartFolder) -> str:
    file, name = trainer.rate_place
    fresh = f"{written.fresh_rate:.0e}".replace("e-0", "e-")
    folded = f" (In the file alpha was {_scales(written)} of the rank. That is multiplied in: here alpha is the rank.)"
    return (
        f"Learning rate: begin with {written.learning_rate}, which stands in `{file}` as `{name}`. That is already a "
        f"third of {fresh}, a usual one for a fresh LoRA in {trainer.title}. With real models nobody has tried it."
        f"{folded if written.scales else ''}"
    )


def _scales(written: StartFolder) -> str:
    low, high = min(written.scales, default=1), max(written.scales, default=1)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _pictures_line(trainer: Trainer, written: StartFolder) -> str:
    if not written.pictures:
        where = "in the .txt file beside it" if trainer.captions else "in train.py"
        blank = f"`{TODO}/dataset`{_in(written, 'dataset')}"
        return f"none were found. Name their folder in place of {blank}; {trainer.title} gives each the prompt {where}."
    words = f"the prompt `{written.caption}`" if written.caption else "an empty prompt"
    own = f"{written.captions} with the caption that lay beside them as a .txt file"
    if written.captions and trainer.captions:
        others = written.pictures - written.captions
        said = own + (f", {others} with {words}" if others else "")
    else:
        said = f"each has {words}"
        if written.captions:
            said += f". {trainer.title} has one prompt for all, so your {written.captions} captions are not used"
    how = ", in a text file beside it" if trainer.captions else ""
    unused = f" {written.unused_captions} .txt captions beside the pictures were not used: `--caption` replaces them."
    return (
        f"{written.pictures} in `{Path(written.dataset).name}/`, whole and upright; {said}{how}."
        f"{unused if written.unused_captions else ''}"
    )


def _uncaptioned_line(trainer: Trainer, written: StartFolder) -> str:
    if not written.uncaptioned:
        return ""
    told = [
        f"{before} (here `{name}`)" if before != name else f"`{name}`"
        for name, before in [*written.uncaptioned.items()][:NAMED]
    ]
    more = len(written.uncaptioned) - len(told)
    beside = "a .txt file beside each, or " if trainer.captions else ""
    return (
        f"**Warning: no caption for {', '.join(told)}{f' and {more} more' if more else ''}: the prompt is empty. "
        f"Write {beside}`--caption`, and export again.**"
    )


def _base_line(trainer: Trainer, written: StartFolder) -> str:
    if written.bases:
        return ", ".join(f"`{path}`" for path in written.bases.values())
    more = "nor in the folders of `--models`" if written.more_folders else "`--models` names more folders"
    return f"not found in {LOOKED_IN}; {more}; " + (
        f"{trainer.title} downloads it"
        if trainer.downloads
        else f"fill in the paths that begin with `{TODO}`{_in(written)}"
    )


def _in(written: StartFolder, name: str = "") -> str:
    """In which files a path is to be filled in: that of ``name``, or any but that of the pictures."""
    data = f"{TODO}/dataset"
    files = [
        file
        for file, blanks in written.blanks.items()
        if any(f"{TODO}/{name}" in blank if name else not blank.startswith(data) for blank in blanks)
    ]
    return f" in `{'`, `'.join(files)}`" if files else ""
