"""A start folder: all that a trainer needs to train on from a LoRA.

That is the LoRA at the rank to train at, in the trainer's key format; a script or a configuration; and a read-me. The
LoRA is read back and compared before the folder appears.
"""

from __future__ import annotations

import errno
import re
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from . import atomic, files, keys
from .consumer_table import CONSUMERS
from .errors import UserError, unknown_choice
from .fusing import fuse
from .key_formats import KEY_FORMATS
from .lora import Lora
from .metadata import updated_metadata
from .rank import resize, resizer_of, svd_of_product
from .shell import shell_word
from .start_folder import RUN, StartFolder, readme
from .threads import one_thread
from .trainers import TRAINERS, TrainingStart
from .trainers.base import BASE_PLACES, FRESH_ROWS, TODO, Dataset, ModelSupport, modules_matching
from .trainers.script import CONFIGURATIONS, read_places

if TYPE_CHECKING:
    import torch

    from .lora import Pair

EDITED = (".py", *CONFIGURATIONS)
"""Endings of the texts that a user may have changed: one that is replaced stays beside the new one as NAME.old."""


def export(
    lora: Lora,
    trainer_id: str,
    rank: int | None,
    folder: Path,
    *,
    stem: str = "lora",
    fill: bool = False,
    exact: bool = False,
    seed: int = 0,
    overwrite: bool = False,
    pictures: Mapping[str, Callable[[Path], object]] | None = None,
    caption: str = "",
    captions: Mapping[str, str] | None = None,
    originals: Mapping[str, str] | None = None,
    unused_captions: int = 0,
    more_folders: bool = False,
    bases: Mapping[str, Path] | None = None,
    progress: Callable[[float], None] = lambda share: None,
    begin_saving: Callable[[], None] = lambda: None,
) -> StartFolder:
    """Write into ``folder`` what the trainer needs to train on from ``lora`` at ``rank``; None: the rank at which
    nothing is lost, the LoRA's, or where the trainer has q, k and v as one layer, the sum of theirs. See `TRAINERS` for
    the ids.

    ``stem``: the first part of file and run names. ``fill``: also write fresh modules for what the trainer trains by
    default. ``exact``: compute in float64. ``seed``: of fresh rows. ``pictures``: to train on, {file name: what writes
    it to a path}; they get a folder of their own, and a text file each where the trainer reads such, with the picture's
    own prompt (``captions``, by file name) or else ``caption``. ``originals``: what the pictures were called, by file
    name; ``unused_captions``: of those beside the pictures; ``more_folders``: the base was looked for in such.
    ``bases``: where parts of the base model lie, as in `TrainingStart`. ``progress``: told often what share is done, 0
    to 1. ``begin_saving``: called when all is written and about to get its name. The folder appears whole or not at
    all; in one that exists, files of other names stay, and of a text that is replaced a copy, as NAME.old.

    Raises UserError where the trainer is unknown or has no start of such a model, where a path has control characters,
    where a file exists already (unless ``overwrite``) or cannot be written, and where the self-check fails.
    """
    trainer = TRAINERS.get(trainer_id)
    if trainer is None:
        raise unknown_choice("trainer", trainer_id, [*TRAINERS])
    support = trainer.models.get(lora.arch.family)
    if support is None:
        families = ", ".join(trainer.models)
        raise UserError(f"No start folder is written for {lora.arch.title} with {trainer.title}, only for {families}.")
    key_format = trainer.key_format_for(lora.arch)
    scales = sorted({*lora.source.scales.values()} - {1}) if lora.source else []
    if support.fused:
        lora = fuse(lora)
    rank = lora.rank if rank is None else rank
    trainable = {*modules_matching(lora.arch, support.trainable)}
    by_default = modules_matching(lora.arch, support.default)
    exported = [path for path in lora if path in trainable]
    if not exported:
        raise UserError(f"{trainer.title} cannot train any module of this file.")
    short = re.sub(r"[^A-Za-z0-9._-]+", "_", stem).lstrip("-")  # a dash would make it an option
    name = f"{short}_i2l_r{rank}_{uuid.uuid4().hex[:6]}"
    path = folder.resolve() / f"{stem}_init_r{rank}.safetensors"
    data = Dataset(caption=caption)
    if pictures:
        data = Dataset(_free_folder(folder.resolve()), tuple(pictures), caption, captions or {})
    start = TrainingStart(
        lora.arch, path, name, rank, seed, tuple(exported), data, dict(bases or {}), support.learning_rate,
        read_places(folder / RUN) if overwrite else {},
    )  # fmt: skip
    if fill:
        start = _filled(start, support, _fillable(lora, exported, by_default))
    row_norm = FRESH_ROWS[trainer.fresh_rows]
    init = resize(
        _subset(lora, exported), rank, exact=exact, seed=seed, fill=start.paths,
        row_norms=lambda module: row_norm(lora.arch.modules[module].kind.d_in, rank), equal=True,
    )  # fmt: skip
    resizer = resizer_of(init)
    texts = dict(support.files(start))
    _refuse_existing(folder, [path.name, *texts, "README.md"], overwrite)
    fields = {
        "export": trainer.id,
        "run": name,
        "rank_from": str(lora.rank),
        "rank_seed": str(seed),
        "fresh_rows": trainer.fresh_rows,
    }
    metadata = updated_metadata(init, key_format, path.stem, **fields)
    with _atomic_folder(folder, overwrite) as temp:
        init.save(temp / path.name, key_format, metadata=metadata, progress=lambda share: progress(share / 2))
        error = self_check(
            temp / path.name, key_format, lora, init, resizer.singular_values, lambda share: progress((1 + share) / 2)
        )
        written = StartFolder(
            trainer=trainer.id,
            arch=lora.arch.id,
            folder=str(folder),
            init=str(path),
            run=RUN,
            start=f"python {shell_word((folder.resolve() / RUN).as_posix())}",
            name=name,
            rank=rank,
            modules=len(init),
            filled=len(init) - len(exported),
            fresh=_kinds(lora, [p for p in support.trained(start) if p not in init.specs]),
            untrained=_kinds(lora, [p for p in by_default if p not in {*init.specs, *support.trained(start)}]),
            left_out=_kinds(lora, [p for p in lora if p not in trainable]),
            kept=resizer.effect_kept(),
            error=error,
            fresh_rows=trainer.fresh_rows,
            learning_rate=start.learning_rate,
            fresh_rate=support.fresh_rate,
            caution=lora.arch.caution,
            files=tuple(texts),
            blanks={file: found for file, text in texts.items() if (found := _blanks(text))},
            scales=tuple(scales),
            dataset=str(data.folder) if data.names else "",
            pictures=len(data.names),
            caption=caption,
            captions=len(data.captions),
            uncaptioned={
                name: (originals or {}).get(name, name)
                for name in data.names
                if not caption and not (trainer.captions and name in data.captions)
            },
            unused_captions=unused_captions,
            more_folders=more_folders,
            by_default=len(by_default),
            downloads=trainer.downloads,
            key_format=key_format,
            webui_format=next(one for one in CONSUMERS if one.id == "comfyui").for_family(lora.arch.family).wants,
            bases=_used_bases(start, texts),
        )
        if pictures:
            _write_pictures(temp / data.folder.name, pictures, data.prompt if trainer.captions else None)
        for file, text in {**texts, "README.md": readme(trainer, written)}.items():
            (temp / file).write_text(text, encoding="utf-8", newline="\n")
        begin_saving()
    return written


