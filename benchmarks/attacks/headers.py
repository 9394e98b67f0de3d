"""safetensors files whose headers lie: a mutator that knows what a header means, and all that reads such files here."""

from __future__ import annotations

import json
import struct
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from random import Random
from typing import Any

import torch

from attacks.bytes import damaged
from attacks.judge import Flaw, unclear
from i2l_ext.commands import main
from i2l_ext.converters.architectures import ARCHITECTURES
from i2l_ext.converters.files import BYTES, WritePlan, write
from i2l_ext.converters.files import TensorFile as Ours
from i2l_ext.converters.key_formats import KEY_FORMATS
from i2l_ext.converters.lora import Lora
from i2l_ext.decoder import DecoderSpec
from i2l_ext.models import store
from i2l_ext.models.catalogue import Checkpoint
from i2l_ext.weights import structure
from i2l_ext.weights.compute import ComputeOptions
from i2l_ext.weights.files import TensorFiles
from i2l_ext.weights.stream import stream

COUNTS = (
    0,
    1,
    2,
    3,
    7,
    96,
    1 << 16,
    (1 << 31) - 1,
    1 << 31,
    1 << 32,
    (1 << 48) - 1,
    1 << 48,
    1 << 63,
    1 << 64,
    10**400,
)
"""Sizes at which programs go wrong."""
THINGS = (None, True, -1, 1.5, -0.0, float("nan"), float("inf"), "", "F32", "4", [], {}, [[0]], {"a": 1}, *COUNTS)
"""What may stand where something else should."""
DTYPES = (*BYTES, "F4", "F8_E8M0", "C64", "f32", "float32", "", "BF16\0", "F16" * 5000)
NAMES = (
    "",
    "__metadata__",
    "\0",
    "\x1b[31mred",
    "\u202elora",
    "\ud800",
    "a" * 50_000,
    "../../etc/passwd",
    "C:\\con",
    "\n\nok",
    "transformer_blocks.0.attn.to_q.lora_A.weight",
    "lora_unet_layers_0_attention_qkv.alpha",
)


@dataclass
class Draft:
    """A file before it is written: tensors as (name, what is said of it), so that a name may stand twice."""

    tensors: list[tuple[str, Any]]
    data: bytes
    metadata: Any = None
    length: int | None = None
    tail: bytes = b""
    header: Callable[[str], bytes] = field(default=lambda text: text.encode("utf-8", "surrogatepass"))

    def bytes(self) -> bytes:
        pairs = [("__metadata__", self.metadata)] if self.metadata is not None else []
        text = ",".join(f"{json.dumps(name)}:{json.dumps(value)}" for name, value in [*pairs, *self.tensors])
        raw = self.header("{" + text + "}") + self.tail
        length = len(raw) if self.length is None else self.length
        return struct.pack("<Q", length % (1 << 64)) + raw + self.data


def _of(lora_bytes: bytes) -> Draft:
    size = struct.unpack("<Q", lora_bytes[:8])[0]
    raw = json.loads(lora_bytes[8 : 8 + size])
    return Draft(
        [(k, v) for k, v in raw.items() if k != "__metadata__"], lora_bytes[8 + size :], raw.get("__metadata__")
    )


def loras(folder: Path) -> list[bytes]:
    """Small sound LoRAs: every architecture, key format and dtype, a few modules each."""
    torch.manual_seed(0)
    found = []
    file = folder / "seed.safetensors"
    for arch in ARCHITECTURES.values():
        paths = sorted(arch.i2l_modules, key=lambda path: sum(arch.i2l_modules[path].shape))[:3]
        for number, key_format in enumerate(KEY_FORMATS):
            dtype = (torch.float32, torch.bfloat16, torch.float16)[number % 3]
            pairs = {}
            for path in paths:
                d_out, d_in = arch.modules[path].shape
                pairs[path] = torch.randn(2, d_in).to(dtype), torch.randn(d_out, 2).to(dtype)
            Lora.of(arch, pairs, {"i2l.model": "style", "notes": "{}"}).save(file, key_format, overwrite=True)
            found.append(file.read_bytes())
    file.unlink()
    return found


