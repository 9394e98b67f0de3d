"""What only a real system can tell, in ten lines that a user can send back: nothing in them is private.

It makes a small LoRA with the built-in miniature, converts it and reads it back, measures disk and processor, starts an
engine process and stops it. All of it happens in a temporary folder that is gone afterwards.
"""

from __future__ import annotations

import locale
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from i2l_ext import __version__
from i2l_ext.converters import atomic
from i2l_ext.converters.errors import UserError, one_line
from i2l_ext.engine.locks import Lock
from i2l_ext.engine.process import EngineProcess, command
from i2l_ext.library.names import LONGEST
from i2l_ext.operations.context import Context
from i2l_ext.operations.lora_files import convert_lora
from i2l_ext.operations.make import MINIATURE, make_lora
from i2l_ext.requests import PROTOCOL, ConvertRequest, MakeRequest

NAME = "\u00e4\u56fe-test"
"""Of the LoRA that is made: letters that code pages of Windows lack."""

FAILED = "FAILED"
"""How the line of a check begins that came out badly."""

READ_BYTES = 128 << 20
SIDE = 2048
"""Rows and columns of the matrices that are multiplied to time a device."""


def self_test(context: Context) -> Iterator[tuple[str, str]]:
    """Ten facts, (name, value). One that FAILED says why; it raises nothing for it."""
    with TemporaryDirectory(prefix="i2l-test-", ignore_cleanup_errors=True) as place:
        folder = Path(place).resolve()
        for name, check in CHECKS.items():
            try:
                value = check(folder, context)
            except Exception as error:  # noqa: BLE001 - whatever it is, its line is to say so
                told = one_line(f"{type(error).__name__}: {error}").replace(str(folder), "…")
                value = f"{FAILED}: {told[:200]}"
            yield name, value


def _system(folder: Path, context: Context) -> str:
    import torch

    packages = f"Python {platform.python_version()}, torch {torch.__version__}"
    cores = f"{os.cpu_count()} cores, of which torch uses {torch.get_num_threads()}"
    return f"i2l {__version__}, {platform.platform()}, {packages}, {cores}"


def _console(folder: Path, context: Context) -> str:
    encodings = (sys.stdout.encoding, sys.getfilesystemencoding(), locale.getpreferredencoding(False))
    return "console {}, names {}, texts {}".format(*encodings) + (", a terminal" if sys.stdout.isatty() else "")


def _names(folder: Path, context: Context) -> str:
    """What a disk makes of names. That it lacks something is no failure: nothing is built on it."""
    (folder / "Case").mkdir()
    found = ["upper and lower case are one" if (folder / "cASE").exists() else "upper and lower case differ"]
    (folder / "\u00e4\u56fe").mkdir()
    form = next(one.name for one in folder.iterdir() if one.name != "Case")
    found.append("letters as written" if form == "\u00e4\u56fe" else "letters taken apart")
    deep = folder.joinpath(*["d" * 50] * 5, "f" * LONGEST)
    try:
        deep.parent.mkdir(parents=True)
        deep.write_bytes(b"")
        found.append(f"paths of {len(str(deep))} characters")
    except OSError:
        found.append(f"no paths of {len(str(deep))} characters")
    return ", ".join(found)


def _locks(folder: Path, context: Context) -> str:
    """Two locks on a file exclude each other, and a file that is there is not replaced unasked."""
    one, two = Lock(folder / "lock"), Lock(folder / "lock")
    if not one.acquire() or two.acquire():
        return f"{FAILED}: two held one lock"
    one.release()
    if not two.acquire():
        return f"{FAILED}: a lock stayed"
    two.release()
    links = "hard links"
    (folder / "a").write_bytes(b"a")
    try:
        os.link(folder / "a", folder / "b")
    except OSError:
        links = "no hard links"
    with suppress(UserError), atomic.atomic_path(folder / "a") as path:
        path.write_bytes(b"other")
    if (folder / "a").read_bytes() != b"a":
        return f"{FAILED}: a file was replaced unasked"
    with atomic.atomic_path(folder / "a", overwrite=True) as path:
        path.write_bytes(b"other")
    return f"locks hold, {links}, files are replaced whole"