def _used_bases(start: TrainingStart, texts: Mapping[str, str]) -> dict[str, str]:
    """Part of the base model -> its path in the texts; by the name in train.py where the user had filled it in."""
    known = {part: str(found) for part, found in start.bases.items()}
    kept = {name: old for name, old in start.filled_in.items() if name in BASE_PLACES and old not in known.values()}
    return {
        part: path
        for part, path in {**known, **kept}.items()
        if any(
            word in text
            for text in texts.values()
            for word in (repr(path), *(f"{Path(path).as_posix()}{mark}" for mark in "'\""))
        )
    }


def _blanks(text: str) -> list[str]:
    """The paths in a text that the user has to fill in."""
    return [*dict.fromkeys(re.findall(rf"""['"]({TODO}/\w[^'"]*)""", text))]


def _free_folder(folder: Path) -> Path:
    """A folder for pictures that is not there yet."""
    number = 1
    while (target := folder / ("pictures" if number == 1 else f"pictures-{number}")).exists():
        number += 1
    return target


def _write_pictures(
    folder: Path, pictures: Mapping[str, Callable[[Path], object]], prompt: Callable[[str], str] | None
) -> None:
    folder.mkdir()
    for name, write in pictures.items():
        write(folder / name)
        if prompt is not None:
            (folder / name).with_suffix(".txt").write_text(prompt(name), encoding="utf-8", newline="\n")


