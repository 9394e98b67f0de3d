"""The card without one: streams and events are stand-ins that do their work as late, or as early, as they may."""

import threading
import time
from collections import deque
from contextlib import closing, contextmanager
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from i2l_ext.converters.errors import UserError
from i2l_ext.operations import Context, perform
from i2l_ext.requests import DoctorRequest
from i2l_ext.weights import copying, devices, layers, reads
from i2l_ext.weights import stream as streams
from i2l_ext.weights.compute import ComputeOptions
from i2l_ext.weights.copying import CopyStream
from i2l_ext.weights.devices import Device
from i2l_ext.weights.file_reader import PAGE, page_buffer
from i2l_ext.weights.files import TensorFiles
from i2l_ext.weights.layers import OVERHEAD, PictureCost
from i2l_ext.weights.stream import StoredLoader, TensorLoader, stream
from small_encoders import save

GPU = ComputeOptions(device="cuda:0", dtype="bfloat16")
LOCK = threading.RLock()


class StandInEvent:
    def __init__(self, stream):
        self.stream, self.done = stream, False

    def synchronize(self):
        self.stream.run_to(self)


class StandInStream:
    """Work in order. With ``eager`` it is done as soon as nothing has to be waited for; else only once it must be."""

    def __init__(self, eager=False):
        self.work, self.eager, self.asked = deque(), eager, 0

    def add(self, kind, what):
        with LOCK:
            self.work.append((kind, what))
            self.asked += kind == "do"
            while self.eager and self.work and not (self.work[0][0] == "wait" and not self.work[0][1].done):
                self.step()

    def step(self):
        kind, what = self.work.popleft()
        if kind == "wait":
            what.synchronize()
        elif kind == "record":
            what.done = True
        else:
            what()

    def run_to(self, event=None):
        with LOCK:
            while self.work and not (event and event.done):
                self.step()

    def record_event(self):
        event = StandInEvent(self)
        self.add("record", event)
        return event

    def wait_event(self, event):
        self.add("wait", event)

    def wait_stream(self, other):
        self.wait_event(other.record_event())


@pytest.fixture(params=["late", "early"])
def card(request, monkeypatch):
    """``copies``: the stream for copies; ``computing``: what the device computes, always as late as may be."""
    own = threading.local()
    computing = StandInStream()

    @contextmanager
    def on(stream):
        own.stream = stream
        yield
        own.stream = computing

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: StandInStream(request.param == "early"))
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: computing)
    monkeypatch.setattr(copying, "_copy", lambda to, what: own.stream.add("do", lambda: to.copy_(what)))
    copies = CopyStream(torch.device("cpu"))
    monkeypatch.setattr(streams, "copy_stream", lambda device: copies)
    monkeypatch.setattr(streams, "pinned_bytes", page_buffer)
    monkeypatch.setattr(reads, "READ_SIZE", 2048)
    return SimpleNamespace(copies=copies, computing=computing, late=request.param == "late")


def walk(path, tensors, card, ahead=1):
    """What the device saw of each group when it came to it."""
    seen, names = [], list(tensors)
    with TensorFiles([path]) as files, closing(stream(files, [{"t": n} for n in names], GPU, ahead=ahead)) as groups:
        for group in groups:
            card.computing.add("do", lambda tensor=group["t"]: seen.append(tensor.clone()))
    card.computing.run_to()  # it has its copies done first
    return seen


