"""Qwen-Image itself as the base, from a folder in diffusers' layout, and folders of pictures as examples.

None of this could be run on the real weights here; the shapes are those of diffusers' classes and pipeline.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from i2l_ext import images
from i2l_ext.converters.architectures import QWEN_IMAGE
from i2l_ext.converters.errors import UserError
from i2l_ext.embed import embed
from i2l_ext.models import catalogue, store
from i2l_ext.weights.compute import ComputeOptions

from .config import Config
from .examples import Examples, by_style
from .flow import velocity

PATCH = 2
PROMPT_TOKENS = 256
"""Longer captions are cut; shorter ones are masked."""

SAFE = {"local_files_only": True, "use_safetensors": True}
"""To every ``from_pretrained``: nothing is fetched, and nothing unpickled."""


class QwenImage(nn.Module):
    """The frozen transformer as a base for experts."""

    arch = QWEN_IMAGE

    def __init__(self, folder: Path, dtype: torch.dtype | None, checkpointing: bool) -> None:
        """Raises UserError for a folder without a transformer."""
        super().__init__()
        from diffusers import QwenImageTransformer2DModel

        if not (folder / "transformer" / "config.json").is_file():
            raise UserError(f"base.path: {folder} has no transformer/config.json: name a folder in diffusers' layout.")
        self.transformer = QwenImageTransformer2DModel.from_pretrained(
            folder, subfolder="transformer", torch_dtype=dtype or torch.float32, **SAFE
        )
        self.transformer.requires_grad_(False)
        if checkpointing:
            self.transformer.enable_gradient_checkpointing()

    def forward(self, x: torch.Tensor, t: torch.Tensor, text: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Velocity of latents [N, 16, H, W]."""
        return velocity(self.transformer, x, t, text, mask, PATCH)


def pictures(folder: Path) -> list[list[Path]]:
    """The pictures of each style: one sub-folder a style. Raises UserError for a folder without pictures, and for a
    picture without a caption beside it."""
    found = [images.collect([style]) for style in sorted(folder.iterdir()) if style.is_dir()]
    if not found:
        raise UserError(f"data.path: {folder} holds no folders; put the pictures of each style into one of its own.")
    for path in (path for style in found for path in style):
        if not path.with_suffix(".txt").is_file():
            raise UserError(f"{path.name}: no caption; write one into {path.with_suffix('.txt').name} beside it.")
    return found


@torch.no_grad()
def examples(config: Config, views: Iterable[int]) -> Examples:
    """Embeddings, latents and captions of all pictures. Raises UserError for what cannot be read.

    Models come and go one after the other: encoders first, a layer at a time, then text encoder and VAE.
    """
    styles = pictures(Path(config.data.path))
    paths = [path for style in styles for path in style]
    views = sorted(views)
    model = catalogue.find("qwen-image-coarse-fine" if views else "qwen-image-style")
    opened = [images.open_image(path, sizes=(*model.views, config.data.size)) for path in paths]
    weights = store.require(model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    seen = embed(opened, model, weights, ComputeOptions(device=device, dtype="auto"))

    from diffusers import QwenImagePipeline

    pipe = QwenImagePipeline.from_pretrained(config.base.path, transformer=None, torch_dtype=torch.bfloat16, **SAFE)
    pipe = pipe.to(device)
    captions = [path.with_suffix(".txt").read_text(encoding="utf-8").strip() for path in paths]
    told = [_caption(pipe, caption) for caption in [*captions, ""]]
    latents = [_latents(pipe, picture.view(config.data.size)) for picture in opened]
    first, count = by_style([len(style) for style in styles])
    return Examples(
        first=first,
        count=count,
        latents=torch.cat(latents).cpu(),
        text=torch.cat([text for text, _ in told[:-1]]).cpu(),
        mask=torch.cat([mask for _, mask in told[:-1]]).cpu(),
        silent=told[-1][0].cpu(),
        silent_mask=told[-1][1].cpu(),
        image=seen.image,
        tokens={side: seen.tokens[side].to(torch.bfloat16) for side in views},
    )


def _caption(pipe: Any, caption: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Text [1, 256, D] and mask [1, 256], padded."""
    text, mask = pipe.encode_prompt(caption, max_sequence_length=PROMPT_TOKENS)
    if mask is None:
        mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
    room = PROMPT_TOKENS - text.shape[1]
    return nn.functional.pad(text, (0, 0, 0, room)), nn.functional.pad(mask.bool(), (0, room))


def _latents(pipe: Any, image: object) -> torch.Tensor:
    """Normalised latents [1, 16, side / 8, side / 8]."""
    vae = pipe.vae
    pixels = pipe.image_processor.preprocess(image).unsqueeze(2).to(vae.device, vae.dtype)
    raw = vae.encode(pixels).latent_dist.mode()
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1).to(raw)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return ((raw - mean) / std).squeeze(2).to(torch.bfloat16)
