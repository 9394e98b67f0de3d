"""Pictures -> embeddings of one model: what its encoders take of them, and what they give, or gave before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from i2l_ext import images
from i2l_ext.converters.errors import UserError
from i2l_ext.models import store
from i2l_ext.models.catalogue import Checkpoint, I2LModel
from i2l_ext.weights.compute import DEFAULT_OPTIONS, NO_CALLBACKS, Callbacks, ComputeOptions

if TYPE_CHECKING:
    import numpy as np
    import torch

    from i2l_ext.encoders.cache import EmbeddingCache


@dataclass(frozen=True)
class Normalization:
    """How an encoder's pixels are made from the square: mean and standard deviation, RGB, of values 0 to 1; and
    whether the resize rounds to whole levels or works in floats."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    rounded: bool


NORMALIZATIONS = {
    "siglip2": Normalization((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), rounded=True),
    "dinov3": Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), rounded=False),
}
"""By kind of encoder, as transformers' processors for them work: SigLIP's resizes bytes, DINOv3's divides by 255
before it resizes."""


@dataclass(frozen=True)
class Embeddings:
    """What the decoders of an i2L model take of N pictures.

    ``image`` [N, E]: SigLIP2's embedding, then DINOv3's; for a model that sees all pictures together, SigLIP2's patch
    tokens [N, T, E]. ``tokens``: by side of the view in pixels, Qwen-VL's tokens [N, L, D]. All float32 on the CPU.
    """

    image: torch.Tensor
    tokens: Mapping[int, torch.Tensor] = field(default_factory=dict)

    def rows(self, start: int, stop: int) -> Embeddings:
        """Those of the pictures ``start`` to ``stop`` - 1."""
        tokens = {side: rows[start:stop] for side, rows in self.tokens.items()}
        return replace(self, image=self.image[start:stop], tokens=tokens)


def embed(
    pictures: Sequence[images.Picture],
    model: I2LModel,
    files: Mapping[str, Sequence[Path]],
    options: ComputeOptions = DEFAULT_OPTIONS,
    callbacks: Callbacks = NO_CALLBACKS,
    cache: EmbeddingCache | None = None,
) -> Embeddings:
    """Run the model's encoders over the pictures, each over all of them at once.

    ``files``: the paths of each checkpoint, by its id. The dtype of ``options`` is a wish: each encoder is computed in
    one that is safe for it. Each encoder is a step, ``encode ID``. Raises UserError for unusable weights, and where an
    embedding is not finite; Cancelled when the user wants to stop.
    """
    import torch

    found = {}
    for encoder in model.encoders:
        callbacks.step(f"encode {encoder.id}")
        views = _inputs(encoder, pictures, model.views)
        found[encoder.kind] = _encode(encoder, views, files[encoder.id], options, callbacks, cache)
    tokens = dict(zip(model.views, found.pop("qwen-vl", []), strict=True))
    return Embeddings(torch.cat([embedded for [embedded] in found.values()], dim=-1), tokens)


def _inputs(encoder: Checkpoint, pictures: Sequence[images.Picture], sides: Sequence[int]) -> list[list[np.ndarray]]:
    """What an encoder takes of the pictures, for each of its views: ``sides`` are those of Qwen-VL's."""
    if encoder.kind == "qwen-vl":
        from i2l_ext.encoders import qwen_view

        return [[qwen_view.patches(picture.view(side), encoder.spec) for picture in pictures] for side in sides]
    how, size = NORMALIZATIONS[encoder.kind], encoder.spec.image
    return [[images.pixels(picture.square, size, how.mean, how.std, rounded=how.rounded) for picture in pictures]]


def _encode(
    encoder: Checkpoint,
    views: Sequence[Sequence[np.ndarray]],
    files: Sequence[Path],
    options: ComputeOptions,
    callbacks: Callbacks,
    cache: EmbeddingCache | None,
) -> list[torch.Tensor]:
    """One tensor [N, …] for each view of N pictures. What the cache has is not computed."""
    import torch

    from i2l_ext.encoders import encoder_module
    from i2l_ext.encoders.cache import embedding_key
    from i2l_ext.weights.devices import choose_dtype, device_facts

    dtype = choose_dtype(device_facts(options.device), encoder.spec.safe_dtypes, options.dtype).dtype
    inputs = [(number, array) for number, view in enumerate(views) for array in view]

    def compute(missing: Sequence[int], found: int = 0) -> list[torch.Tensor]:
        """The embeddings of some of the inputs; those of one view are computed together. ``found``: bytes of the
        others'."""
        batches: dict[int, list[torch.Tensor]] = {}
        for number, array in (inputs[index] for index in missing):
            batches.setdefault(number, []).append(torch.from_numpy(array))
        pixels = [torch.stack(batch) for batch in batches.values()]
        module = encoder_module(encoder.kind)
        held = options.held + found + sum(array.nbytes for _, array in inputs)
        computed = module.encode(files, encoder.spec, pixels, replace(options, dtype=dtype, held=held), callbacks)
        for batch in computed:
            _check_finite(encoder, batch, dtype)
        return [embedding for batch in computed for embedding in batch]

    if cache is None:
        found = compute(range(len(inputs)))
    else:
        identity = store.files_identity(files)
        keys = [embedding_key(array.tobytes(), encoder.output, identity, dtype) for _, array in inputs]
        found = cache.get_or_encode(keys, compute)
    count = len(views[0])
    return [torch.stack(found[start : start + count]) for start in range(0, len(found), count)]


def _check_finite(encoder: Checkpoint, found: torch.Tensor, dtype: str) -> None:
    """Raises UserError where an embedding holds NaN or infinity: it is neither used nor cached."""
    import torch

    from i2l_ext.weights.devices import PRECISION_WORDS

    if torch.isfinite(found).all():
        return
    remedy = "Check its weights: i2l models verify."
    if dtype != "float32":
        remedy = "Choose fp32: --precision fp32, or Precision in the settings."
    raise UserError(f"{encoder.id}: in {PRECISION_WORDS[dtype]} its embedding comes out as NaN or infinity. {remedy}")