@pytest.fixture(params=[torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def weights(request, tmp_path):
    tensors = {f"g{i}": torch.randn(3000, generator=torch.Generator().manual_seed(i)) for i in range(8)}
    return save(tmp_path / "x.safetensors", tensors, request.param), {n: t.bfloat16() for n, t in tensors.items()}


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_the_device_sees_every_value_whatever_is_late(card, weights, ahead):
    path, tensors = weights
    seen = walk(path, tensors, card, ahead)
    assert all(torch.equal(a, b) for a, b in zip(seen, tensors.values(), strict=True))


@pytest.mark.parametrize("missing", ["compute_after", "copy_after_computing", "stages"])
def test_the_stand_in_notices_an_order_that_is_missing(card, weights, monkeypatch, missing):
    if missing == "stages":
        stage = TensorLoader._stage
        monkeypatch.setattr(TensorLoader, "_stage", lambda self: (stage(self)[0], None))
    else:
        monkeypatch.setattr(CopyStream, missing, lambda *given: None)
    if card.late == (missing == "copy_after_computing"):
        pytest.skip("late copies hide one, early ones the others")
    path, tensors = weights
    seen = walk(path, tensors, card)
    assert not all(torch.equal(a, b) for a, b in zip(seen, tensors.values(), strict=True))


def test_a_group_waits_for_its_own_copies_alone(card, weights, monkeypatch):
    if not card.late:
        pytest.skip("early copies are done in any case")
    monkeypatch.setattr(reads, "READ_SIZE", 1 << 20)
    plain = streams.results_of

    def when_both_are_asked_for(*given):
        found, end = plain(*given), time.monotonic() + 20
        while card.copies.stream.asked < 2 and time.monotonic() < end:
            time.sleep(0.01)  # the next group's copy
        return found

    monkeypatch.setattr(streams, "results_of", when_both_are_asked_for)
    path, tensors = weights
    with TensorFiles([path]) as files, closing(stream(files, [{"t": n} for n in tensors], GPU)) as groups:
        next(groups)
        card.computing.run_to()
        assert sum(kind == "do" for kind, _ in card.copies.stream.work) == 1


def test_a_device_has_one_stream_for_copies(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: StandInStream())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    copying._copy_stream.cache_clear()
    try:
        one, two = (copying.copy_stream(torch.device(name)) for name in ("cuda", "cuda:1"))
        assert one is two and copying.copy_stream(torch.device("cuda:0")) is not one
    finally:
        copying._copy_stream.cache_clear()


def test_equal_dtypes_are_copied_without_one_in_between():
    target, same, other = (Mock(dtype=dtype) for dtype in ("bf16", "bf16", "fp32"))
    copying._copy(target, same)
    target.copy_.assert_called_once_with(same, non_blocking=True)
    same.to.assert_not_called()
    copying._copy(target, other)
    other.to.assert_called_once_with(target.device, non_blocking=True)


def test_a_stage_has_no_more_than_a_power_of_two():
    """Torch's allocator of pinned memory takes the next one."""
    assert reads.READ_SIZE + 2 * PAGE == 1 << 24


def test_float32_files_are_not_counted_twice(tmp_path):
    with TensorFiles([save(tmp_path / "x.safetensors", {"t": torch.zeros(1 << 16)})]) as files:
        for options, size in ((GPU, 2), (ComputeOptions(dtype="bfloat16"), 2), (ComputeOptions(dtype="float32"), 4)):
            loader = TensorLoader.__new__(TensorLoader)
            loader.files, loader.device, loader.dtype = files, torch.device(options.device), options.torch_dtype
            loader.stored = StoredLoader(files)
            assert size << 16 <= loader.nbytes({"t": "t"}) <= (size << 16) + 2 * PAGE


def test_other_devices_get_their_weights_from_the_thread_that_computes(tmp_path, monkeypatch):
    """As MPS: here the meta device stands in, which has no values. Nothing of CUDA is asked for."""
    monkeypatch.setattr(streams, "copy_stream", None)
    path = save(tmp_path / "x.safetensors", {"t": torch.ones(300)})
    threads, plain = set(), torch.Tensor.to

    def to(tensor, *where):
        threads.add(threading.current_thread())
        return plain(tensor, *where)

    with TensorFiles([path]) as files, pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "to", to)
        [group] = stream(files, [{"t": "t"}], ComputeOptions(device="meta"))
    assert group["t"].is_meta and group["t"].dtype == torch.bfloat16 and threads == {threading.current_thread()}
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("i2l-read")]


# --- the plan -----------------------------------------------------------------------------------------------------