HEADS = Checkpoint(
    "small-heads",
    "heads",
    DecoderSpec(ARCHITECTURES["mini"], 24, compress=2),
    "attack/heads",
    ("heads.safetensors",),
    1000,
)
"""A checkpoint of the shape of an i2L model, smaller than any real one."""


def checkpoint(folder: Path) -> bytes:
    """One that is sound."""
    file = folder / "heads.safetensors"
    with file.open("wb") as out:
        write(
            out,
            [
                WritePlan.of(name, torch.zeros(tuple(shape), dtype=torch.bfloat16))
                for name, shape in HEADS.shapes.items()
            ],
        )
    raw = file.read_bytes()
    file.unlink()
    return raw


def _tensor(random: Random, draft: Draft) -> None:
    """Something wrong with what is said of a tensor."""
    index = random.randrange(len(draft.tensors))
    name, said = draft.tensors[index]
    if not isinstance(said, dict) or not {"shape", "dtype", "data_offsets"} <= said.keys() or not _listed(said):
        return  # told a lie of already
    said = dict(said)
    draw = random.randrange(8)
    if draw == 0:
        said["dtype"] = random.choice(DTYPES)
    elif draw == 1:
        shape = list(said["shape"]) or [1]
        shape[random.randrange(len(shape))] = random.choice(THINGS)
        said["shape"] = shape
    elif draw == 2:
        offsets = list(said["data_offsets"])
        if [type(offset) for offset in offsets] != [int, int]:
            return
        offsets[random.randrange(2)] = random.choice((*THINGS, offsets[0] + 1, offsets[1] - 1))
        said["data_offsets"] = offsets
    elif draw == 3:
        said[random.choice(list(said))] = random.choice(THINGS)
    elif draw == 4:
        said.pop(random.choice(list(said)))
    elif draw == 5:
        said["shape"] = random.choice(([*said["shape"], 1], said["shape"][::-1], [1] * 20, [], [0, *said["shape"]]))
    elif draw == 6:
        draft.tensors[index] = (random.choice(NAMES), said)
        return
    else:
        said = random.choice(THINGS)
    draft.tensors[index] = (name, said)


def _listed(said: dict[str, Any]) -> bool:
    return all(isinstance(said[name], list) for name in ("shape", "data_offsets")) and len(said["data_offsets"]) == 2


def _whole(random: Random, draft: Draft) -> None:
    """Something wrong with all of them: twice, missing, too many, overlapping, in another order."""
    draw = random.randrange(8)
    if draw == 0:
        draft.tensors.append(random.choice(draft.tensors))
    elif draw == 1:
        draft.tensors.pop(random.randrange(len(draft.tensors)))
    elif draw == 2:
        draft.tensors += [
            (f"{index}", {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]})
            for index in range(random.choice((10, 1000, 8000)))
        ]
    elif draw == 3:
        first, second = random.choice(draft.tensors)[1], random.choice(draft.tensors)[1]
        if isinstance(first, dict) and isinstance(second, dict) and "data_offsets" in second:
            first["data_offsets"] = second["data_offsets"]
    elif draw == 4:
        random.shuffle(draft.tensors)
    elif draw == 5:
        draft.tensors = []
    elif draw == 6:
        other = random.choice(NAMES)
        draft.tensors = [(other + name if random.random() < 0.5 else name, said) for name, said in draft.tensors]
    else:
        swap = random.choice(
            (".alpha", ".lora_A.weight", ".lora_down.weight", ".lokr_w1", ".bias", "_B.default.weight")
        )
        index = random.randrange(len(draft.tensors))
        draft.tensors[index] = (draft.tensors[index][0].rpartition(".lora")[0] + swap, draft.tensors[index][1])


