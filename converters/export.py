"""A head start for training: the init file in a trainer's dialect, the text that starts it, a README, a self-check."""

from __future__ import annotations

import errno
import re
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from . import atomic, dialects, files, rank
from .errors import UserError
from .lora import Lora
from .metadata import rewritten
from .trainers import TRAINERS, Start, Trainer
from .trainers.base import matching

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Export:
    """What was written. ``fresh``: kinds that the trainer trains and that start from nothing, with their number;
    ``left_out``: modules of the file that the trainer has no place for; ``error``: the largest relative distance of an
    update from the one that was to be kept, beyond what a lower rank costs; ``kept``: energy, by kind; ``caution``:
    why no training of a real model can start from it, or empty."""

    trainer: str
    arch: str
    folder: str
    init: str
    run: str
    name: str
    rank: int
    modules: int
    filled: int
    fresh: dict[str, int]
    left_out: dict[str, int]
    kept: dict[str, float]
    error: float
    caution: str = ""

    def json(self) -> dict[str, object]:
        return asdict(self)


def export(
    lora: Lora,
    trainer_id: str,
    wanted: int,
    folder: Path,
    *,
    stem: str = "lora",
    fill: bool = False,
    exact: bool = False,
    seed: int = 0,
    overwrite: bool = False,
) -> Export:
    """Write into ``folder`` all that ``trainer_id`` needs to train on from ``lora`` at the rank ``wanted``.

    Raises UserError where the trainer is unknown or has no such model, where a file exists already, or where what was
    written is not what was to be written.
    """
    trainer = TRAINERS.get(trainer_id)
    if trainer is None:
        raise UserError(f"{trainer_id!r} is no trainer known here: {', '.join(TRAINERS)}.")
    model = trainer.models.get(lora.arch.family)
    if model is None:
        raise UserError(f"{trainer.title} trains no {lora.arch.title}: {', '.join(trainer.models)}.")
    can, by_default = matching(lora.arch, model.can), matching(lora.arch, model.trains)
    stays = [path for path in lora if path in {*can}]
    left_out = [path for path in lora if path not in {*can}]
    if not stays:
        raise UserError(f"{trainer.title} has no place for any module of this file.")
    extra = _fillable(lora, stays, by_default) if fill else []
    init = rank.resize(_part(lora, stays), wanted, exact=exact, seed=seed, fill=extra)
    resizer = rank.resizer(init)
    name = f"{re.sub(r'[^A-Za-z0-9._-]+', '_', stem)}_i2l_r{wanted}_{uuid.uuid4().hex[:6]}"
    path = folder.resolve() / f"{stem}_init_r{wanted}.safetensors"
    start = Start(lora.arch, path, name, wanted, seed, tuple(init))
    texts = dict(model.files(start))
    _refuse_taken(folder, [path.name, *texts, "README.md"], overwrite)
    fields = {"export": trainer.id, "rank_from": str(lora.rank), "rank_seed": str(seed)}
    metadata = rewritten(init, trainer.dialect, path.stem, **fields)
    with _atomic_folder(folder, overwrite) as here:
        init.save(here / path.name, trainer.dialect, metadata=metadata)
        error = self_check(here / path.name, trainer, lora, init, resizer.seen)
        told = Export(
            trainer=trainer.id,
            arch=lora.arch.id,
            folder=str(folder),
            init=str(path),
            run=trainer.run,
            name=name,
            rank=wanted,
            modules=len(init),
            filled=len(extra),
            fresh=_kinds(lora, [p for p in by_default if p not in init.specs and _trained(start, p)]),
            left_out=_kinds(lora, left_out),
            kept=rank.kept(lora.arch, resizer.seen, dict.fromkeys(stays, wanted)),
            error=error,
            caution=lora.arch.caution,
        )
        for file, text in {**texts, "README.md": readme(trainer, told)}.items():
            (here / file).write_text(text, encoding="utf-8", newline="\n")
    return told


@contextmanager
def _atomic_folder(folder: Path, overwrite: bool) -> Iterator[Path]:
    """A hidden folder to write into. At the end it becomes ``folder``, or its files go there if that exists already.

    Raises UserError, also where a file of such a name has come meanwhile.
    """
    try:
        home = folder if folder.exists() else folder.parent
        home.mkdir(parents=True, exist_ok=True)
        atomic.remove_stale(home)
        with atomic.locked_temp_folder(home) as here:
            yield here
            if home is not folder:
                here.rename(folder)
                return
            for file in sorted(here.iterdir()):
                atomic.place(file, folder / file.name, overwrite=overwrite)
    except FileExistsError:
        raise UserError(f"{folder}: exists already. Choose another folder, or say --overwrite.") from None
    except OSError as error:
        if error.errno == errno.ENOTEMPTY:
            raise UserError(f"{folder}: exists already. Choose another folder.") from None
        raise UserError(f"{folder}: cannot be written ({error.strerror}).") from None


