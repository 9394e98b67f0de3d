"""Streaming: every value, every byte once, few buffers, faults with a name, and a stop that comes at once."""

from __future__ import annotations

import os
import threading
import time
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from i2l_ext.converters.errors import Cancelled, UserError
from i2l_ext.converters.files import TensorFile
from i2l_ext.encoders import dinov3, siglip2
from i2l_ext.weights import file_reader, layers, reads
from i2l_ext.weights import files as tensor_files
from i2l_ext.weights.compute import NO_CALLBACKS, Callbacks, ComputeOptions
from i2l_ext.weights.files import TensorFiles
from i2l_ext.weights.layers import StreamedLayers, plan_memory, run_layers
from i2l_ext.weights.stream import load_weights, stream
from small_encoders import DINOV3, SIGLIP, relative, save, weights

FP32 = ComputeOptions(dtype="float32")
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


def numbers(count, seed=0):
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def seen_reads(monkeypatch):
    """Every (file, position, bytes) that is read."""
    seen, plain = [], TensorFile.read

    def read(self, position, buffer):
        seen.append((self.path.name, position, len(buffer)))
        plain(self, position, buffer)

    monkeypatch.setattr(TensorFile, "read", read)
    return seen


def chain(tmp_path, depth=4, width=8, dtype=torch.float32):
    """A stack of plain matrices, its file, and what it makes of a batch."""
    tensors = weights({f"layers.{i}.weight": (width, width) for i in range(depth)})
    path = save(tmp_path / "chain.safetensors", tensors, dtype)
    with torch.device("meta"):
        modules = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(depth)).requires_grad_(False)

    def step(index, layer, state):
        held = [index] if dtype == torch.float32 else []  # other numbers are never a whole matrix
        assert [i for i, module in enumerate(modules) if not module.weight.is_meta] == held
        return layer(state)

    stack = StreamedLayers(
        layers=modules,
        keys=[{"weight": f"layers.{i}.weight"} for i in range(depth)],
        enter=lambda batch: batch,
        step=step,
        leave=lambda state: state,
        cost=lambda batch: (width, 2 * width),
    )

    def expected(batch):
        for i in range(depth):
            batch = batch @ tensors[f"layers.{i}.weight"].T
        return batch

    return path, stack, expected


def reading():
    return [thread for thread in threading.enumerate() if thread.name.startswith("i2l-read")]


# ---- files


def test_shards_are_one_checkpoint(tmp_path):
    one = save(tmp_path / "one.safetensors", {"a": numbers(4), "b": numbers(6).reshape(3, 2)})
    two = save(tmp_path / "two.safetensors", {"c": numbers(2)}, torch.float16)
    with TensorFiles([one, two]) as files:
        assert files.shapes == {"a": (4,), "b": (3, 2), "c": (2,)}
        files.check({"a": (4,), "c": (2,)})
        assert torch.equal(files.rows("b", [2, 0, 2]), numbers(6).reshape(3, 2)[[2, 0, 2]])
        with pytest.raises(UserError, match=r"one\.safetensors and 1 more: the tensor 'd' is missing"):
            files.check({"d": (1,)})
        with pytest.raises(UserError, match=r"two\.safetensors: the tensor 'c' has the shape \[2\], not \[3\]"):
            files.check({"c": (3,)})


def test_shards_must_not_overlap(tmp_path):
    paths = [save(tmp_path / f"{name}.safetensors", {"a": numbers(4)}) for name in ("one", "two")]
    with pytest.raises(UserError, match=r"two\.safetensors: the tensor 'a' is in another"):
        TensorFiles(paths)


def test_only_floats_are_weights(tmp_path):
    path = save(tmp_path / "x.safetensors", {"a": torch.arange(4)}, torch.int8)
    with TensorFiles([path]) as files, pytest.raises(UserError, match="'a' holds I8, not floats"):
        list(stream(files, [{"a": "a"}], FP32))


# ---- values and buffers