def _around(random: Random, draft: Draft) -> None:
    """Something wrong with the length, the metadata, the text or the data."""
    draw = random.randrange(9)
    if draw == 0:
        draft.length = random.choice((0, 1, 2, len(draft.data), 1 << 20, 1 << 26, 1 << 32, (1 << 64) - 1))
    elif draw == 1:
        draft.metadata = random.choice((*THINGS, {"a": "b" * 100_000}, {name: name for name in NAMES}, {"a": {"b": 1}}))
    elif draw == 2:
        draft.tail = random.choice((b" " * 9, b"\0" * 8, b"}", b"{}", b"\xff" * 5))
    elif draw == 3:
        draft.header = lambda text: damaged(random, text.encode("utf-8", "surrogatepass"), 2)
    elif draw == 4:
        draft.header = lambda text: text.encode(random.choice(("utf-16", "utf-32", "utf-8-sig")), "surrogatepass")
    elif draw == 5:
        deep = random.choice((10, 500, 20_000))
        draft.header = lambda text: (text[:-1] + ',"x":' + "[" * deep + "]" * deep + "}").encode(
            "utf-8", "surrogatepass"
        )
    elif draw == 6:
        draft.data = random.choice(
            (b"", draft.data[:-1], draft.data + b"\0", draft.data * 2, damaged(random, draft.data))
        )
    elif draw == 7:
        value = random.choice(
            (b"\xff\xff", b"\0\x7c", b"\0\0\x80\x7f", b"\0\0\xc0\x7f", b"\0\0\0\0")
        )  # NaN, infinity, zero
        at = random.randrange(0, max(1, len(draft.data) - 4), 2)
        draft.data = draft.data[:at] + value + draft.data[at + len(value) :]
    else:
        draft.header = lambda text: text.replace('"', random.choice(("'", "\\u0022")), 2).encode(
            "utf-8", "surrogatepass"
        )


LIES: Sequence[Callable[[Random, Draft], None]] = (_tensor, _tensor, _tensor, _whole, _whole, _around)


def lying(random: Random, sound: bytes) -> bytes:
    """A file with one to three lies in it, or none in one case of fifty."""
    draft = _of(sound)
    for _ in range(0 if random.random() < 0.1 else random.choice((1, 1, 1, 2, 3))):
        if draft.tensors:
            random.choice(LIES)(random, draft)
    return draft.bytes()


COMMANDS: Sequence[Sequence[str]] = (
    ("inspect", "IN"),
    ("inspect", "IN"),
    ("inspect", "IN", "--header"),
    ("check", "IN"),
    ("check", "IN"),
    *(("convert", "IN", "--to", key_format, "-o", "OUT") for key_format in KEY_FORMATS),
    ("convert", "IN", "-o", "OUT", "--dtype", "fp16"),
    ("convert", "IN", "-o", "OUT", "--dtype", "fp32"),
    ("convert", "IN", "-o", "OUT", "--blocks", "0:0.5", "--kinds", "attn"),
    ("rank", "IN", "--rank", "1", "-o", "OUT"),
    ("rank", "IN", "--rank", "3", "-o", "OUT"),
    ("rank", "IN", "--effect-kept", "0.9", "--per-module", "-o", "OUT"),
    ("merge", "IN:0.5", "IN:-2", "-o", "OUT"),
    ("merge", "IN", "GOOD", "--rank", "2", "-o", "OUT"),
)
"""What `i2l` does with LoRA files; GOOD is a sound one."""


