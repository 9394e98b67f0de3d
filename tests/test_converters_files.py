"""safetensors files: ours against the library's, and what no reader should swallow."""

import json
import os
import struct
import tracemalloc
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from i2l_ext.converters import atomic, files
from i2l_ext.converters.errors import UserError

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
tensors = st.dictionaries(
    st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__"),
    st.builds(lambda shape, dtype: (torch.randn(shape) * 8).to(dtype), shapes, st.sampled_from(DTYPES)),
    max_size=6,
)


@settings(deadline=None)
@given(tensors=tensors, metadata=st.dictionaries(st.text(max_size=6), st.text(max_size=6), max_size=3))
def test_round_trip_and_parity_with_the_library(tmp_path_factory, tensors, metadata):
    ours, theirs = (tmp_path_factory.mktemp("files") / name for name in ("ours", "theirs"))
    with ours.open("wb") as stream:
        files.write(stream, [files.WritePlan.of(name, tensor) for name, tensor in tensors.items()], metadata)
    safetensors.torch.save_file(tensors, theirs, metadata or None)  # with {} and no tensors it writes broken JSON
    library = safetensors.torch.load_file(ours)
    assert library.keys() == tensors.keys()
    for path in (ours, theirs):
        with files.TensorFile(path) as file:
            assert file.header.metadata == metadata
            for name, tensor in tensors.items():
                assert torch.equal(file.tensor(name), tensor)
                assert torch.equal(library[name], tensor)
                assert b"".join(bytes(piece) for piece in file.chunks(name)) == bytes(file.raw(name))


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16", "I64", "I32", "U8"])
def test_number_needs_no_torch_and_agrees_with_it(tmp_path, dtype):
    path = tmp_path / "number"
    safetensors.torch.save_file({"alpha": torch.tensor(24).to(files.torch_dtype(dtype))}, path)
    with files.TensorFile(path) as file:
        assert file.number("alpha") == 24


def test_a_vector_is_no_number(tmp_path):
    safetensors.torch.save_file({"alpha": torch.ones(2)}, tmp_path / "f")
    with files.TensorFile(tmp_path / "f") as file, pytest.raises(UserError, match="not a number"):
        file.number("alpha")


FLOATS = ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"]


@pytest.mark.parametrize("dtype", FLOATS)
@settings(deadline=None)
@given(data=st.binary(min_size=64, max_size=64))
def test_finite_agrees_with_torch(dtype, data):
    tensor = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(files.torch_dtype(dtype))
    assert files.all_finite(data, dtype) == bool(tensor.double().isfinite().all())