@settings(deadline=None, max_examples=30)
@given(
    sizes=st.lists(st.lists(st.integers(0, 700), min_size=1, max_size=4), min_size=1, max_size=6),
    disk=st.sampled_from(DTYPES),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    ahead=st.integers(0, 3),
    piece=st.sampled_from([64, 1 << 20]),
    direct=st.booleans(),
    odd=st.booleans(),
)
def test_every_value_arrives(tmp_path_factory, sizes, disk, dtype, ahead, piece, direct, odd):
    path = tmp_path_factory.mktemp("values") / "x.safetensors"
    groups = [{f"t{j}": f"g{i}.t{j}" for j in range(len(group))} for i, group in enumerate(sizes)]
    tensors = {f"g{i}.t{j}": numbers(n, 7 * i + j) for i, group in enumerate(sizes) for j, n in enumerate(group)}
    save(path, tensors, disk)
    if odd:
        at_odd_places(path)
    if direct:
        out_of_cache(path)
    pointers = set()
    with pytest.MonkeyPatch.context() as patch, ExitStack() as opened:
        patch.setattr(reads, "READ_SIZE", piece)
        patch.setattr(tensor_files, "exceeds_page_cache", lambda size: direct)
        files, count = opened.enter_context(TensorFiles([path])), 0
        for names, got in zip(groups, stream(files, groups, ComputeOptions(dtype=dtype), ahead=ahead), strict=True):
            count += 1
            for name, key in names.items():
                assert got[name].dtype == getattr(torch, dtype)
                assert torch.equal(got[name], tensors[key].to(disk).to(getattr(torch, dtype)))
            pointers |= {got["t0"].untyped_storage().data_ptr()} - {0}
        assert count == len(groups)
    assert len(pointers) <= 1 + ahead


