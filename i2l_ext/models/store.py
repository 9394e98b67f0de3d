"""Finds model files: in our own folder, a WebUI's models folder, the caches of two hubs, DiffSynth-Studio's folder.

Files are looked for under the names that the hub gives them. In the folders that we scan they are also found under any
other name, by the structure of their tensors. Only headers are read, and torch is not imported.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import i2l_ext
from i2l_ext.converters import atomic
from i2l_ext.converters.errors import UserError
from i2l_ext.converters.files import TensorFile
from i2l_ext.converters.headers import BYTES, HEADER_LIMIT, read_json
from i2l_ext.library.folder import LORA_FOLDERS
from i2l_ext.models.catalogue import Checkpoint, I2LModel
from i2l_ext.weights.packing import PACK_FORMATS, PackNote, group_size, pack_note, packed_bytes, packed_name, weights_of
from i2l_ext.weights.structure import check_structure, structure_md5

INDEX = ".index.json"
HEADER_SLACK = HEADER_LIMIT + 8
"""Bytes that a file may be larger than its tensors and still be worth a look at its header. One of a byte a number may
have scales besides."""

FORMS = (*PACK_FORMATS, "")
"""In which a checkpoint's files may be here: who has packed them wants them used. "": as the hub has them."""

SHIPPED = "i2l"
"""Where packed forms of what we ship lie, in place of a repository."""

_FileStamp = tuple[Path, int, int]
"""A path, its size and its time of change: what was read of the file holds until one of them changes."""

PACKAGE = Path(i2l_ext.__file__).absolute().parent


@dataclass(frozen=True)
class Folders:
    """Where to look, first folder first. ``own``, where downloads go, ``webui``, ``user`` and ``others`` hold files as
    ``<folder>/<repo>/<file>``, as DiffSynth-Studio does; all but ``others`` are also scanned for renamed files.
    ``modelscope`` and ``hugging_face`` are the caches of those libraries; None stands for no such place."""

    own: Path
    webui: tuple[Path, ...] = ()
    others: tuple[Path, ...] = ()
    modelscope: Path | None = None
    hugging_face: Path | None = None
    user: Path | None = None

    @staticmethod
    def default() -> Folders:
        """As the environment says. ``I2L_MODELS`` names our own folder, and after it, separated as in ``PATH``, any
        that a host adds. Without it our own folder is the WebUI's, where we lie in one, else the user's. Folders
        that downloads went to before are among the others."""
        named = [Path(name).expanduser() for name in os.environ.get("I2L_MODELS", "").split(os.pathsep) if name]
        own, *added = named or [next(_webui_models(), _user_models())]
        others = (_diffsynth_models(), *_remembered())
        caches = _modelscope_cache(), _hub_cache()
        return Folders(own, (*added, *_webui_models()), others, *caches, _user_models())

    @property
    def scanned(self) -> Iterator[Path]:
        """The folders that are searched for renamed files."""
        yield from dict.fromkeys((self.own, *self.webui, *filter(None, [self.user])))

    def homes(self, repo: str, file: str) -> Iterator[Path]:
        """Every folder that may hold that repository's files; ``file`` is one of them."""
        for root in dict.fromkeys((*self.scanned, *self.others)):
            yield root / repo
        if self.hugging_face:
            yield from _in_hub_cache(self.hugging_face, repo, file)
        if self.modelscope:
            yield from _in_modelscope_cache(self.modelscope, repo)

    @cached_property
    def loose(self) -> list[Path]:
        """The files of those folders, as they were when first asked for."""
        return [
            path for root in self.scanned for end in (".safetensors", INDEX) for path in sorted(root.rglob(f"*{end}"))
        ]


def _user_models() -> Path:
    from platformdirs import user_data_dir

    return Path(user_data_dir("i2l", appauthor=False)) / "models"


def remember(folder: Path) -> None:
    """Look into ``folder`` from now on, in every process: the tab and the command line download to different folders,
    and each must find the other's files. Does nothing where that cannot be written down."""
    known, record = _remembered(), _record()
    if folder.absolute() in (_user_models(), *known):
        return
    with suppress(OSError):
        record.parent.mkdir(parents=True, exist_ok=True)
        atomic.replace_text(record, json.dumps([str(one) for one in (*known, folder.absolute())]))