def test_finite_sees_the_last_number_of_a_long_tensor():
    numbers = np.zeros(files.CHUNK // 2 * 3 + 1, "<f2")
    assert files.all_finite(numbers.tobytes(), "F16")
    numbers[-1] = np.inf
    assert not files.all_finite(numbers.tobytes(), "F16")
    assert files.all_finite(b"", "F32")


def header(value: object, data: bytes = b"") -> bytes:
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    return struct.pack("<Q", len(text)) + text + data


def one(**changes: object) -> dict[str, object]:
    return {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | changes}


WRONG = {
    "empty": (b"", "empty"),
    "short": (b"\0\0\0", "cut short"),
    "header of 1 GB": (struct.pack("<Q", 1 << 30) + b"{" * 100, "cut short"),
    "not JSON": (header(b"{nonsense"), "not JSON"),
    "not text": (header(b'{"\xff": 1}'), "not text"),
    "a list": (header(b"[1]"), "not a safetensors"),
    "deep": (header(b'{"a":' * 20_000 + b"1" + b"}" * 20_000), "nested too deep|not described"),
    "name twice": (header(b'{"a": {}, "a": {}}'), "stands twice"),
    "unknown dtype": (header(one(dtype="F12"), b"\0" * 4), "unknown dtype"),
    "negative shape": (header(one(shape=[-1]), b"\0" * 4), "no proper shape"),
    "true shape": (header(one(shape=[True]), b"\0" * 4), "no proper shape"),
    "offsets": (header(one(data_offsets=[0, 8]), b"\0" * 8), "do not fit"),
    "gap": (header(one(data_offsets=[4, 8]), b"\0" * 8), "gap"),
    "truncated": (header(one(), b"\0" * 3), "cut short"),
    "rest": (header(one(), b"\0" * 5), "follow the last"),
    "metadata": (header({"__metadata__": {"a": 1}}), "metadata are not text"),
    "100,000 tensors": (
        header({f"t{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(100_000)}),
        "100000 tensors",
    ),
}


def greedy() -> dict[str, str]:
    """JSON of up to eight megabytes that becomes much more; each kind as long as can be, and as long as is read."""
    kinds = {
        "objects": '{"a":1}',
        "wide objects": '{"a":1,"b":2,"c":3}',
        "lists": "[]",
        "numbers": "1e9",
        "texts": '"ab"',
    }
    found = {
        "wide text": '{"__metadata__":{"a":"\U0001f600' + "x" * 8_000_000 + '"}}',
        "digits": '{"a":' + "1" * 8_000_000 + "}",
    }
    for name, value in kinds.items():
        for count in (8_000_000 // (len(value) + 1), 249_000 // (1 + sum(map(value.count, ",[{")))):
            found[f"{count} {name}"] = '{"a":[' + ",".join([value] * count) + "]}"
    for count in (600_000, 240_000, 24_000):
        members = ",".join(f'"{number:x}":1.5' for number in range(count))
        found[f"{count} names"] = "{" + members + "}"
        found[f"{count} names and a picture"] = '{"\U0001f600":1,' + members + "}"
    for count in (110_000, 30_000, 24_000):
        members = [rf'"t{n}":{{"dtype":"U8","shape":[0],"data\u005foffsets":[0,0]}}' for n in range(count)]
        found[f"{count} escaped keys"] = "{" + ",".join(members) + "}"
    return found


GREEDY = greedy()


@pytest.mark.parametrize("case", GREEDY)
def test_no_header_takes_much_memory(tmp_path, case):
    """Eight megabytes at most are read, and what they become is bounded too, in whatever way they are spelled."""
    path = tmp_path / "greedy.safetensors"
    path.write_bytes(header(GREEDY[case].encode()))
    assert path.stat().st_size < 9_000_000
    tracemalloc.start()
    try:
        with suppress(UserError), files.TensorFile(path):
            pass
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 100e6


def test_real_headers_are_far_below_the_bounds(tmp_path):
    """The largest there are: Style's heads, a training's state of them, a LoRA with a trainer's long metadata."""
    tags = json.dumps({f"a tag of some words {i}": i for i in range(40_000)})
    for name, count, metadata in (
        ("transformer_blocks.{}.attn.to_add_out.proj_in.weight", 2_880, {}),
        ("exp_avg_sq/transformer_blocks.{}.attn.to_add_out.proj_in.weight", 5 * 2_880, {}),
        ("lora_unet_transformer_blocks_{}_attn_to_add_out.lora_down.weight", 3 * 846, {"ss_tag_frequency": tags}),
    ):
        plans = [files.WritePlan(name.format(i), "F32", (1, 1), lambda: [b"\0" * 4]) for i in range(count)]
        with (tmp_path / "real").open("wb") as stream:
            files.write(stream, plans, metadata)
        with files.TensorFile(tmp_path / "real") as file:
            assert len(file.header.tensors) == count and file.header.metadata == metadata


def test_nothing_is_written_that_is_not_read_again(tmp_path):
    for words in ("x" * 9_000_000, "a, " * 300_000):
        with (tmp_path / "f").open("wb") as stream, pytest.raises(UserError, match="Shorten its description"):
            files.write(stream, [], {"modelspec.description": words})
        assert not (tmp_path / "f").stat().st_size


@pytest.mark.parametrize("case", WRONG)
def test_wrong_files_get_one_line(tmp_path, case):
    content, reason = WRONG[case]
    path = tmp_path / "wrong.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=reason) as caught:
        files.TensorFile(path)
    assert "wrong.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_real_header_of_a_gigabyte_is_not_read(tmp_path):
    path = tmp_path / "huge"
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", 1 << 30))
        stream.truncate((1 << 30) + 8)  # sparse: takes no disk
    with pytest.raises(UserError, match="claims 1074 MB"):
        files.TensorFile(path)


@settings(deadline=None)
@given(cut=st.integers(0, 200), flip=st.integers(0, 199), to=st.integers(0, 255))
def test_damage_is_an_error_of_ours_or_leaves_the_structure(tmp_path_factory, cut, flip, to):
    path = tmp_path_factory.mktemp("damage") / "f"
    data = bytearray(safetensors.torch.save({"ab": torch.arange(6.0), "c": torch.ones(2, 3)}))
    if flip < len(data):
        data[flip] = to
    path.write_bytes(data[: len(data) - cut] if cut else data)
    try:
        with files.TensorFile(path) as file:
            assert sum(entry.nbytes for entry in file.header.tensors.values()) + file.header.data_start == len(data)
            for name in file.header.tensors:
                file.raw(name)
    except UserError:
        pass


def test_a_file_that_changes_while_it_is_read(tmp_path):
    path = tmp_path / "f"
    safetensors.torch.save_file({"a": torch.ones(4)}, path)
    with files.TensorFile(path) as file:
        path.write_bytes(path.read_bytes() + b"more")
        with pytest.raises(UserError, match="changed while"):
            file.raw("a")


def test_atomic_path_is_whole_or_nothing(tmp_path):
    path = tmp_path / "out"
    with pytest.raises(RuntimeError), atomic.atomic_path(path) as part:
        part.write_bytes(b"half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with atomic.atomic_path(path) as part:
        part.write_bytes(b"first")
    with pytest.raises(UserError, match="exists already"), atomic.atomic_path(path) as part:
        part.write_bytes(b"second")
    assert path.read_bytes() == b"first"
    with atomic.atomic_path(path, overwrite=True) as part:
        part.write_bytes(b"third")
    assert path.read_bytes() == b"third"
    assert list(tmp_path.iterdir()) == [path]


def test_replace_text_keeps_the_old_file_where_writing_fails(tmp_path, monkeypatch):
    path = tmp_path / "settings.json"
    path.write_text("old")

    def half(self, text, **options):
        self.write_bytes(text.encode()[:1])
        raise OSError("full")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="full"):
        patched.setattr(Path, "write_text", half)
        atomic.replace_text(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    stale = tmp_path / ".i2l-0123456789abcdef.part"
    stale.touch()
    os.utime(stale, (1, 1))
    monkeypatch.setattr(atomic, "STALE_AFTER", -1.0)
    atomic.replace_text(path, "ä")
    assert path.read_bytes() == "ä".encode() and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="cannot be written"), atomic.atomic_path(tmp_path / "no" / "out"):
        pass


def test_saved_as_the_library_does(tmp_path):
    """Byte for byte, so that trained weights are what they were."""
    library = pytest.importorskip("safetensors.torch")
    tensors = {
        "b": torch.randn(3, 5).bfloat16(),
        "a": torch.randn(4, 2).bfloat16().T,
        "c": torch.zeros(0, 2).bfloat16(),
    }
    for one in (tensors, tensors | {"ä": torch.tensor(7), "d": torch.ones(3), "e": torch.ones(2).bool()}):
        files.save_file(one, tmp_path / "it")
        whole = {name: tensor.contiguous() for name, tensor in one.items()}
        assert (tmp_path / "it").read_bytes() == library.save(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["it"]