GB = 10**9
SIZES = {"layer": GB, "fixed": GB // 2, "kept": 3 * GB, "costs": [(GB // 100, GB // 10)]}


def test_a_card_is_used_as_far_as_it_is_free(monkeypatch):
    monkeypatch.setattr(layers, "free_memory", {"cuda:0": 8 * GB}.__getitem__)
    plan = layers._plan(GPU, **SIZES)
    assert plan.ahead == 1  # what is fixed is not taken off what is free, nor are pictures in the computer's memory
    assert plan.inside + plan.between == int(0.85 * 8 * GB) - OVERHEAD - 2 * GB
    monkeypatch.setattr(layers, "free_memory", {"cuda:0": 2 * GB}.__getitem__)
    with pytest.raises(UserError, match=r"^cuda:0: 2\.2 GB are left for this model, and it needs .* --device cpu"):
        layers._plan(GPU, **{**SIZES, "layer": 2 * GB})


def test_a_bound_that_was_given_counts_and_a_processor_has_none(monkeypatch):
    monkeypatch.setattr(layers, "free_memory", None)
    given = layers._plan(ComputeOptions(device="cuda:0", memory=6 * GB), **SIZES)
    assert given.inside + given.between == 6 * GB - OVERHEAD - SIZES["fixed"] - 2 * GB
    assert layers._plan(ComputeOptions(), **SIZES).between > 1 << 60
    here = layers._plan(ComputeOptions(memory=9 * GB, held=GB), **SIZES)
    assert here.inside + here.between == given.inside + given.between - GB  # 9 = 6 and the pictures; and what is held


@pytest.mark.parametrize(
    ("device", "dtype", "squares"),
    [
        (Device("cpu", "cpu"), "float32", False),
        (Device("cuda", "H100", (9, 0)), "bfloat16", False),
        (Device("cuda", "RTX 2080", (7, 5)), "bfloat16", True),
        (Device("cuda", "RTX 2080", (7, 5)), "float32", False),
        (Device("mps", "mps"), "bfloat16", True),
        (Device("xpu", "xpu"), "bfloat16", True),
    ],
)
def test_pairs_of_tokens_count_where_attention_holds_them(device, dtype, squares, monkeypatch):
    monkeypatch.setattr(layers, "device_facts", lambda name: device)
    options = ComputeOptions(device=device.kind, dtype=dtype)
    size = options.torch_dtype.itemsize
    _, inside = layers._picture_bytes(PictureCost(10, 100, pairs=1000), torch.zeros(2, 3), options)
    assert inside == size * (2100 if squares else 100)
    _, inside = layers._picture_bytes(PictureCost(10, 100), torch.zeros(2, 3, 64, 64), options)
    assert inside == size * 3 * 64 * 64  # its pixels


def test_what_is_free_on_a_card(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", {1: (5 * GB, 8 * GB)}.__getitem__)
    monkeypatch.setattr(torch.cuda, "memory_reserved", {1: 3 * GB}.__getitem__)
    monkeypatch.setattr(torch.cuda, "memory_allocated", {1: GB}.__getitem__)
    assert devices.free_memory("cuda") == devices.free_memory("cuda:1") == 7 * GB
    assert devices.free_memory("cpu") is None


def test_the_doctor_lists_every_device(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert perform(DoctorRequest(), Context()).facts["devices"].split(", ")[-1] == "mps"
    assert devices.resolve_device("mps") == "mps"
    with pytest.raises(UserError, match="no xpu"):
        devices.resolve_device("xpu")


def test_what_the_cache_gave_is_held(world, tmp_path, monkeypatch):
    """Pictures that wait, and embeddings that were found, are in memory beside what is computed."""
    from i2l_ext import images
    from i2l_ext.embed import embed
    from i2l_ext.encoders import siglip2
    from i2l_ext.encoders.cache import EmbeddingCache
    from i2l_ext.models import catalogue, store

    model, held, plain = catalogue.find("small"), [], siglip2.encode

    def encode(paths, dims, batches, options, callbacks):
        held.append(options.held)
        return plain(paths, dims, batches, options, callbacks)

    monkeypatch.setattr(siglip2, "encode", encode)
    files, cache = store.require(model), EmbeddingCache(tmp_path / "kept")
    pictures = [images.open_image(path, sizes=model.views) for path in world.pictures[:2]]
    for some in (pictures[:1], pictures):
        embed(some, model, files, cache=cache)
    pixels = 3 * model.siglip2.spec.image**2 * 4
    assert held == [pixels, 2 * pixels + 4 * model.siglip2.spec.width]