def _remembered() -> list[Path]:
    try:
        held = json.loads(_record().read_bytes())
    except (OSError, ValueError, RecursionError):
        return []
    return [Path(name) for name in held if isinstance(name, str)] if isinstance(held, list) else []


def _record() -> Path:
    return _user_models().with_name("folders.json")


def _webui_models() -> Iterator[Path]:
    """The models folder of the WebUI or ComfyUI in which this checkout is, if it is in one."""
    checkout = PACKAGE.parent
    models = checkout.parent.parent / "models"
    if checkout.parent.name in LORA_FOLDERS and models.is_dir():
        yield models / "i2l"
        yield models


def _diffsynth_models() -> Path:
    return Path(os.environ.get("DIFFSYNTH_MODEL_BASE_PATH") or "models").absolute()


def _modelscope_cache() -> Path:
    return Path(os.environ.get("MODELSCOPE_CACHE") or "~/.cache/modelscope").expanduser()


def _hub_cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _in_hub_cache(cache: Path, repo: str, file: str) -> Iterator[Path]:
    """What the library itself takes for the revision ``main``, then any snapshot, the newest first."""
    from huggingface_hub import try_to_load_from_cache

    current = try_to_load_from_cache(repo, file, cache_dir=cache)
    if isinstance(current, str):
        yield Path(current.removesuffix(file))
    yield from _newest(cache / f"models--{repo.replace('/', '--')}" / "snapshots")


def _in_modelscope_cache(cache: Path, repo: str) -> Iterator[Path]:
    """The layouts of that library's versions: snapshots, or plain folders with the dots of names replaced."""
    yield from _newest(cache / "models" / repo.replace("/", "--") / "snapshots")
    for folder in (cache / "models", cache / "hub" / "models", cache, cache / "hub"):
        for name in dict.fromkeys((repo, repo.replace(".", "___"))):
            yield folder / name


def _newest(snapshots: Path) -> list[Path]:
    return sorted(snapshots.iterdir() if snapshots.is_dir() else (), key=lambda folder: -folder.stat().st_mtime)


def locate(checkpoint: Checkpoint, folders: Folders | None = None, forms: Sequence[str] = FORMS) -> list[Path] | None:
    """The files of a checkpoint, shards in the order of their names; None where there are none. ``forms``: in which
    they are looked for, packed ones (PACK_FORMATS) or "" for those of the hub; the first that is found counts.

    Raises UserError where the only files of that name are damaged, or another model's: it names what is wrong.
    """
    folders = folders or Folders.default()
    trouble: UserError | None = None
    own = Path(checkpoint.files[0]).is_absolute()  # heads of one's own: that very file
    places = [[Path(file) for file in checkpoint.files]] if own else _candidates(checkpoint, folders)
    for form, paths in product([""] if own else forms, places):
        try:
            found = _expand(paths, form)
            if found is not None:
                _check(checkpoint, found)
                return found
        except UserError as error:
            trouble = trouble or error
    renamed = _recognise(checkpoint, folders) if "" in forms else None
    if renamed is None and trouble is not None:
        raise trouble
    return renamed


def _candidates(checkpoint: Checkpoint, folders: Folders) -> Iterator[list[Path]]:
    """Sets of files by exact name, each set from one place."""
    homes = folders.homes(checkpoint.repo or SHIPPED, checkpoint.files[0])
    for home in homes if checkpoint.repo else (PACKAGE, *homes):
        yield [home / file for file in checkpoint.files]


def _expand(paths: Iterable[Path], form: str = "") -> list[Path] | None:
    """The safetensors files that ``paths`` stand for, an index for its shards, packed or not; None where one is not
    there."""
    found: list[Path] = []
    for path in paths:
        if path.name.endswith(INDEX):
            found += shards(path) if path.is_file() else [path]
        else:
            found.append(path)
    if form:
        found = [path.with_name(packed_name(path.name, form)) for path in found]
    return found if all(path.is_file() for path in found) else None