def _read(folder: Path, context: Context) -> str:
    """The rate at which weights are read, beside a plain read of the same file. It was just written, so it may come
    from memory."""
    import torch

    from i2l_ext.converters.files import TensorFile, save_file
    from i2l_ext.weights.compute import DEFAULT_OPTIONS
    from i2l_ext.weights.file_reader import FileReader
    from i2l_ext.weights.files import TensorFiles
    from i2l_ext.weights.stream import stream

    path, keys = folder / "weights.safetensors", [f"t{number}" for number in range(16)]
    save_file(dict.fromkeys(keys, torch.ones(READ_BYTES // len(keys) // 2, dtype=torch.bfloat16)), path)

    def plainly() -> bool:
        area = bytearray(16 << 20)
        with path.open("rb", buffering=0) as file:
            while file.readinto(area):
                pass
        return True

    def as_weights() -> bool:
        groups = [{key: key} for key in keys]
        with TensorFiles([path]) as files, closing(stream(files, groups, DEFAULT_OPTIONS)) as read:
            return sum(float(group[key].view(torch.int16)[-1]) for key, group in zip(keys, read, strict=True)) > 0

    rates = []
    for job in (plainly, as_weights):
        job()  # to warm up
        start = time.perf_counter()
        if not job():
            return f"{FAILED}: other values came back"
        rates.append(READ_BYTES / 1e6 / (time.perf_counter() - start))
    with TensorFile(path) as opened:
        reader = FileReader(opened, direct=True)
        past = "past the page cache too" if reader.can_read_directly else "not past the page cache"
        reader.close()
    path.unlink()
    return f"{rates[1]:.0f} MB/s as weights, {rates[0]:.0f} plainly, {past}"


def _made(folder: Path) -> Path:
    """The LoRA of the check ``makes``."""
    return folder / "Lora" / f"{NAME}.safetensors"


def _make(folder: Path, context: Context) -> str:
    from PIL import Image

    picture = folder / "Bild \u56fe.png"
    Image.linear_gradient("L").convert("RGB").save(picture)
    options = replace(context.options, device="cpu", cache_bytes=0)
    start = time.perf_counter()
    made = make_lora(MakeRequest((picture,), NAME, _made(folder).parent, MINIATURE), Context(options))
    return f"{made.modules} modules, {made.bytes / 1e6:.1f} MB, in {time.perf_counter() - start:.1f} s"


def _convert(folder: Path, context: Context) -> str:
    """There and back again: the numbers are the same."""
    from i2l_ext.converters.files import load_file

    there, back = folder / "there.safetensors", folder / "back.safetensors"
    convert_lora(ConvertRequest(_made(folder), "kohya", there), Context())
    convert_lora(ConvertRequest(there, output=back), Context())
    before, after = load_file(_made(folder)), load_file(back)
    same = before.keys() == after.keys() and all(bool((before[key] == after[key]).all()) for key in before)
    return f"{len(before)} tensors there and back" if same else f"{FAILED}: other tensors came back"


def _engine(folder: Path, context: Context) -> str:
    """A process is started, answers, and ends when it is told to."""
    message = {"protocol": PROTOCOL, "kind": "inspect", "request": {"file": str(_made(folder))}}
    start = time.perf_counter()
    process = EngineProcess(message, command(), {})
    last = list(process.events())[-1]
    process.stop()
    code = process.wait()
    if code or last["event"] != "done":
        return f"{FAILED}: {one_line(str(last.get('error', code)))[:200]}"
    answered = time.perf_counter() - start
    process = EngineProcess(message, command(), {})
    start = time.perf_counter()
    process.stop()
    list(process.events())
    process.wait()
    return f"answered in {answered:.1f} s, stopped in {time.perf_counter() - start:.1f} s"


def _compute(folder: Path, context: Context) -> str:
    """Products of matrices on the device that computes, in every dtype that it has."""
    import torch

    from i2l_ext.weights.devices import PRECISION_WORDS, device_facts, resolve_device

    device = resolve_device(context.options.device)
    facts, said = device_facts(device), []
    for dtype, word in PRECISION_WORDS.items():
        if not facts.native(dtype):
            continue
        matrix = torch.ones(SIDE, SIDE, dtype=getattr(torch, dtype), device=device)
        float((matrix @ matrix)[0, 0])  # to warm up
        start = time.perf_counter()
        product = matrix @ matrix
        value = float(product[0, 0])  # waits for the device
        seconds = time.perf_counter() - start
        if value != SIDE:
            return f"{FAILED}: {word} gives {value:g} for {SIDE}"
        said.append(f"{word} {2 * SIDE**3 / seconds / 1e9:.0f} GFLOP/s")
    return f"{facts}: {', '.join(said)}"


def _device_embedding(folder: Path, context: Context) -> str:
    """What the miniature's encoder makes of a picture there, beside what the processor makes of it."""
    import torch

    from i2l_ext.encoders import siglip2
    from i2l_ext.models import catalogue, store
    from i2l_ext.weights.compute import ComputeOptions
    from i2l_ext.weights.devices import resolve_device

    encoder = next(part for part in catalogue.find(MINIATURE).encoders if part.kind == "siglip2")
    paths = store.require(catalogue.find(MINIATURE))[encoder.id]
    side = encoder.spec.image
    pixels = torch.linspace(-1, 1, 3 * side**2).reshape(1, 3, side, side)
    here, there = (
        siglip2.encode(paths, encoder.spec, [pixels], ComputeOptions(device, "float32"))[0]
        for device in ("cpu", resolve_device(context.options.device))
    )
    apart = float((here - there).norm() / here.norm())
    return f"{apart:.1e} from the processor's" if apart < 1e-3 else f"{FAILED}: {apart:.1e} from the processor's"


CHECKS: dict[str, Callable[[Path, Context], str]] = {
    "system": _system,
    "encodings": _console,
    "names": _names,
    "locks": _locks,
    "reads": _read,
    "makes": _make,
    "converts": _convert,
    "engine": _engine,
    "computes": _compute,
    "embeds": _device_embedding,
}
"""In the order in which they run: some use what an earlier one made."""
