"""The safetensors files of one model: which tensors there are, and where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import torch
from torch import Tensor

from i2l_ext.converters.errors import UserError
from i2l_ext.converters.files import TensorFile, TensorInfo, tensor_bytes, torch_dtype
from i2l_ext.converters.lora import FLOATS
from i2l_ext.weights.file_reader import FileReader, exceeds_page_cache
from i2l_ext.weights.packed_numbers import unpack
from i2l_ext.weights.packing import group_size, scale_key, weights_of
from i2l_ext.weights.reads import TensorSlot, with_scales


class TensorFiles:
    """The safetensors files, one or several shards, of one model. Close it, or use it in a ``with``."""

    def __init__(self, paths: Sequence[Path | str]) -> None:
        """Raises UserError where a file is not safetensors, or where two hold a tensor of the same name."""
        self._file_of: dict[str, TensorFile] = {}
        with ExitStack() as opened:
            self.files = [opened.enter_context(TensorFile(path)) for path in paths]
            direct = exceeds_page_cache(sum(file.size for file in self.files))
            self.readers = {file: opened.enter_context(closing(FileReader(file, direct=direct))) for file in self.files}
            for file in self.files:
                for key in weights_of(file.header):
                    if self._file_of.setdefault(key, file) is not file:
                        raise UserError(f"{file.path.name}: the tensor {key!r} is in another of the files too.")
            self._opened = opened.pop_all()

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self._opened.close()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """{key: shape} of all files together."""
        return {key: file.header.tensors[key].shape for key, file in self._file_of.items()}

    def locate(self, key: str) -> tuple[TensorFile, TensorInfo]:
        """The file that holds a tensor of floats, perhaps packed ones, and its entry. Raises UserError where there is
        none."""
        if key not in self._file_of:
            others = f" and {len(self.files) - 1} more" if len(self.files) > 1 else ""
            raise UserError(f"{self.files[0].path.name}{others}: the tensor {key!r} is missing.")
        file = self._file_of[key]
        entry = file.info(key)
        if not group_size(file.path.name, key, file.header.tensors) and entry.dtype not in FLOATS:
            raise UserError(f"{file.path.name}: the tensor {key!r} holds {entry.dtype}, not floats.")
        return file, entry

    def slots(self, names: Mapping[str, str]) -> list[TensorSlot]:
        """Where the tensors of a group, ``{name: key}``, lie; in the order of the files. Raises UserError."""
        slots = [self._slot(name, key) for name, key in names.items()]
        return sorted(slots, key=lambda slot: (self.files.index(slot.file), slot.start))

    def nbytes(self, names: Mapping[str, str]) -> int:
        """How many bytes the tensors of a group, ``{name: key}``, have in the files, with scales."""
        return sum(slot.entry.nbytes for slot in with_scales(self.slots(names)))

    def _slot(self, name: str, key: str) -> TensorSlot:
        file, entry = self.locate(key)
        scaled_by = scale_key(key, file.header.tensors)
        if scaled_by is None:
            return TensorSlot(name, key, file, entry)
        scales = TensorSlot(f"{name} scales", scaled_by, file, file.info(scaled_by))
        return TensorSlot(name, key, file, entry, scales, group_size(file.path.name, key, file.header.tensors))

    def check(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Raises UserError with the name of the first tensor that is missing or has another shape."""
        for key, shape in shapes.items():
            file, entry = self.locate(key)
            if entry.shape != tuple(shape):
                raise UserError(
                    f"{file.path.name}: the tensor {key!r} has the shape {list(entry.shape)}, not {list(shape)}."
                )

    def rows(self, key: str, rows: Sequence[int]) -> Tensor:
        """Some rows of a matrix, [len(rows), ...], in the file's dtype; in float32 where they are packed. Of a matrix
        that is not packed nothing else is read."""
        slot = self._slot(key, key)
        file, entry = slot.file, slot.entry
        table = torch.empty((len(rows), *entry.shape[1:]), dtype=torch_dtype(entry.dtype))
        stride = entry.nbytes // entry.shape[0]
        for row, line in zip(rows, table, strict=True):
            file.readinto(entry, tensor_bytes(line), row * stride)
        if slot.scales is None:
            return table
        scales, values = file.tensor(slot.scales.key), torch.empty(table.shape)
        for row, packed, line in zip(rows, table.flatten(1), values.flatten(1), strict=True):
            unpack(packed, scales, slot.group, row * packed.numel(), line)
        return values
