"""Groups of tensors are read from safetensors files one after the other, so that a model is never in memory whole.

The next group is read by other threads while one is in use. Files are read into buffers that are used again and again,
and never mapped: a file that is cut short while it is read then gives an error with a name, and no dead process.
`StoredLoader` leaves the tensors as the file has them, `TensorLoader` makes them what is computed with.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import replace
from functools import partial
from threading import Event, Lock
from typing import Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from i2l_ext.converters.errors import Cancelled, UserError
from i2l_ext.converters.files import tensor_bytes
from i2l_ext.weights import reads
from i2l_ext.weights.compute import NO_CALLBACKS, Callbacks, ComputeOptions
from i2l_ext.weights.copying import CopyStream, copy_stream, pinned_bytes
from i2l_ext.weights.file_reader import PAGE, page_buffer
from i2l_ext.weights.files import TensorFiles
from i2l_ext.weights.packed_numbers import unpack
from i2l_ext.weights.reads import (
    ReadRange,
    TensorSlot,
    places_in_buffer,
    plan_group,
    plan_reads,
    with_scales,
)
from i2l_ext.weights.stored import StoredTensor

ALIGN = 128
"""Numbers: each tensor that is converted starts at a multiple of this in its buffer."""

READERS = 2
"""Threads that read: while one waits for the disk, the other has asked for the next range."""

Copied: TypeAlias = "torch.cuda.Event | None"
"""The event after a copy to a device; None where there is none to wait for."""

Result = TypeVar("Result")
Part = TypeVar("Part")


class GroupLoader(Protocol[Part]):
    """Reads groups of tensors, ``{name: key in the files}``, into buffers."""

    @property
    def stop(self) -> Event:
        """Set when no more is to be read."""

    @property
    def copies(self) -> CopyStream | None:
        """What copies to a device; None on the CPU."""

    def nbytes(self, names: Mapping[str, str]) -> int:
        """The size of a buffer that is large enough for a group."""

    def buffer(self, nbytes: int) -> Tensor:
        """Uninitialised bytes on the device; on the CPU they start on a page of memory."""

    def prepare(self, names: Mapping[str, str], buffer: Tensor) -> tuple[dict[str, Part], list[Callable[[], Copied]]]:
        """The tensors of a group, which lie in ``buffer``, and the jobs that fill them. On CUDA a job returns the
        event after which its tensors are there. Jobs may run in parallel."""


class StoredLoader:
    """Reads groups of tensors to the CPU, as the files have them, to where they stay."""

    def __init__(self, files: TensorFiles) -> None:
        self.files, self.stop = files, Event()
        self.copies: CopyStream | None = None

    def nbytes(self, names: Mapping[str, str]) -> int:
        return sum(slot.entry.nbytes + 2 * PAGE for slot in with_scales(self.files.slots(names)))

    def buffer(self, nbytes: int) -> Tensor:
        return page_buffer(nbytes)

    def prepare(
        self, names: Mapping[str, str], buffer: Tensor
    ) -> tuple[dict[str, StoredTensor], list[Callable[[], Copied]]]:
        slots = self.files.slots(names)
        ranges = plan_reads(with_scales(slots))
        places = places_in_buffer(ranges)

        def stored(slot: TensorSlot) -> StoredTensor:
            at = places.get(slot.name, 0)  # an empty tensor has no bytes to read, and so no place
            scales = stored(slot.scales) if slot.scales else None
            return StoredTensor(buffer[at : at + slot.entry.nbytes], slot.dtype, slot.entry.shape, scales, slot.group)

        return {slot.name: stored(slot) for slot in slots}, [partial(self.read_range, one, buffer) for one in ranges]

    def read_range(self, one: ReadRange, buffer: Tensor) -> None:
        """Put a range of a file into its place in ``buffer``. Raises UserError, and Cancelled after ``stop``."""
        if self.stop.is_set():
            raise Cancelled
        try:
            # ``one.at`` lies in its page as ``one.start`` does: the reader wants the buffer from that page's start on
            area = tensor_bytes(buffer[one.at - one.start % PAGE :])
            self.files.readers[one.file].read(one.start, one.end, area)
        except UserError as error:
            raise UserError(f"{error} (at the tensor {one.parts[0].slot.key!r})") from None


class TensorLoader:
    """Reads groups of tensors to the CPU or a CUDA device; to that through pinned memory, beside what it computes.

    On the CPU, a group in the dtype of the file is read to where it stays. Any other group goes through staging
    buffers, one for each thread that reads, and is converted.
    """

    def __init__(self, files: TensorFiles, options: ComputeOptions) -> None:
        self.files, self.device, self.dtype = files, torch.device(options.device), options.torch_dtype
        self.stored = StoredLoader(files)
        self.stop = self.stored.stop
        self.copies = copy_stream(self.device) if self.device.type == "cuda" else None
        self._stages: deque[tuple[Tensor, Copied]] = deque()

    def nbytes(self, names: Mapping[str, str]) -> int:
        slots = self.files.slots(names)
        if self._in_place(slots):
            return self.stored.nbytes(names)
        return sum(_aligned(math.prod(slot.entry.shape)) for slot in slots) * self.dtype.itemsize

    def buffer(self, nbytes: int) -> Tensor:
        return self.copies.empty(nbytes) if self.copies else page_buffer(nbytes)

    def prepare(self, names: Mapping[str, str], buffer: Tensor) -> tuple[dict[str, Tensor], list[Callable[[], Copied]]]:
        slots = self.files.slots(names)
        if self._in_place(slots):
            stored, jobs = self.stored.prepare(names, buffer)
            # nothing is read yet: each must be a view of its bytes, and by ``_in_place`` it is
            return {name: one.whole(self.dtype) for name, one in stored.items()}, jobs
        whole = len(buffer) // 8 * 8  # no number has more than 8 bytes; a view takes whole ones, and the rest is spare
        flat, tensors, end = buffer[:whole].view(self.dtype), {}, 0
        for slot in slots:
            numbers = math.prod(slot.entry.shape)
            tensors[slot.name] = flat[end : end + numbers].view(slot.entry.shape)
            end += _aligned(numbers)
        scales = {slot.scales.key: _Scales(slot.scales, self) for slot in slots if slot.scales}
        return tensors, [partial(self._convert, one, tensors, scales) for one in plan_group(slots)]

    def read(self, names: Mapping[str, str], buffer: Tensor) -> dict[str, Tensor]:
        """A group's tensors, read on this thread. They are valid until ``buffer`` is used again."""
        tensors, jobs = self.prepare(names, buffer)
        copied = [job() for job in jobs]
        if self.copies:
            self.copies.compute_after(event for event in copied if event)
        return tensors

    def _in_place(self, slots: Sequence[TensorSlot]) -> bool:
        """Whether a group is used as it is on disk: of the dtype that is wanted, and each tensor at a multiple of a
        number's size. It lies so in the buffer too (`plan_reads`), so `StoredTensor.whole` gives a view there."""
        return self.device.type == "cpu" and all(
            slot.dtype == self.dtype and slot.start % self.dtype.itemsize == 0 for slot in slots
        )

    def _convert(self, one: ReadRange, tensors: Mapping[str, Tensor], scales: Mapping[str, _Scales]) -> Copied:
        stage, copied = self._stage()
        if copied:
            copied.synchronize()
        at = one.start % PAGE
        self.stored.read_range(replace(one, at=at), stage)
        pairs = []
        for part in one.parts:
            slot, found = part.slot, stage[at : at + part.stop - part.start]
            at += len(found)
            if slot.key in scales:
                scales[slot.key].fill(part.start, found)
                continue
            size = slot.dtype.itemsize
            found = (found.clone() if found.data_ptr() % size else found).view(slot.dtype)
            target = tensors[slot.name].view(-1)[part.start // size : part.stop // size]
            if slot.scales or (found.dtype.itemsize == 1 and not self.copies):  # a device widens fp8 by itself
                own = scales[slot.scales.key].value() if slot.scales else None
                found = self._unpacked(found, own, slot, part.start // size, target)
            pairs.append((target, found))
        copied = self.copies.copy(pairs) if self.copies else None
        if not self.copies:
            for target, found in pairs:
                if target is not found:
                    target.copy_(found)
        self._stages.append((stage, copied))
        return copied

    def _unpacked(self, found: Tensor, scales: Tensor | None, slot: TensorSlot, first: int, target: Tensor) -> Tensor:
        """Packed numbers as numbers, in memory: in ``target`` where that is there, else on their way to it."""
        out = torch.empty_like(target, device="cpu") if self.copies else target
        unpack(found, scales, slot.group, first, out)
        return out

    def _stage(self) -> tuple[Tensor, Copied]:
        """The staging buffer that was filled longest ago, and the event after its copy to the device. A range
        may begin and end in the middle of a page: hence two pages more. Pinned memory starts on a page."""
        try:
            return self._stages.popleft()
        except IndexError:  # each thread's first call
            return (pinned_bytes if self.copies else page_buffer)(reads.READ_SIZE + 2 * PAGE), None


class _Scales:
    """The scales of a packed tensor: one job fills them, others wait for them. Jobs that fill are always begun before
    those that wait."""

    def __init__(self, slot: TensorSlot, loader: TensorLoader) -> None:
        self.loader, self.missing, self.lock, self.ready = loader, slot.entry.nbytes, Lock(), Event()
        self.numbers = torch.empty(math.prod(slot.entry.shape), dtype=slot.dtype)

    def fill(self, start: int, found: Tensor) -> None:
        """The bytes from ``start`` on."""
        self.numbers.view(torch.uint8)[start : start + len(found)] = found
        with self.lock:
            self.missing -= len(found)
        if not self.missing:
            self.ready.set()

    def value(self) -> Tensor:
        """All scales. Raises Cancelled where the loader is stopped before they are there."""
        while not self.ready.wait(0.05):
            if self.loader.stop.is_set():
                raise Cancelled
        return self.numbers


def _aligned(numbers: int) -> int:
    return -(-numbers // ALIGN) * ALIGN


def results_of(futures: Iterable[Future[Result]], callbacks: Callbacks) -> list[Result]:
    """Wait for the results. Raises what a future raised, and Cancelled as soon as the user wants to stop."""
    results = []
    for future in futures:
        callbacks.check()
        while not future.done():
            wait([future], timeout=0.05)
            callbacks.check()
        results.append(future.result())
    return results


def stream(
    files: TensorFiles,
    groups: Sequence[Mapping[str, str]],
    options: ComputeOptions,
    callbacks: Callbacks = NO_CALLBACKS,
    *,
    ahead: int = 1,
) -> Generator[dict[str, Tensor], None, None]:
    """Yield the tensors of each group, ``{name: key in the files}``, on the device and in the dtype of ``options``.

    A group's tensors are valid until the next group is asked for; then their memory is used again. ``ahead`` groups
    are read while one is in use, so there are 1 + ahead buffers of the size of the largest group. Close the iterator
    (``closing``) when you leave it early. Raises UserError as TensorFile does, Cancelled when the user wants to stop.
    """
    if torch.device(options.device).type not in ("cpu", "cuda"):  # MPS: only the thread that computes may use it
        with closing(stream(files, groups, replace(options, device="cpu"), callbacks, ahead=ahead)) as read:
            for tensors in read:
                yield {name: tensor.to(options.device) for name, tensor in tensors.items()}
        return
    yield from _stream(TensorLoader(files, options), groups, callbacks, ahead)


def stream_stored(
    files: TensorFiles,
    groups: Sequence[Mapping[str, str]],
    callbacks: Callbacks = NO_CALLBACKS,
    *,
    ahead: int = 1,
) -> Generator[dict[str, StoredTensor], None, None]:
    """As `stream`, on the CPU, with tensors as the files have them."""
    return _stream(StoredLoader(files), groups, callbacks, ahead)


def _stream(
    loader: GroupLoader[Part], groups: Sequence[Mapping[str, str]], callbacks: Callbacks, ahead: int
) -> Generator[dict[str, Part], None, None]:
    size = max((loader.nbytes(names) for names in groups), default=0)
    free = deque(loader.buffer(size) for _ in range(min(1 + ahead, len(groups))))
    waiting: deque[tuple[Tensor, dict[str, Part], list[Future[Copied]]]] = deque()
    todo = iter(groups)
    with ThreadPoolExecutor(READERS, thread_name_prefix="i2l-read") as readers:

        def launch() -> None:
            while free and (names := next(todo, None)) is not None:
                buffer = free.popleft()
                tensors, jobs = loader.prepare(names, buffer)
                waiting.append((buffer, tensors, [readers.submit(job) for job in jobs]))

        try:
            launch()
            while waiting:
                buffer, tensors, reading = waiting.popleft()
                copied = results_of(reading, callbacks)
                if loader.copies:
                    loader.copies.compute_after(event for event in copied if event)
                yield tensors
                if loader.copies:  # the device must be done with a buffer before it is filled again
                    loader.copies.copy_after_computing()
                free.append(buffer)
                launch()
        finally:
            loader.stop.set()
            if loader.copies:  # the device must also be done before torch gives the buffers to the next loader
                loader.copies.copy_after_computing()


def load_weights(
    files: TensorFiles,
    module: nn.Module,
    names: Mapping[str, str],
    options: ComputeOptions,
    callbacks: Callbacks = NO_CALLBACKS,
) -> None:
    """Give ``module`` its weights, ``{parameter: key in the files}``, for good."""
    for tensors in stream(files, [names], options, callbacks):  # one group, so its buffer is never used again
        module.load_state_dict(tensors, assign=True)
