"""Groups of tensors are read from safetensors files one after the other, so that a model is never in memory whole.

The next group is read by other threads while one is in use. Files are read into buffers that are used again and again,
and never mapped: a file that is cut short while it is read then gives an error with a name, and no dead process.
Where the tensors are used in the dtype of the file, on the CPU, they are views of the bytes that were read.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from threading import Event, Lock
from typing import TypeVar

import torch
from torch import Tensor, nn

from i2l_ext.converters.errors import Cancelled, UserError
from i2l_ext.converters.files import tensor_bytes
from i2l_ext.weights import reads
from i2l_ext.weights.compute import NO_CALLBACKS, Callbacks, ComputeOptions
from i2l_ext.weights.file_reader import PAGE, from_page_start, page_buffer
from i2l_ext.weights.files import TensorFiles
from i2l_ext.weights.pack_writer import unpack
from i2l_ext.weights.reads import ReadRange, TensorSlot, places_in_buffer, plan_group

ALIGN = 128
"""Numbers: each tensor that is converted starts at a multiple of this in its buffer."""

READERS = 2
"""Threads that read: while one waits for the disk, the other has asked for the next range."""

Result = TypeVar("Result")


class TensorLoader:
    """Reads groups of tensors to a device; on CUDA through pinned memory, on a stream of its own.

    On the CPU, a group in the dtype of the file is read to where it stays. Any other group goes through staging
    buffers, one for each thread that reads, and is converted.
    """

    def __init__(self, files: TensorFiles, options: ComputeOptions) -> None:
        self.files, self.device, self.dtype = files, torch.device(options.device), options.torch_dtype
        self.stop = Event()
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._stages: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()

    def nbytes(self, names: Mapping[str, str]) -> int:
        """The size of a buffer that is large enough for a group."""
        entries = [self.files.locate(key)[1] for key in names.values()]
        converted = sum(_aligned(math.prod(entry.shape)) for entry in entries) * self.dtype.itemsize
        return max(converted, sum(entry.nbytes + 2 * PAGE for entry in entries))

    def buffer(self, nbytes: int) -> Tensor:
        """Uninitialised bytes on the device; on the CPU they start on a page of memory."""
        if self.device.type == "cpu":
            return page_buffer(nbytes)
        with self._on_stream():
            return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def prepare(self, names: Mapping[str, str], buffer: Tensor) -> tuple[dict[str, Tensor], list[Callable[[], None]]]:
        """The tensors of a group, which lie in ``buffer``, and the jobs that fill them. Jobs may run at once."""
        slots = self.files.slots(names)
        ranges = plan_group(slots)
        if self._in_place(slots):
            places = places_in_buffer(ranges)
            tensors = {slot.name: slot.view(buffer, places.get(slot.name, 0)) for slot in slots}
            return tensors, [partial(self._read, one, buffer) for one in ranges]
        flat, tensors, end = buffer[: len(buffer) // 8 * 8].view(self.dtype), {}, 0
        for slot in slots:
            numbers = math.prod(slot.entry.shape)
            tensors[slot.name] = flat[end : end + numbers].view(slot.entry.shape)
            end += _aligned(numbers)
        scales = {slot.scales.key: _Scales(slot.scales, self) for slot in slots if slot.scales}
        return tensors, [partial(self._convert, one, tensors, scales) for one in ranges]

    def read(self, names: Mapping[str, str], buffer: Tensor) -> dict[str, Tensor]:
        """A group's tensors, read on this thread. They are valid until ``buffer`` is used again."""
        tensors, jobs = self.prepare(names, buffer)
        for job in jobs:
            job()
        return tensors

    def _on_stream(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self.stream) if self.stream else nullcontext()

    def _in_place(self, slots: Sequence[TensorSlot]) -> bool:
        """Whether a group is used as it is on disk."""
        return self.device.type == "cpu" and all(
            slot.dtype == self.dtype and slot.start % self.dtype.itemsize == 0 for slot in slots
        )

    def _read(self, one: ReadRange, buffer: Tensor) -> None:
        if self.stop.is_set():
            raise Cancelled
        try:
            area = tensor_bytes(buffer[one.at - one.start % PAGE :])
            self.files.readers[one.file].read(one.start, one.end, area)
        except UserError as error:
            raise UserError(f"{error} (at the tensor {one.parts[0].slot.key!r})") from None

    def _convert(self, one: ReadRange, tensors: Mapping[str, Tensor], scales: Mapping[str, _Scales]) -> None:
        stage, copied = self._stage()
        if copied:
            copied.synchronize()
        at = one.start % PAGE
        self._read(replace(one, at=at), stage)
        with self._on_stream():
            for part in one.parts:
                slot, found = part.slot, stage[at : at + part.stop - part.start]
                at += len(found)
                if slot.key in scales:
                    scales[slot.key].fill(part.start, found)
                    continue
                size = slot.dtype.itemsize
                found = (found.clone() if found.data_ptr() % size else found).view(slot.dtype)
                found = found.to(self.device, non_blocking=True) if self.stream else found
                target = tensors[slot.name].view(-1)[part.start // size : part.stop // size]
                if slot.scales:
                    unpack(found, scales[slot.scales.key].value(), slot.group, part.start // size, target)
                else:
                    target.copy_(found)
            self._stages.append((stage, self.stream.record_event() if self.stream else None))

    def _stage(self) -> tuple[Tensor, torch.cuda.Event | None]:
        """The staging buffer that was filled longest ago, and the event after its copy to the device."""
        try:
            return self._stages.popleft()
        except IndexError:  # each thread's first call
            memory = torch.empty(reads.READ_SIZE + 3 * PAGE, dtype=torch.uint8, pin_memory=self.stream is not None)
            return from_page_start(memory), None


class _Scales:
    """The scales of a packed tensor: one job fills them, others wait for them. Jobs that fill are always begun before
    those that wait."""

    def __init__(self, slot: TensorSlot, loader: TensorLoader) -> None:
        self.loader, self.missing, self.lock, self.ready = loader, slot.entry.nbytes, Lock(), Event()
        self.held = torch.empty(math.prod(slot.entry.shape), dtype=slot.dtype)

    def fill(self, start: int, found: Tensor) -> None:
        """The bytes from ``start`` on."""
        self.held.view(torch.uint8)[start : start + len(found)] = found
        with self.lock:
            self.missing -= len(found)
        if not self.missing:
            self.ready.set()

    def value(self) -> Tensor:
        """All scales, on the loader's device. Raises Cancelled where the loader is stopped before they are there."""
        while not self.ready.wait(0.05):
            if self.loader.stop.is_set():
                raise Cancelled
        return self.held.to(self.loader.device)


def _aligned(numbers: int) -> int:
    return -(-numbers // ALIGN) * ALIGN


def results_of(futures: Iterable[Future[Result]], callbacks: Callbacks) -> list[Result]:
    """Wait for the results. Raises what a future raised, and Cancelled as soon as the user wants to stop."""
    results = []
    for future in futures:
        while not future.done():
            callbacks.check()
            wait([future], timeout=0.05)
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
    loader = TensorLoader(files, options)
    size = max((loader.nbytes(names) for names in groups), default=0)
    free = deque(loader.buffer(size) for _ in range(min(1 + ahead, len(groups))))
    waiting: deque[tuple[Tensor, dict[str, Tensor], list[Future[None]]]] = deque()
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
                results_of(reading, callbacks)
                if loader.stream:
                    torch.cuda.current_stream(loader.device).wait_stream(loader.stream)
                yield tensors
                if loader.stream:  # the device must be done with a buffer before it is filled again
                    torch.cuda.current_stream(loader.device).synchronize()
                free.append(buffer)
                launch()
        finally:
            loader.stop.set()


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
