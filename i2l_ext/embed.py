"""Pictures -> embeddings of one model: what its encoders see, and what they make of it, or made of it before."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from i2l_ext import images
from i2l_ext.converters.errors import UserError
from i2l_ext.models.catalogue import Checkpoint, Model
from i2l_ext.weights.compute import DEFAULT_OPTIONS, NO_CALLBACKS, Callbacks, ComputeOptions

if TYPE_CHECKING:
    import numpy as np
    import torch

    from i2l_ext.encoders.cache import EmbeddingCache


@dataclass(frozen=True)
class Eye:
    """How an encoder's pixels are made from the square: mean and standard deviation, RGB, of values 0 to 1; and
    whether the resize rounds to whole levels, or works in floats."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    rounded: bool


EYES = {
    "siglip2": Eye((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), rounded=True),
    "dinov3": Eye((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), rounded=False),
}
"""By kind of encoder, as transformers' processors for them work: SigLIP's resizes bytes, DINOv3's divides by 255
before it resizes."""


@dataclass(frozen=True)
class Embeddings:
    """What N pictures are to an i2L model.

    ``image`` [N, E]: SigLIP2's embedding, then DINOv3's. ``tokens``: by side of the view in pixels, Qwen-VL's
    tokens [N, L, D]. ``cached``: how many embeddings came from the cache.
    """

    image: torch.Tensor
    tokens: Mapping[int, torch.Tensor] = field(default_factory=dict)
    cached: int = 0


def embed(
    pictures: Sequence[images.Picture],
    model: Model,
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

    from i2l_ext.encoders import dinov3, qwen_view, qwen_vl, siglip2

    book = _Book(files, options, callbacks, cache)
    seen = [[_pixels(picture, part) for picture in pictures] for part in (model.siglip2, model.dinov3)]
    [first] = book.look_up(model.siglip2, seen[:1], siglip2.encode)
    [second] = book.look_up(model.dinov3, seen[1:], dinov3.encode)
    tokens: dict[int, torch.Tensor] = {}
    if part := model.qwen_vl:
        views = [[qwen_view.patches(picture.view(side), part.spec) for picture in pictures] for side in model.views]
        tokens = dict(zip(model.views, book.look_up(part, views, qwen_vl.encode), strict=True))
    return Embeddings(torch.cat([first, second], dim=1), tokens, book.hits)


def _pixels(picture: images.Picture, part: Checkpoint) -> np.ndarray:
    eye = EYES[part.kind]
    return images.pixels(picture.square, part.spec.image, eye.mean, eye.std, rounded=eye.rounded)


@dataclass
class _Book:
    """What is known of the pictures already; the rest is encoded, and noted."""

    files: Mapping[str, Sequence[Path]]
    options: ComputeOptions
    callbacks: Callbacks
    cache: EmbeddingCache | None
    hits: int = 0

    def look_up(
        self,
        part: Checkpoint,
        views: Sequence[Sequence[np.ndarray]],
        encode: Callable[..., list[torch.Tensor]],
    ) -> list[torch.Tensor]:
        """One tensor [N, …] for each view, of which each is a list of N arrays."""
        import torch

        from i2l_ext.weights.devices import choose_dtype, device_facts

        self.callbacks.step(f"encode {part.id}")
        chosen = choose_dtype(device_facts(self.options.device), part.spec.safe_dtypes, self.options.dtype)
        options = replace(self.options, dtype=chosen.dtype)
        keys = [[self._key(part, array, options.dtype) for array in view] for view in views]
        known = [[self.cache.get(key) if self.cache else None for key in row] for row in keys]
        lacking = [[number for number, tensor in enumerate(row) if tensor is None] for row in known]
        self.hits += sum(tensor is not None for row in known for tensor in row)
        asked = [index for index, numbers in enumerate(lacking) if numbers]
        if asked:
            pixels = [torch.stack([torch.from_numpy(views[index][n]) for n in lacking[index]]) for index in asked]
            made = encode(self.files[part.id], part.spec, pixels, options, self.callbacks)
            for index, found in zip(asked, made, strict=True):
                _check_finite(part, found, options.dtype)
                for number, tensor in zip(lacking[index], found, strict=True):
                    known[index][number] = tensor
                    if self.cache:
                        self.cache.put(keys[index][number], tensor)
        return [torch.stack(row) for row in known]

    def _key(self, part: Checkpoint, pixels: np.ndarray, dtype: str) -> str:
        """Equal pixels, equal weights, equal arithmetic: equal embedding."""
        from i2l_ext.models.store import identity

        facts = (sha256(pixels.tobytes()).hexdigest(), part.id, identity(self.files[part.id]), dtype)
        return sha256("\n".join(facts).encode()).hexdigest()


def _check_finite(part: Checkpoint, found: torch.Tensor, dtype: str) -> None:
    """Raises UserError where an embedding holds NaN or infinity: nothing could be made of it, and it is not kept."""
    import torch

    from i2l_ext.weights.devices import PRECISION_WORDS

    if torch.isfinite(found).all():
        return
    mend = "Check its weights: i2l models verify."
    if dtype != "float32":
        mend = "Choose fp32: --precision fp32, or Precision in the settings."
    raise UserError(f"{part.id}: in {PRECISION_WORDS[dtype]} its embedding comes out as NaN or infinity. {mend}")