def start_loras(folder: Path) -> tuple[Callable[[Random], Any], Callable[[Path, Any], None]]:
    """Through the commands that read a LoRA."""
    torch.set_num_threads(1)
    sound = loras(folder)
    good = folder / "good.safetensors"
    good.write_bytes(sound[-1])
    parser = main.parser()

    def make(random: Random) -> tuple[bytes, Sequence[str]]:
        words = random.choice(COMMANDS)
        return lying(random, random.choice(sound)), [*words, "--json"] if random.random() < 0.5 else words

    def feed(box: Path, given: tuple[bytes, Sequence[str]]) -> None:
        run_command(parser.parse_args, box, good, *given)

    return make, feed


def run_command(
    parse: Callable[[list[str]], Namespace], box: Path, good: Path, data: bytes, words: Sequence[str]
) -> None:
    """One command on one file. Raises UserError, or Flaw where what was written or said is not as promised."""
    file, out = box / "in.safetensors", box / "out.safetensors"
    file.write_bytes(data)
    places = {"IN": str(file), "OUT": str(out), "GOOD": str(good)}
    filled = [places.get(word, word.replace("IN:", f"{file}:")) for word in words]
    said, warned = StringIO(), StringIO()
    with redirect_stdout(said), redirect_stderr(warned):
        args = parse(filled)
        code = args.run(args)
    if args.json:
        json.loads(said.getvalue())
    elif strange := [char for char in said.getvalue().replace("\n", "") if not char.isprintable()]:
        raise Flaw(f"prints {strange[0]!a}")
    for line in warned.getvalue().splitlines():
        if flaw := unclear(line):
            raise Flaw(f"a warning {flaw[1]}")
    if file.read_bytes() != data:
        raise Flaw("the input was changed")
    if code == 0 and words[0] in ("convert", "rank", "merge"):
        _hold(out)


def _hold(out: Path) -> None:
    """What was written is read by the safetensors library and by ourselves, and finite."""
    from safetensors.torch import load_file

    library = load_file(out)
    if not library or not all(bool(torch.isfinite(tensor.float()).all()) for tensor in library.values()):
        raise Flaw("what was written is empty or not finite")
    with Ours(out) as file:
        if {name: tuple(tensor.shape) for name, tensor in library.items()} != file.header.shapes:
            raise Flaw("the library reads other shapes")
    Lora.read(out).source.file.close()


def start_checkpoints(folder: Path) -> tuple[Callable[[Random], Any], Callable[[Path, Any], None]]:
    """Through all that reads a checkpoint: the store, structure, streaming, indexes."""
    torch.set_num_threads(1)
    sound = checkpoint(folder)
    index = json.dumps({"weight_map": {"a": "in-1.safetensors", "b": "in-2.safetensors"}}).encode()

    def make(random: Random) -> tuple[str, bytes]:
        if random.random() < 0.15:
            return "index", damaged(random, index, random.choice((1, 2, 5)))
        return random.choice(("locate", "stream", "shards")), lying(random, sound)

    return make, feed_checkpoint


def feed_checkpoint(box: Path, given: tuple[str, bytes]) -> None:
    """Raises UserError."""
    kind, data = given
    home = box / "in" / "attack" / "heads"
    home.mkdir(parents=True)
    file = home / ("model.safetensors.index.json" if kind == "index" else "heads.safetensors")
    file.write_bytes(data)
    if kind == "index":
        if any(path.parent != home for path in store.shards(file)):
            raise Flaw("a list of shards leads out of its folder")
        return
    if kind == "locate":
        found = store.locate(HEADS, store.Folders(box / "in"))
        if found is None:
            raise Flaw("a file that is there was not found")
        store.files_identity(found)
    structure.check_structure(file.name, HEADS.shapes, store.shapes_of([file]))
    paths = [file]
    if kind == "shards":
        other = home / "other.safetensors"
        with other.open("wb") as out:
            write(out, [WritePlan.of("one.more", torch.zeros(3))])
        paths.append(other)
    with TensorFiles(paths) as files:
        files.check(HEADS.shapes)
        for _ in stream(files, [{key: key} for key in HEADS.shapes], ComputeOptions(dtype="float32")):
            pass