def shards(index: Path) -> list[Path]:
    """The files that a ``.index.json`` lists, which lie beside it. Raises UserError where it lists anything else."""
    try:
        names = set(read_json(index)["weight_map"].values())
        if not names or not all(_is_plain(name) for name in names):
            raise ValueError
    except OSError as error:
        raise UserError(f"{index.name}: cannot be read ({error.strerror}).") from None
    except (ValueError, LookupError, TypeError, AttributeError):
        raise UserError(f"{index}: not a usable list of shards. Delete it and download it again.") from None
    return [index.with_name(name) for name in sorted(names)]


def _is_plain(name: object) -> bool:
    """Whether it is a safetensors file's name without any path part, on any system."""
    return isinstance(name, str) and name.endswith(".safetensors") and not set(name) & set("/\\:\0") and name[0] != "."


def _check(checkpoint: Checkpoint, paths: Sequence[Path]) -> None:
    """Raises UserError where the files are not whole or, as far as their headers tell, not that checkpoint. Of a
    template nothing is known before."""
    if checkpoint.kind == "template":
        return
    _check_origin(checkpoint, paths)
    found = _structure(paths)
    if checkpoint.structure_md5 not in (None, found):
        name = paths[0].name if len(paths) == 1 else f"{paths[0].parent.name}/{paths[0].name} and its shards"
        check_structure(name, checkpoint.shapes, shapes_of(paths))


def _check_origin(checkpoint: Checkpoint, paths: Sequence[Path]) -> None:
    """Raises UserError for packed files that were made of another checkpoint, or of another state of its file than
    lies beside them."""
    for path in paths:
        note = packing_note(path)
        if note is None:
            continue
        if note.checkpoint != checkpoint.id:
            raise UserError(f"{path.name}: was packed from {note.checkpoint}, not from {checkpoint.id}. Delete it.")
        beside = path.with_name(note.file) if _is_plain(note.file) else path
        if beside != path and beside.is_file() and known_sha256(beside) not in (None, note.origin):
            raise UserError(f"{path.name}: was packed from another state of {note.file} than lies beside it. Delete "
                            "it, and pack again.")  # fmt: skip


def packed_form(paths: Iterable[Path]) -> str | None:
    """How the numbers of located files are packed, a key of PACK_FORMATS; None where they are not."""
    packed = (_packing_of(_stamp_of(path))[1] for path in paths if path.suffix == ".safetensors")
    return next((form for form in packed if form), None)


def packing_note(path: Path) -> PackNote | None:
    """What a file says of its origin; None where it was not packed by us. Raises UserError."""
    return _packing_of(_stamp_of(path))[0]


@lru_cache(maxsize=256)
def _packing_of(stamp: _FileStamp) -> tuple[PackNote | None, str | None]:
    """What a file says of its origin, where it was packed by us, and in which form its numbers are packed."""
    with TensorFile(stamp[0]) as file:
        dtypes = {info.dtype for info in file.header.tensors.values()}
        note = pack_note(stamp[0], file.header)
        others = (form for form, packed in PACK_FORMATS.items() if packed.dtype in dtypes and packed.bits == 8)
        return note, note.form if note else next(others, None)


def _recognise(checkpoint: Checkpoint, folders: Folders) -> list[Path] | None:
    """A file, or an index with its shards, whose tensors have the checkpoint's structure, whatever its name."""
    structure = checkpoint.structure_md5
    if structure is None:
        return None
    numbers = checkpoint.parameters
    sizes = {numbers * width: HEADER_SLACK for width in set(BYTES.values())}
    sizes[numbers] += max(packed_bytes(numbers, "I8", form) for form in PACK_FORMATS) - numbers
    for path in folders.loose:
        try:
            paths = _expand([path])
            size = sum(part.stat().st_size for part in paths or ())
            likely = _may_be(checkpoint, path) and any(0 <= size - least <= slack for least, slack in sizes.items())
            if likely and _structure(paths or ()) == structure:
                _check_origin(checkpoint, paths or ())
                return paths
        except (UserError, OSError):  # another program's file, or one that is just being written
            continue
    return None


