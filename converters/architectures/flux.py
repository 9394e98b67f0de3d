"""FLUX.1: blocks with an image stream and a text stream, then blocks with one stream."""

from __future__ import annotations

from .base import Architecture, LayerKind, LayerStack


def flux(
    id: str, title: str, *, depth: int, singles: int, hidden: int, latent: int, text: int, pooled: int
) -> Architecture:
    """The class FluxTransformer2DModel at any size, with guidance.

    ``depth`` double and ``singles`` single blocks of width ``hidden``. ``latent``: channels of a patch, in and out;
    ``text`` and ``pooled``: widths of the prompt's two embeddings. The first implementation has q, k and v as one
    layer, in single blocks with the way into the feed-forward layer. Its ``final_layer.adaLN_modulation.1`` is no name
    here: it holds our ``norm_out.linear`` with its halves exchanged.
    """
    h = hidden
    double = (
        LayerKind("norm1.linear", h, 6 * h),
        LayerKind("norm1_context.linear", h, 6 * h),
        LayerKind("attn.to_q", h, h),
        LayerKind("attn.to_k", h, h),
        LayerKind("attn.to_v", h, h),
        LayerKind("attn.to_out.0", h, h),
        LayerKind("attn.add_q_proj", h, h),
        LayerKind("attn.add_k_proj", h, h),
        LayerKind("attn.add_v_proj", h, h),
        LayerKind("attn.to_add_out", h, h),
        LayerKind("ff.net.0.proj", h, 4 * h),
        LayerKind("ff.net.2", 4 * h, h),
        LayerKind("ff_context.net.0.proj", h, 4 * h),
        LayerKind("ff_context.net.2", 4 * h, h),
    )
    single = (
        LayerKind("norm.linear", h, 3 * h),
        LayerKind("attn.to_q", h, h),
        LayerKind("attn.to_k", h, h),
        LayerKind("attn.to_v", h, h),
        LayerKind("proj_mlp", h, 4 * h),
        LayerKind("proj_out", 5 * h, h),
    )
    outside = (
        LayerKind("time_text_embed.timestep_embedder.linear_1", 256, h),
        LayerKind("time_text_embed.timestep_embedder.linear_2", h, h),
        LayerKind("time_text_embed.guidance_embedder.linear_1", 256, h),
        LayerKind("time_text_embed.guidance_embedder.linear_2", h, h),
        LayerKind("time_text_embed.text_embedder.linear_1", pooled, h),
        LayerKind("time_text_embed.text_embedder.linear_2", h, h),
        LayerKind("context_embedder", text, h),
        LayerKind("x_embedder", latent, h),
        LayerKind("norm_out.linear", h, 2 * h),
        LayerKind("proj_out", h, latent),
    )
    ours, theirs = "transformer_blocks.*", "double_blocks.*"
    one, their_one = "single_transformer_blocks.*", "single_blocks.*"
    native = {
        **double_stream_names(),
        f"{theirs}.img_mod.lin": (f"{ours}.norm1.linear",),
        f"{theirs}.txt_mod.lin": (f"{ours}.norm1_context.linear",),
        f"{theirs}.img_mlp.0": (f"{ours}.ff.net.0.proj",),
        f"{theirs}.img_mlp.2": (f"{ours}.ff.net.2",),
        f"{theirs}.txt_mlp.0": (f"{ours}.ff_context.net.0.proj",),
        f"{theirs}.txt_mlp.2": (f"{ours}.ff_context.net.2",),
        f"{their_one}.modulation.lin": (f"{one}.norm.linear",),
        f"{their_one}.linear1": (f"{one}.attn.to_q", f"{one}.attn.to_k", f"{one}.attn.to_v", f"{one}.proj_mlp"),
        f"{their_one}.linear2": (f"{one}.proj_out",),
        **embedder_names("time_in", "time_text_embed.timestep_embedder"),
        **embedder_names("guidance_in", "time_text_embed.guidance_embedder"),
        **embedder_names("vector_in", "time_text_embed.text_embedder"),
    }
    stacks = (LayerStack("transformer_blocks", depth, double), LayerStack("single_transformer_blocks", singles, single))
    return Architecture(id, title, "flux", stacks, outside, native)


def double_stream_names() -> dict[str, tuple[str, ...]]:
    """The first implementation's names of what FLUX.1 and FLUX.2 share, as in `Architecture.native`."""
    attn, theirs = "transformer_blocks.*.attn", "double_blocks.*"
    return {
        f"{theirs}.img_attn.qkv": (f"{attn}.to_q", f"{attn}.to_k", f"{attn}.to_v"),
        f"{theirs}.img_attn.proj": (f"{attn}.to_out.0",),
        f"{theirs}.txt_attn.qkv": (f"{attn}.add_q_proj", f"{attn}.add_k_proj", f"{attn}.add_v_proj"),
        f"{theirs}.txt_attn.proj": (f"{attn}.to_add_out",),
        "img_in": ("x_embedder",),
        "txt_in": ("context_embedder",),
        "final_layer.linear": ("proj_out",),
    }


def embedder_names(theirs: str, ours: str) -> dict[str, tuple[str, ...]]:
    """The first implementation's names of an embedder's two layers."""
    return {f"{theirs}.in_layer": (f"{ours}.linear_1",), f"{theirs}.out_layer": (f"{ours}.linear_2",)}


FLUX = flux("flux", "FLUX.1", depth=19, singles=38, hidden=3072, latent=64, text=4096, pooled=768)
"""FLUX.1 dev, and what has its layers (schnell lacks the guidance). Sizes: transformer/config.json of
black-forest-labs/FLUX.1-dev."""
