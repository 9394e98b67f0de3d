"""FLUX.2: as FLUX.1, with one modulation for all blocks and gated feed-forward layers."""

from __future__ import annotations

from .base import Architecture, LayerKind, LayerStack
from .flux import double_stream_names, embedder_names


def flux2(
    id: str, title: str, *, depth: int, singles: int, hidden: int, text: int, guidance: bool = False, latent: int = 128
) -> Architecture:
    """The class Flux2Transformer2DModel at any size.

    ``depth`` double and ``singles`` single blocks of width ``hidden``; ``text``: width of the prompt's embedding;
    ``guidance``: whether it has an embedder for the guidance; ``latent``: channels of a patch, in and out. The first
    implementation has q, k and v of a double block as one layer. Its ``final_layer.adaLN_modulation.1`` is no name
    here: it holds our ``norm_out.linear`` with its halves exchanged. ComfyUI does not read ``webui`` keys of this
    family: after ``diffusion_model.`` it knows the first implementation's names only.
    """
    h = hidden
    double = (
        LayerKind("attn.to_q", h, h),
        LayerKind("attn.to_k", h, h),
        LayerKind("attn.to_v", h, h),
        LayerKind("attn.to_out.0", h, h),
        LayerKind("attn.add_q_proj", h, h),
        LayerKind("attn.add_k_proj", h, h),
        LayerKind("attn.add_v_proj", h, h),
        LayerKind("attn.to_add_out", h, h),
        LayerKind("ff.linear_in", h, 6 * h),
        LayerKind("ff.linear_out", 3 * h, h),
        LayerKind("ff_context.linear_in", h, 6 * h),
        LayerKind("ff_context.linear_out", 3 * h, h),
    )
    single = (LayerKind("attn.to_qkv_mlp_proj", h, 9 * h), LayerKind("attn.to_out", 4 * h, h))
    embedders = ("timestep_embedder", "guidance_embedder") if guidance else ("timestep_embedder",)
    outside = (
        *(LayerKind(f"time_guidance_embed.{embedder}.linear_1", 256, h) for embedder in embedders),
        *(LayerKind(f"time_guidance_embed.{embedder}.linear_2", h, h) for embedder in embedders),
        LayerKind("double_stream_modulation_img.linear", h, 6 * h),
        LayerKind("double_stream_modulation_txt.linear", h, 6 * h),
        LayerKind("single_stream_modulation.linear", h, 3 * h),
        LayerKind("x_embedder", latent, h),
        LayerKind("context_embedder", text, h),
        LayerKind("norm_out.linear", h, 2 * h),
        LayerKind("proj_out", h, latent),
    )
    ours, theirs = "transformer_blocks.*", "double_blocks.*"
    one, their_one = "single_transformer_blocks.*", "single_blocks.*"
    native = {
        **double_stream_names(),
        f"{theirs}.img_mlp.0": (f"{ours}.ff.linear_in",),
        f"{theirs}.img_mlp.2": (f"{ours}.ff.linear_out",),
        f"{theirs}.txt_mlp.0": (f"{ours}.ff_context.linear_in",),
        f"{theirs}.txt_mlp.2": (f"{ours}.ff_context.linear_out",),
        f"{their_one}.linear1": (f"{one}.attn.to_qkv_mlp_proj",),
        f"{their_one}.linear2": (f"{one}.attn.to_out",),
        **embedder_names("time_in", "time_guidance_embed.timestep_embedder"),
        **(embedder_names("guidance_in", "time_guidance_embed.guidance_embedder") if guidance else {}),
        "double_stream_modulation_img.lin": ("double_stream_modulation_img.linear",),
        "double_stream_modulation_txt.lin": ("double_stream_modulation_txt.linear",),
        "single_stream_modulation.lin": ("single_stream_modulation.linear",),
    }
    stacks = (LayerStack("transformer_blocks", depth, double), LayerStack("single_transformer_blocks", singles, single))
    return Architecture(id, title, "flux2", stacks, outside, native, key_format="diffusers")


KLEIN_4B = flux2("flux2-klein-4b", "FLUX.2 klein 4B", depth=5, singles=20, hidden=3072, text=7680)
KLEIN_9B = flux2("flux2-klein-9b", "FLUX.2 klein 9B", depth=8, singles=24, hidden=4096, text=12288)
FLUX2_DEV = flux2("flux2-dev", "FLUX.2 dev", depth=8, singles=48, hidden=6144, text=15360, guidance=True)
"""Sizes: DiffSynth-Studio's configs/model_configs.py, whose hashes of the checkpoints' structures a test recomputes."""
