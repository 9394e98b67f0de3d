"""Qwen-Image as the base, from a folder in diffusers' layout, and folders of pictures as examples.

This was never run on the real weights. The shapes are those of diffusers' classes and pipeline.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from i2l_ext import images
from i2l_ext.converters.architectures import QWEN_IMAGE
from i2l_ext.converters.errors import UserError
from i2l_ext.embed import embed
from i2l_ext.models import catalogue, store
from i2l_ext.models.heads import seeing_patches
from i2l_ext.weights.compute import ComputeOptions

from .base import DTYPES, Foundation
from .config import TrainingConfig
from .examples import Examples, style_ranges
from .flow import run_transformer

PATCH = 2
PROMPT_TOKENS = 256
"""Longer captions are cut, shorter ones padded and masked."""

SAFE_LOADING = {"local_files_only": True, "use_safetensors": True}
"""Options of every ``from_pretrained``: nothing is downloaded, and nothing is unpickled."""


class FrozenQwenImage(nn.Module):
    """The frozen transformer of Qwen-Image; a `FrozenBase`."""

    arch = QWEN_IMAGE

    def __init__(self, folder: Path, dtype: torch.dtype | None, checkpointing: bool) -> None:
        """Raises UserError for a folder without a transformer."""
        super().__init__()
        from diffusers import QwenImageTransformer2DModel

        if not (folder / "transformer" / "config.json").is_file():
            raise UserError(f"base.path: {folder} has no transformer/config.json: name a folder in diffusers' layout.")
        self.transformer = QwenImageTransformer2DModel.from_pretrained(
            folder, subfolder="transformer", torch_dtype=dtype or torch.float32, **SAFE_LOADING
        )
        self.transformer.requires_grad_(False)
        if checkpointing:
            self.transformer.enable_gradient_checkpointing()

    def forward(self, x: torch.Tensor, t: torch.Tensor, text: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Velocity [N, 16, H, W] of latents x [N, 16, H, W] at timesteps t [N], for text [N, L, D], mask [N, L]."""
        return run_transformer(self.transformer, x, t, text, mask, PATCH)


def pictures_by_style(folder: Path) -> list[list[Path]]:
    """The pictures of each style, one sub-folder each. Raises UserError for a folder without pictures, and for a
    picture without a caption beside it."""
    found = [images.collect([style]) for style in sorted(folder.iterdir()) if style.is_dir()]
    if not found:
        raise UserError(f"data.path: {folder} holds no folders; put the pictures of each style into one of its own.")
    for path in (path for style in found for path in style):
        if not path.with_suffix(".txt").is_file():
            raise UserError(f"{path.name}: no caption; write one into {path.with_suffix('.txt').name} beside it.")
    return found


class QwenImageTraining:
    """Training for Qwen-Image; a `TrainingBase`."""

    foundations: Mapping[str, Foundation] = {}
    plain_attention = False

    def __init__(self, config: TrainingConfig) -> None:
        """Raises UserError for settings of another base model."""
        if config.data.kind != "folder":
            raise UserError(f"data.kind: {config.data.kind!r} is not for Qwen-Image; choose 'folder'.")
        if config.foundations is not None:
            raise UserError("foundations: this section is for mini; leave it out.")
        self.config = config

    def load(self, folder: Path, device: torch.device) -> FrozenQwenImage:
        """The transformer at ``base.path``; ``folder`` is not used."""
        config = self.config
        base = FrozenQwenImage(Path(config.base.path), DTYPES[config.precision], config.gradient_checkpointing)
        return base.to(device)

    @torch.no_grad()
    def examples(self, folder: Path, views: Iterable[int], patches: bool) -> Examples:
        """Embeddings, latents and captions of all pictures. Raises UserError for what cannot be read.

        The encoders run first, then text encoder and VAE, so that they are not in memory together.
        """
        config, views = self.config, sorted(views)
        styles = pictures_by_style(Path(config.data.path))
        paths = [path for style in styles for path in style]
        model = catalogue.find("qwen-image-coarse-fine" if views else "qwen-image-style")
        opened = [images.open_image(path, sizes=(*model.views, config.data.size)) for path in paths]
        weights = store.require(model)
        options = ComputeOptions(device="cuda" if torch.cuda.is_available() else "cpu", dtype="auto")
        embedded = embed(opened, model, weights, options)
        grey, seeing = images.plain((128, 128, 128)), seeing_patches(model)
        seen = embed([*opened, grey], seeing, weights, options) if patches else None

        from diffusers import QwenImagePipeline

        pipe = QwenImagePipeline.from_pretrained(
            config.base.path, transformer=None, torch_dtype=torch.bfloat16, **SAFE_LOADING
        ).to(options.device)
        captions = [path.with_suffix(".txt").read_text(encoding="utf-8").strip() for path in paths]
        texts, masks = zip(*(_encode_caption(pipe, caption) for caption in [*captions, ""]), strict=True)
        latents = [_encode_latents(pipe, picture.view(config.data.size)) for picture in opened]
        first, count = style_ranges([len(style) for style in styles])
        return Examples(
            first=first,
            count=count,
            latents=torch.cat(latents).cpu(),
            text=torch.cat(texts[:-1]).cpu(),
            mask=torch.cat(masks[:-1]).cpu(),
            silent=texts[-1].cpu(),
            silent_mask=masks[-1].cpu(),
            image=embedded.image,
            tokens={side: embedded.tokens[side].to(torch.bfloat16) for side in views},
            patches=seen.image[:-1].to(torch.bfloat16) if seen else None,
            grey=seen.image[-1:].to(torch.bfloat16) if seen else None,
        )


def _encode_caption(pipe: Any, caption: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Text [1, 256, D] and mask [1, 256], padded."""
    text, mask = pipe.encode_prompt(caption, max_sequence_length=PROMPT_TOKENS)
    if mask is None:
        mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
    padding = PROMPT_TOKENS - text.shape[1]
    return nn.functional.pad(text, (0, 0, 0, padding)), nn.functional.pad(mask.bool(), (0, padding))


def _encode_latents(pipe: Any, image: object) -> torch.Tensor:
    """Normalised latents [1, 16, side / 8, side / 8]."""
    vae = pipe.vae
    pixels = pipe.image_processor.preprocess(image).unsqueeze(2).to(vae.device, vae.dtype)
    raw = vae.encode(pixels).latent_dist.mode()
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1).to(raw)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return ((raw - mean) / std).squeeze(2).to(torch.bfloat16)