@contextmanager
def _atomic_folder(folder: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary folder to write to. At the end it becomes ``folder`` or, if that exists, its files are moved there.

    Raises UserError, also where another process has written a file of such a name meanwhile.
    """
    try:
        parent = folder if folder.exists() else folder.parent
        parent.mkdir(parents=True, exist_ok=True)
        atomic.remove_stale(parent)
        with atomic.locked_temp_folder(parent) as temp:
            yield temp
            if parent is not folder:
                temp.rename(folder)
                return
            for file in sorted(temp.iterdir()):
                old = folder / file.name
                if file.is_dir():
                    file.rename(old)
                    continue
                if old.is_file() and file.suffix in EDITED:
                    with atomic.atomic_path(old.with_name(f"{old.name}.old"), overwrite=True) as copy:
                        shutil.copyfile(old, copy)
                atomic.place(file, old, overwrite=overwrite)
    except FileExistsError:
        raise _taken(folder) from None
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise UserError(f"{folder}: exists already. Choose another folder.") from None
        raise UserError(f"{folder}: cannot be written ({error.strerror}).") from None


def _subset(lora: Lora, paths: Iterable[str]) -> Lora:
    return Lora(lora.arch, {path: lora.specs[path] for path in paths}, lora.load, lora.metadata)


def _fillable(lora: Lora, exported: list[str], by_default: list[str]) -> list[str]:
    """What the trainer trains by default and the file lacks, in the stacks of which the file has modules."""
    stacks = {lora.arch.modules[path].stack for path in exported}
    return [path for path in by_default if path not in lora.specs and lora.arch.modules[path].stack in stacks]


def _filled(start: TrainingStart, support: ModelSupport, more: Iterable[str]) -> TrainingStart:
    """``start`` with ``more`` modules and all that its flags then make the trainer train: a flag for a kind of layer
    may choose layers of that kind elsewhere too."""
    while more := [path for path in more if path not in start.paths]:
        start = replace(start, paths=(*start.paths, *more))
        more = support.trained(start)
    return start


def _kinds(lora: Lora, paths: Iterable[str]) -> dict[str, int]:
    return dict(Counter(lora.arch.modules[path].kind.name for path in paths))


def _refuse_existing(folder: Path, names: list[str], overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; name a folder.")
    existing = next((name for name in names if (folder / name).exists()), None)
    if existing and not overwrite:
        raise _taken(folder / existing)


def _taken(path: Path) -> UserError:
    return UserError(
        f"{path}: exists already. Choose another folder, or say --overwrite: it replaces the files of the start there."
    )


def self_check(
    path: Path,
    key_format: str,
    lora: Lora,
    init: Lora,
    values: Mapping[str, torch.Tensor],
    progress: Callable[[float], None] = lambda share: None,
) -> float:
    """Read the file written in ``key_format`` back and compare it with ``lora``, of which it was made, and ``init``,
    its resized form, both in the same layers.

    ``values``: singular values of ``lora`` by module path. ``progress``: told after each module what share is done.
    Returns the largest relative error of an update, beyond
    that of the lower rank. Raises UserError where keys, ranks, dtypes, scales or updates are wrong, or a rank could
    not learn.
    """
    read, worst = Lora.read(path), 0.0
    written = fuse(read) if KEY_FORMATS[key_format].native else read
    problems = []
    if read.read_from.reading.key_format != key_format:
        problems.append(f"its key format is {read.read_from.reading.key_format}")
    if written.specs.keys() != init.specs.keys():
        problems.append("it has other modules than it should")
    if any(spec != init.specs[module] for module, spec in written.specs.items()):
        problems.append("it has other ranks or dtypes than it should")
    if any(scale != 1 for scale in read.read_from.scales.values()):
        problems.append("its alpha is not its rank")
    for number, module in enumerate(written if not problems else (), 1):
        with one_thread():
            down, up = written[module]
            if not down.any(dim=1).all():
                problems.append(f"{module} has a rank that could never learn")
            if module in lora.specs:
                worst = max(worst, _excess_error(lora[module], (down, up), values[module], init.specs[module].rank))
            elif up.any():
                problems.append(f"{module} should start without an update")
        progress(number / len(written))
    if worst > 1e-4:
        problems.append(f"an update has an error of {worst:.1e}")
    with files.TensorFile(path) as file:
        reading = keys.parse_keys(file.header.shapes, path.name)
        if reading.foreign or reading.halves:
            problems.append("it has keys of unknown modules")
    if problems:
        raise UserError(
            f"{path.name}: the self-check failed: {'; '.join(problems)}. Nothing was written; please report this."
        )
    return worst


def _excess_error(before: Pair, after: Pair, values: torch.Tensor, rank: int) -> float:
    """|after - before| / |before|, less what any LoRA of ``rank`` must lose. ``values``: singular values of ``before``.

    The norm is that of the difference's singular values, so neither update is formed.
    """
    import torch

    down = torch.cat([after[0].double(), before[0].double()])
    up = torch.cat([after[1].double(), -before[1].double()], dim=1)
    size = float(values.square().sum().sqrt())
    distance = float(svd_of_product(down, up, exact=True).s.square().sum().sqrt())
    optimum = float(values[rank:].square().sum().sqrt())
    return max(0.0, distance - optimum) / size if size else distance