def _may_be(checkpoint: Checkpoint, path: Path) -> bool:
    """Whether a file of that place and name may be the checkpoint's: others can have the same structure."""
    repo = read_note(path).get("repo")
    return repo in (None, checkpoint.repo) and bool(re.search(checkpoint.renamed, "/".join(path.parts[-3:]).lower()))


def shapes_of(paths: Iterable[Path]) -> dict[str, tuple[int, ...]]:
    """{key: shape} of the weights of all files together, packed or not. Raises UserError where one is not a whole
    safetensors file, or where scales do not fit."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in paths:
        with TensorFile(path) as file:
            for key, info in weights_of(file.header).items():
                group_size(path.name, key, file.header.tensors)
                shapes[key] = info.shape
    return shapes


def _structure(paths: Iterable[Path]) -> str:
    return _structure_of(tuple(map(_stamp_of, paths)))


def _stamp_of(path: Path) -> _FileStamp:
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"{path.name}: cannot be read ({error.strerror}).") from None
    return path, status.st_size, status.st_mtime_ns


@lru_cache(maxsize=256)
def _structure_of(stamps: tuple[_FileStamp, ...]) -> str:
    return structure_md5(shapes_of(path for path, _, _ in stamps))


def require(model: I2LModel, folders: Folders | None = None) -> dict[str, list[Path]]:
    """Every part's files, by the checkpoint's id. Raises UserError that says what to download and how big it is."""
    folders = folders or Folders.default()
    found = {part.id: locate(part, folders) for part in model.parts}
    missing = [part for part in model.parts if found[part.id] is None]
    if any(part.repo is None for part in missing):
        raise UserError(f"{model.name}: its model files belong to this program but are not there. Install it again.")
    if missing:
        parts = ", ".join(f"{part.id} ({gigabytes(part.nbytes)})" for part in missing)
        size = gigabytes(sum(part.nbytes for part in missing))
        advice = f"Download them with: i2l models download {model.name}. To try it out without: --model mini."
        raise UserError(f"{model.name}: model files are missing: {parts}; {size} in all. {advice}", "weights_missing")
    return {id: paths for id, paths in found.items() if paths is not None}


def gigabytes(count: int) -> str:
    """Bytes as text, such as 20.6 GB; in powers of ten, as disks are sold. 0 is a size that is not known."""
    return f"{count / 1e9:.1f} GB" if count >= 50e6 else f"{count / 1e6:.1f} MB" if count else "unknown size"


def note_path(path: Path) -> Path:
    """The file beside a model file that keeps what the hub says of it: ``{sha256, size, mtime_ns, source, repo, file,
    revision}``."""
    return path.with_name(f"{path.name}.sha256")


def read_note(path: Path) -> dict[str, Any]:
    """What the hub says of a model file; empty where there is no note, or none that can be read."""
    try:
        return read_json(note_path(path))
    except (OSError, ValueError):
        return {}


def known_sha256(path: Path) -> str | None:
    """The sha256 that was checked for this very file; None where none is known, or the file has changed since."""
    noted, status = read_note(path), path.stat()
    unchanged = (noted.get("size"), noted.get("mtime_ns")) == (status.st_size, status.st_mtime_ns)
    return str(noted.get("sha256")) if unchanged else None


def files_identity(paths: Iterable[Path]) -> str:
    """A short text that changes when the files do, wherever they are: 32 hex digits.

    From the hub's sha256 where it is known; else from size, time of change and a hash of the header.
    """
    return hashlib.sha256("\n".join(known_sha256(path) or _stamp(path) for path in paths).encode()).hexdigest()[:32]


def _stamp(path: Path) -> str:
    with TensorFile(path) as file, path.open("rb") as stream:
        status = os.fstat(stream.fileno())
        header = hashlib.sha256(stream.read(file.header.data_start)).hexdigest()
    return f"{status.st_size}:{status.st_mtime_ns}:{header}"
