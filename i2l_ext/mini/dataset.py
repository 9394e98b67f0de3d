"""The world as examples for experts: pictures of many styles, embedded by the trained encoders."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from i2l_ext.converters.files import load_file
from i2l_ext.encoders.keys import file_key
from i2l_ext.mini import models, world
from i2l_ext.mini.base import Base
from i2l_ext.mini.foundations import pictures, view
from i2l_ext.training.config import Data
from i2l_ext.training.examples import Examples, by_style

OWN = 1024
"""Pictures that the base draws by itself, for the bias."""


def encoder(kind: str, path: Path) -> nn.Module:
    """A trained encoder, frozen, in fp32."""
    model = models.BUILD[kind]()
    saved = load_file(path)
    model.load_state_dict({key: saved[file_key(kind, key)].float() for key in model.state_dict()})
    return model.eval().requires_grad_(False)


@torch.no_grad()
def image_embeddings(sources: torch.Tensor, folder: Path) -> torch.Tensor:
    """What `i2l_ext.embed` makes of the same pictures, for many at once: [N, 3, S, S] -> [N, E]."""
    parts = []
    for kind in ("siglip2", "dinov3"):
        model = encoder(kind, folder / f"{kind}.safetensors")
        batches = sources.split(512)
        seen = (models.normalised(kind, view(batch, 1024, models.DIMS[kind].image)) for batch in batches)
        parts.append(torch.cat([models.pooled(model, batch) for batch in seen]))
    return torch.cat(parts, dim=1)


@torch.no_grad()
def token_embeddings(sources: torch.Tensor, side: int, folder: Path) -> torch.Tensor:
    """Qwen-VL's tokens of a view of ``side`` pixels: [N, 3, S, S] -> [N, L, D]."""
    model = encoder("qwen_vl", folder / "qwen_vl.safetensors")
    return torch.cat([models.tokens(model, view(batch, side)) for batch in sources.split(512)])


def make(data: Data, folder: Path, views: Iterable[int], seed: int) -> Examples:
    """``data.styles`` styles with ``data.contents`` pictures each; captions name the content only."""
    rng = np.random.default_rng(seed + 5)
    styles = [style for style in (world.random_style(rng) for _ in range(data.styles)) for _ in range(data.contents)]
    contents = [world.random_content(rng) for _ in styles]
    sources = pictures(styles, contents)
    base = Base.load(folder / "base.safetensors")
    text, mask = base.read([world.caption(content) for content in contents])
    silent, silent_mask = base.read([world.caption(None)])
    first, count = by_style([data.contents] * data.styles)
    own = range(min(OWN, len(contents)))
    portions = [own[i : i + 64] for i in range(0, len(own), 64)]
    drawn = [base.draw([world.caption(contents[n]) for n in part], [seed * OWN + n for n in part]) for part in portions]
    return Examples(
        first=first,
        count=count,
        latents=(2 * world.shrink(sources.float()) - 1).half(),
        text=text,
        mask=mask,
        silent=silent,
        silent_mask=silent_mask,
        image=image_embeddings(sources, folder),
        tokens={side: token_embeddings(sources, side, folder).half() for side in views},
        own=(2 * torch.cat(drawn) - 1).half(),
        own_caption=torch.tensor(own),
    )
