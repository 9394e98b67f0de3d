"""Qwen-Image: 60 blocks with an image stream and a text stream."""

from __future__ import annotations

from .base import Architecture, LayerKind, LayerStack


def qwen_image(
    id: str,
    title: str,
    *,
    depth: int,
    hidden: int,
    latent: int,
    text: int,
    condition: int = 0,
    caution: str = "",
) -> Architecture:
    """The class QwenImageTransformer2DModel at any size.

    ``depth`` blocks of width ``hidden`` (heads x head size). ``latent``: channels of a patch, in and out;
    ``condition``: further channels in; ``text``: width of the prompt's embedding. Nunchaku calls the fused projections
    ``to_qkv`` and ``add_qkv_proj``, diffusers ``to_qkv`` and ``to_added_qkv`` (``fuse_projections``).
    """
    h = hidden
    kinds = (
        LayerKind("attn.to_q", h, h, 0),
        LayerKind("attn.to_k", h, h, 0),
        LayerKind("attn.to_v", h, h, 0),
        LayerKind("attn.to_out.0", h, h, 0),
        LayerKind("attn.add_q_proj", h, h, 2),
        LayerKind("attn.add_k_proj", h, h, 2),
        LayerKind("attn.add_v_proj", h, h, 2),
        LayerKind("attn.to_add_out", h, h, 2),
        LayerKind("img_mlp.net.0.proj", h, 4 * h),
        LayerKind("img_mlp.net.2", 4 * h, h, 1),
        LayerKind("img_mod.1", h, 6 * h, 1),
        LayerKind("txt_mlp.net.0.proj", h, 4 * h),
        LayerKind("txt_mlp.net.2", 4 * h, h, 3),
        LayerKind("txt_mod.1", h, 6 * h, 3),
    )
    singles = (
        LayerKind("img_in", latent + condition, h),
        LayerKind("txt_in", text, h),
        LayerKind("time_text_embed.timestep_embedder.linear_1", 256, h),
        LayerKind("time_text_embed.timestep_embedder.linear_2", h, h),
        LayerKind("norm_out.linear", h, 2 * h),
        LayerKind("proj_out", h, latent),
    )
    stacks = (LayerStack("transformer_blocks", depth, kinds),)
    attn = "transformer_blocks.*.attn"
    to = (f"{attn}.to_q", f"{attn}.to_k", f"{attn}.to_v")
    add = (f"{attn}.add_q_proj", f"{attn}.add_k_proj", f"{attn}.add_v_proj")
    aliases = {f"{attn}.to_qkv": to, f"{attn}.add_qkv_proj": add, f"{attn}.to_added_qkv": add}
    return Architecture(id, title, "qwen-image", stacks, singles, aliases=aliases, caution=caution)


QWEN_IMAGE = qwen_image("qwen-image", "Qwen-Image", depth=60, hidden=3072, latent=64, text=3584)