def _part(lora: Lora, paths: Iterable[str]) -> Lora:
    return Lora(lora.arch, {path: lora.specs[path] for path in paths}, lora.load, lora.metadata)


def _fillable(lora: Lora, stays: list[str], by_default: list[str]) -> list[str]:
    """What the trainer would train too: all it trains by default, in the stacks that the file reaches."""
    stacks = {lora.arch.modules[path].stack for path in stays}
    return [path for path in by_default if path not in lora.specs and lora.arch.modules[path].stack in stacks]


def _trained(start: Start, path: str) -> bool:
    """Whether the written flags leave a module in: they choose by kind, so a kind that the file has in part is in."""
    return start.arch.modules[path].kind.name in start.kinds


def _kinds(lora: Lora, paths: Iterable[str]) -> dict[str, int]:
    return dict(Counter(lora.arch.modules[path].kind.name for path in paths))


def _refuse_taken(folder: Path, names: list[str], overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; name a folder.")
    taken = next((name for name in names if (folder / name).exists()), None)
    if taken and not overwrite:
        raise UserError(f"{folder / taken}: exists already. Choose another folder, or say --overwrite.")


def self_check(path: Path, trainer: Trainer, lora: Lora, init: Lora, seen: dict[str, torch.Tensor]) -> float:
    """Read the init file back as the trainer will, and hold it against what it was made from.

    Returns the largest relative error beyond that of the lower rank. Raises UserError where keys, rank, dtype, scale
    or updates are not as they must be, or a rank could not learn.
    """
    written, worst = Lora.read(path), 0.0
    problems = []
    if written.read_from.reading.dialect != trainer.dialect:
        problems.append(f"its dialect is {written.read_from.reading.dialect}")
    if written.specs.keys() != init.specs.keys():
        problems.append("its modules are not those that were to be written")
    if any(spec != init.specs[module] for module, spec in written.specs.items()):
        problems.append("its ranks or dtypes are not those that were to be written")
    if any(scale != 1 for scale in written.read_from.scales.values()):
        problems.append("its alpha is not its rank")
    for module in written if not problems else ():
        down, up = written[module]
        if not down.any(dim=1).all():
            problems.append(f"{module} has a rank that could never learn")
        if module in lora.specs:
            worst = max(worst, _beyond(lora[module], (down, up), seen[module], init.specs[module].rank))
        elif up.any():
            problems.append(f"{module} was to start from nothing")
    if worst > 1e-4:
        problems.append(f"an update is {worst:.1e} from what it should be")
    with files.TensorFile(path) as file:
        known = dialects.parse(file.header.shapes, path.name)
        if known.foreign or known.halves:
            problems.append("it holds keys that are no module's")
    if problems:
        raise UserError(
            f"{path.name}: the self-check failed: {'; '.join(problems)}. Nothing was kept; please report it."
        )
    return worst


def _beyond(before: tuple, after: tuple, seen: torch.Tensor, kept: int) -> float:
    """|after - before| / |before| less the part that a rank of ``kept`` must cost, by the spectrum of the difference:
    it has at most the sum of both ranks, so it is found without forming either."""
    import torch

    down = torch.cat([after[0].double(), before[0].double()])
    up = torch.cat([after[1].double(), -before[1].double()], dim=1)
    size = float(seen.square().sum().sqrt())
    distance = float(rank.triples(down, up, exact=True).s.square().sum().sqrt())
    optimum = float(seen[kept:].square().sum().sqrt())
    return max(0.0, distance - optimum) / size if size else distance


SHOWN = "This folder shows what an export is: no training of a real model can start from it."


def readme(trainer: Trainer, told: Export) -> str:
    """Ten lines or so for the person who opens the folder."""
    lines = [
        f"# A head start for {trainer.title}",
        "",
        *([f"{told.caution} {SHOWN}", ""] if told.caution else []),
        f"`{Path(told.init).name}`: {told.modules} modules, rank {told.rank} = alpha, fp32, {trainer.dialect} keys.",
        f"`{told.run}`: fill in the paths at its top and run it; the run is called `{told.name}`.",
        f"Energy kept of the update: {told.kept['all']:.2%}. Self-check: largest error {told.error:.0e}, no dead rank.",
        *([f"Filled as fresh modules: {told.filled}."] if told.filled else []),
        *([f"Start fresh in the trainer: {_listed(told.fresh)}. `--fill` writes them too."] if told.fresh else []),
        *([f"Left out, since it has no place for them: {_listed(told.left_out)}."] if told.left_out else []),
        *trainer.notes,
    ]
    return "\n".join(lines) + "\n"


def _listed(kinds: dict[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in kinds.items())