def at_odd_places(path):
    """One more space in the header, and every tensor starts at an odd byte."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    path.write_bytes((length + 1).to_bytes(8, "little") + data[8 : 8 + length] + b" " + data[8 + length :])


def out_of_cache(path):
    if hasattr(os, "posix_fadvise"):
        with path.open("rb+") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def test_files_too_large_to_keep_are_read_past_the_page_cache(tmp_path, monkeypatch, seen_reads):
    tensors = {f"t{i}": numbers(1_000_003, i) for i in range(3)}
    path = save(tmp_path / "x.safetensors", tensors)
    monkeypatch.setattr(tensor_files, "exceeds_page_cache", lambda size: True)
    names = {name: name for name in tensors}

    def plainly_read():
        seen_reads.clear()
        with TensorFiles([path]) as files:
            (got,) = stream(files, [names], FP32)
            assert all(torch.equal(got[name], tensor) for name, tensor in tensors.items())
        return sum(count for *_, count in seen_reads)

    with TensorFile(path) as file:
        number = file_reader._reopen_direct(file.fileno())
    possible = number is not None
    if possible:
        os.close(number)
    whole = sum(tensor.nbytes for tensor in tensors.values())
    assert plainly_read() == (0 if possible else whole)  # what is not on the disk yet is seen too
    out_of_cache(path)
    assert plainly_read() == (0 if possible else whole)
    for broken in (lambda number: None, lambda number: os.open(path, os.O_WRONLY)):
        monkeypatch.setattr(file_reader, "_reopen_direct", broken)
        out_of_cache(path)
        assert plainly_read() == whole


def test_only_what_memory_has_room_for_is_kept():
    assert not file_reader.exceeds_page_cache(1)
    if Path("/proc/meminfo").exists():
        assert file_reader.exceeds_page_cache(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def test_every_byte_is_read_once_for_all_pictures(tmp_path, seen_reads):
    path, stack, _ = chain(tmp_path, dtype=torch.bfloat16)
    with TensorFiles([path]) as files:
        run_layers(files, stack, [numbers(8 * count).reshape(count, 8) for count in (1, 16)], FP32)
        stored = sum(entry.nbytes for entry in files.files[0].header.tensors.values())
    assert len(set(seen_reads)) == len(seen_reads)
    assert sum(count for *_, count in seen_reads) == stored


def test_the_next_layer_is_read_ahead(tmp_path, seen_reads):
    path, stack, _ = chain(tmp_path)
    with TensorFiles([path]) as files:
        starts = [files.files[0].header.data_start + 8 * 8 * 4 * i for i in range(4)]
        for ahead in (0, 1, 2):
            seen_reads.clear()
            with closing(stream(files, stack.keys, FP32, ahead=ahead)) as groups:
                next(groups)
                time.sleep(0.1)
                assert sorted(start for _, start, _ in seen_reads) == starts[: 1 + ahead]
    assert not reading()


def test_a_walk_holds_one_layer_and_leaves_none(tmp_path):
    path, stack, expected = chain(tmp_path)
    batches = [numbers(40).reshape(5, 8), numbers(16, 1).reshape(2, 8)]
    with TensorFiles([path]) as files:
        results = run_layers(files, stack, batches, FP32)
    for batch, result in zip(batches, results, strict=True):
        assert relative(result, expected(batch)) < 1e-6
    assert all(weight.is_meta for weight in stack.layers.parameters())
    assert not reading()


def test_load_is_for_good(tmp_path):
    path = save(tmp_path / "x.safetensors", {"w": numbers(6).reshape(2, 3)}, torch.bfloat16)
    with torch.device("meta"):
        part = nn.Linear(3, 2, bias=False)
    with TensorFiles([path]) as files:
        load_weights(files, part, {"weight": "w"}, FP32)
    assert torch.equal(part.weight, numbers(6).reshape(2, 3).bfloat16().float())


# ---- memory


def test_plan_shares_memory_out(monkeypatch):
    monkeypatch.setattr(layers, "OVERHEAD", 10)
    sizes = {"layer": 100, "fixed": 50, "state": 4, "peak": 20}
    assert plan_memory(None, **sizes).ahead == 1
    roomy = plan_memory(1000, **sizes)
    assert roomy.ahead == 1 and roomy.inside + roomy.between == 1000 - 10 - 50 - 200
    tight = plan_memory(10 + 50 + 100 + 24, **sizes)
    assert (tight.ahead, tight.inside, tight.between) == (0, 20, 4)
    with pytest.raises(UserError, match=r"--memory 0\.0GB is too little for this model: it needs"):
        plan_memory(10 + 50 + 100 + 23, **sizes)


def test_little_memory_gives_the_same_in_more_rounds(tmp_path, monkeypatch, seen_reads):
    path, stack, expected = chain(tmp_path)
    monkeypatch.setattr(layers, "OVERHEAD", 0)
    batch = numbers(80).reshape(10, 8)
    layer, state = 4 * 64, 4 * 8
    shares = []
    with TensorFiles([path]) as files:
        # beside all pixels and one layer there is room for two pictures at work and three waiting: five rounds of two
        bound = ComputeOptions(dtype="float32", memory=batch.nbytes + layer + 8 * state)
        (result,) = run_layers(files, stack, [batch], bound, Callbacks(progress=shares.append))
    assert relative(result, expected(batch)) < 1e-6
    assert sum(count for *_, count in seen_reads) == 5 * 4 * layer
    assert shares == sorted(shares) and shares[-1] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_counts_with_the_bytes_of_its_file(tmp_path, monkeypatch, dtype):
    """On a processor it is never wide as a whole. Room for it, one picture at work and one waiting is enough."""
    path, stack, expected = chain(tmp_path, dtype=dtype)
    monkeypatch.setattr(layers, "OVERHEAD", 0)
    batch = numbers(80).reshape(10, 8)
    least = batch.nbytes + dtype.itemsize * 64 + 4 * (8 + 16)
    with TensorFiles([path]) as files:
        (result,) = run_layers(files, stack, [batch], ComputeOptions(dtype="float32", memory=least))
        with pytest.raises(UserError, match="is too little"):
            run_layers(files, stack, [batch], ComputeOptions(dtype="float32", memory=least - 1))
    assert relative(result, expected(batch)) < (1e-6 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize(("module", "small"), [(siglip2, SIGLIP), (dinov3, DINOV3)], ids=["siglip2", "dinov3"])
def test_encoders_under_a_bound(tmp_path, monkeypatch, module, small):
    path = save(tmp_path / "model.safetensors", weights(module.structure(small)))
    pixels = torch.randn(6, 3, small.image, small.image)
    shares = []
    (free,) = module.encode([path], small, [pixels], FP32, Callbacks(progress=shares.append))
    monkeypatch.setattr(layers, "OVERHEAD", 0)
    with pytest.raises(UserError, match="needs"):
        module.encode([path], small, [pixels], ComputeOptions(dtype="float32", memory=100_000))
    (bound,) = module.encode([path], small, [pixels], ComputeOptions(dtype="float32", memory=600_000))
    assert relative(bound, free) < 1e-5
    assert shares == sorted(shares) and shares[-1] == 1


# ---- faults


def faulty(tmp_path, change):
    tensors = weights(siglip2.structure(SIGLIP))
    change(tensors)
    return save(tmp_path / "model.safetensors", tensors)


def encode(path, callbacks=NO_CALLBACKS):
    return siglip2.encode([path], SIGLIP, [torch.zeros(2, 3, SIGLIP.image, SIGLIP.image)], FP32, callbacks)


def test_a_missing_tensor_is_named(tmp_path):
    key = "encoder.layers.1.mlp.fc1.weight"
    path = faulty(tmp_path, lambda tensors: tensors.pop(key))
    with pytest.raises(UserError, match=rf"model\.safetensors: the tensor '{key}' is missing"):
        encode(path)


def test_a_wrong_shape_is_named(tmp_path):
    key = "encoder.layers.2.self_attn.q_proj.bias"
    path = faulty(tmp_path, lambda tensors: tensors.update({key: torch.zeros(63)}))
    with pytest.raises(UserError, match=rf"'{key}' has the shape \[63\], not \[64\]"):
        encode(path)


def test_a_file_cut_short(tmp_path):
    path = faulty(tmp_path, lambda tensors: None)
    with path.open("rb+") as file:
        file.truncate(path.stat().st_size - 1)
    with pytest.raises(UserError, match=r"model\.safetensors: .*cut short"):
        encode(path)


def shorten(path):
    os.truncate(path, path.stat().st_size // 2)


def touch(path):
    os.utime(path, ns=(1, 1))


@pytest.mark.parametrize("change", [shorten, touch])
def test_a_file_that_changes_under_us(tmp_path, change):
    path, stack, _ = chain(tmp_path)

    def progress(share):
        if share <= 0.25:
            change(path)

    message = r"chain\.safetensors: the file .* while it was read.*'layers\.\d\.weight'"
    with TensorFiles([path]) as files, pytest.raises(UserError, match=message):
        run_layers(files, stack, [numbers(8)[None]], FP32, Callbacks(progress=progress))
    assert not reading()


# ---- stopping


def test_cancel_while_computing(tmp_path):
    path = faulty(tmp_path, lambda tensors: None)
    asked, done = [], []

    def cancelled():
        asked.append(1)
        return bool(done)

    with pytest.raises(Cancelled):
        encode(path, Callbacks(progress=done.append, cancelled=cancelled))
    assert len(done) == 1  # nothing went on after the first layer
    assert not reading()
    asked.clear()
    encode(path, Callbacks(cancelled=lambda: asked.append(1)))
    assert len(asked) > 3 * 6  # before every matrix product of three layers


def test_cancel_while_a_slow_disk_is_read(tmp_path, monkeypatch):
    path, stack, _ = chain(tmp_path, depth=3, width=256)
    plain = TensorFile.read

    def slow(self, position, buffer):
        time.sleep(0.1)
        plain(self, position, buffer)

    monkeypatch.setattr(TensorFile, "read", slow)
    monkeypatch.setattr(reads, "READ_SIZE", 1 << 10)  # 256 reads a layer, two at a time: 13 s
    start = time.monotonic()
    stop = Callbacks(cancelled=lambda: time.monotonic() - start > 0.2)
    with TensorFiles([path]) as files, pytest.raises(Cancelled):
        run_layers(files, stack, [numbers(256)[None]], FP32, stop)
    assert time.monotonic() - start < 10  # of 39 s; the machine may be busy
    assert not reading()
