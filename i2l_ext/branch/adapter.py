"""LoRAs beside a model's layers: loaded once, switched on for a prediction, kept until the model is freed."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from i2l_ext.converters import Lora, UserError

from .match import LoraMatch, match_lora
from .rows import Strength, row_weights
from .terms import LayerTerm, term_hook

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.hooks import RemovableHandle


class BranchAdapter:
    """Some LoRAs as one term beside each layer of a model that they change.

    ``matches``: for each LoRA, the layers it changes. The model's layers are referenced, the model itself is not.
    """

    def __init__(self, model: nn.Module, loras: Sequence[Lora], names: Sequence[str] = ()) -> None:
        """Reads the factors of all LoRAs. ``names``: of the LoRAs, for messages.

        Raises UserError where a LoRA does not fit the model, and where its factors cannot be read.
        """
        names = names or ["The LoRA"] * len(loras)
        self.matches: tuple[LoraMatch, ...] = tuple(
            match_lora(model, lora, name) for lora, name in zip(loras, names, strict=True)
        )
        self._was_on = False
        self._handles: list[RemovableHandle] = []
        self._layers: list[tuple[nn.Module, LayerTerm]] = []
        for layer_name, layer in model.named_modules():
            parts = [
                (number, loras[number], part)
                for number, match in enumerate(self.matches)
                for part in match.layers.get(layer_name, ())
            ]
            if parts:
                self._layers.append((layer, LayerTerm(layer_name, parts)))

    @property
    def nbytes(self) -> int:
        """Of the factors in memory."""
        return sum(term.nbytes for _, term in self._layers)

    @property
    def uncalled(self) -> list[str]:
        """Names of layers that did not run since the adapter was first switched on: those of a compiled or a fused
        model, which computes past them. Empty before, and meaningful after a prediction."""
        return [term.name for _, term in self._layers if not term.called] if self._was_on else []

    def switch_on(self, strengths: Sequence[Strength], positive: Sequence[bool], progress: float = 0.0) -> None:
        """From now on the layers' outputs have the LoRAs' terms, until `switch_off`.

        ``strengths``: one for each LoRA. ``positive``: for each row of the batch whether it belongs to the positive
        branch. ``progress``: the share of the steps that are done, 0 to 1. Raises ValueError for another number of
        strengths; the prediction itself raises UserError where a layer's rows are not those of the batch.
        """
        if len(strengths) != len(self.matches):
            raise ValueError(f"{len(strengths)} strengths for {len(self.matches)} LoRAs")
        self.switch_off()
        weights = row_weights(strengths, positive, progress)
        if weights.runs:
            self._was_on = True
            self._handles = [layer.register_forward_hook(term_hook(term, weights)) for layer, term in self._layers]

    def switch_off(self) -> None:
        """The layers are as they were before `switch_on`."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @contextmanager
    def active(self, strengths: Sequence[Strength], positive: Sequence[bool], progress: float = 0.0) -> Iterator[None]:
        """A block in which the adapter is switched on. Arguments and errors as `switch_on`."""
        try:
            self.switch_on(strengths, positive, progress)
            yield
        finally:
            self.switch_off()


_FileIdentity = tuple[Path, int, int]
_adapters: weakref.WeakKeyDictionary[nn.Module, tuple[tuple[_FileIdentity, ...], BranchAdapter]] = (
    weakref.WeakKeyDictionary()
)


def adapter_of(model: nn.Module, files: Sequence[Path]) -> BranchAdapter:
    """The adapter of these LoRA files beside ``model``. The last one of a model is kept as long as the model is, and
    made again only if the files are others or have changed.

    Raises UserError where a file cannot be read, is not a LoRA, or does not fit the model.
    """
    identity = tuple(_identity(file) for file in files)
    kept = _adapters.get(model)
    if kept and kept[0] == identity:
        return kept[1]
    forget_adapter(model)  # its memory is free before the next is read
    adapter = read_adapter(model, files)
    _adapters[model] = identity, adapter
    return adapter


def read_adapter(model: nn.Module, files: Sequence[Path]) -> BranchAdapter:
    """An adapter of these LoRA files beside ``model``. The files are not needed afterwards.

    Raises UserError where a file cannot be read, is not a LoRA, or does not fit the model.
    """
    loras: list[Lora] = []
    try:
        loras += (Lora.read(file) for file in files)
        return BranchAdapter(model, loras, [file.name for file in files])
    finally:
        for lora in loras:
            lora.read_from.file.close()


def check_file(model: nn.Module, file: Path) -> LoraMatch:
    """The layers of ``model`` that a LoRA file changes, by its names and shapes; no factor is read.

    Raises UserError where it cannot be read, is not a LoRA, or does not fit the model.
    """
    lora = Lora.read(file)
    lora.read_from.file.close()
    return match_lora(model, lora, file.name)


def forget_adapter(model: nn.Module) -> None:
    """Free the factors that `adapter_of` keeps for a model, and leave its layers as they were without them."""
    if kept := _adapters.pop(model, None):
        kept[1].switch_off()


def _identity(file: Path) -> _FileIdentity:
    try:
        status = file.stat()
    except OSError as error:
        raise UserError(f"{file.name}: cannot be read ({error.strerror}).") from None
    return file, status.st_mtime_ns, status.st_size
