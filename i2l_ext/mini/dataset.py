"""The world as examples for the experts: pictures of many styles, embedded by the trained encoders."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from i2l_ext.training.config import DataConfig
from i2l_ext.training.examples import Examples, style_ranges

from . import looks, things, world
from . import trainable_encoders as encoders
from .base import MiniBase
from .foundations import encoder_view, render_sources

BASE_IMAGES = 1024
"""How many images the base generates without a LoRA, for the bias."""


@torch.no_grad()
def image_embeddings(sources: torch.Tensor, folder: Path) -> torch.Tensor:
    """What `i2l_ext.embed` makes of the same pictures, for many at once: [N, 3, S, S] in 0..1 -> [N, E]. ``folder``
    holds the encoders."""
    parts = []
    for kind in ("siglip2", "dinov3"):
        encoder = encoders.load_encoder(kind, folder / f"{kind}.safetensors")
        side = encoders.ENCODER_DIMS[kind].image
        views = (encoder_view(batch, 1024, side) for batch in sources.split(512))
        inputs = (encoders.normalize_pixels(kind, view) for view in views)
        parts.append(torch.cat([encoders.pooled_embedding(encoder, batch) for batch in inputs]))
    return torch.cat(parts, dim=1)


@torch.no_grad()
def patch_tokens(sources: torch.Tensor, folder: Path) -> torch.Tensor:
    """SigLIP2's patch tokens: [N, 3, S, S] in 0..1 -> float16 [N, T, D]."""
    encoder = encoders.load_encoder("siglip2", folder / "siglip2.safetensors")
    views = (encoder_view(batch, 1024, encoders.ENCODER_DIMS["siglip2"].image) for batch in sources.split(512))
    return torch.cat([encoder(encoders.normalize_pixels("siglip2", v)).last_hidden_state.half() for v in views])


@torch.no_grad()
def token_embeddings(sources: torch.Tensor, side: int, folder: Path) -> torch.Tensor:
    """Qwen-VL's tokens of a view of ``side`` pixels: [N, 3, S, S] in 0..1 -> [N, L, D]."""
    encoder = encoders.load_encoder("qwen_vl", folder / "qwen_vl.safetensors")
    return torch.cat([encoders.qwen_tokens(encoder, encoder_view(batch, side)) for batch in sources.split(512)])


def make_examples(data: DataConfig, folder: Path, views: Iterable[int], patches: bool, seed: int) -> Examples:
    """``data.styles`` styles with ``data.contents`` pictures each. The captions name the content only. ``folder``
    holds the trained base and encoders."""
    rng = np.random.default_rng(seed + 5)
    styles = [style for style in (looks.random_style(rng) for _ in range(data.styles)) for _ in range(data.contents)]
    contents = [world.random_content(rng) for _ in styles]
    captions = [world.caption(content) for content in contents]
    sources = render_sources(styles, contents)
    base = MiniBase.load(folder / "base.safetensors")
    text, mask = base.encode_prompts([*captions, world.caption(None)])
    longest = int(mask.sum(1).max())
    text, mask = text[:, :longest], mask[:, :longest]
    first, count = style_ranges([data.contents] * data.styles)
    own = range(min(BASE_IMAGES, len(contents)))
    portions = [own[i : i + 64] for i in range(0, len(own), 64)]
    generated = [
        base.generate_latents([captions[n] for n in part], [seed * BASE_IMAGES + n for n in part]) for part in portions
    ]
    return Examples(
        first=first,
        count=count,
        latents=base.encode_pictures(world.downscale(sources)).half(),
        text=text[:-1],
        mask=mask[:-1],
        silent=text[-1:],
        silent_mask=mask[-1:],
        image=image_embeddings(sources, folder),
        tokens={side: token_embeddings(sources, side, folder).half() for side in views},
        own=torch.cat(generated).half(),
        own_caption=torch.tensor(own),
        patches=patch_tokens(sources, folder) if patches else None,
        grey=patch_tokens(torch.full_like(sources[:1], 128 / 255), folder) if patches else None,
        content=torch.tensor([list(things.THINGS).index(content.thing) for content in contents]),
    )
