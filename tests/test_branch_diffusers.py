"""A LoRA on one branch of diffusers' own pipelines, at the size of the tests, on random weights: every call of the
transformer gives what a merged or an unmerged transformer gives."""

import contextlib
import gc
import weakref

import pytest
import torch

import i2l_ext.hooks.branch
from branch_models import MINI, TINY_Z, hooks_of, known, lora_of, merged, z_image
from i2l_ext.converters import UserError

diffusers = pytest.importorskip("diffusers")
EXACT = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def pipeline(family, dtype=torch.float32):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=family == "qwen")
    cls, model = {
        "qwen": (diffusers.QwenImagePipeline, qwen_of_pipeline),
        "z": (diffusers.ZImagePipeline, z_image),
    }[family]
    pipe = cls(scheduler=scheduler, vae=None, text_encoder=None, tokenizer=None, transformer=model().to(dtype))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def qwen_of_pipeline():
    """The miniature's transformer, without the positions beside its pixels: channels in = channels out, as a pipeline
    has it. Only its first layer differs."""
    from diffusers import QwenImageTransformer2DModel

    from i2l_ext.mini.base import TRANSFORMER_CONFIG

    torch.manual_seed(0)
    config = TRANSFORMER_CONFIG | {"in_channels": 48, "out_channels": 12, "patch_size": 2}
    return QwenImageTransformer2DModel(**config).eval().requires_grad_(False)


def generate(pipe, scale=2.0, steps=2, pictures=1, **other):
    """The latents of a guided generation. Guidance multiplies the rounding of both predictions by its scale."""
    generator = torch.Generator().manual_seed(5)
    dtype = pipe.transformer.dtype
    if isinstance(pipe, diffusers.QwenImagePipeline):
        words = pipe.transformer.config.joint_attention_dim
        embeds = [torch.randn(pictures, n, words, generator=generator).to(dtype) for n in (5, 7)]
        masks = [torch.ones(pictures, n, dtype=torch.bool) for n in (5, 7)]
        arguments = {
            "prompt_embeds": embeds[0], "prompt_embeds_mask": masks[0], "negative_prompt_embeds": embeds[1],
            "negative_prompt_embeds_mask": masks[1], "true_cfg_scale": scale,
        }  # fmt: skip
    else:
        positive, negative = ([torch.randn(n, 32, generator=generator).to(dtype)] * pictures for n in (5, 7))
        arguments = {"prompt_embeds": positive, "negative_prompt_embeds": negative, "guidance_scale": scale}
    with torch.no_grad():
        return pipe(
            height=64, width=64, num_inference_steps=steps, output_type="latent",
            generator=torch.Generator().manual_seed(6), **arguments, **other,
        ).images  # fmt: skip


def guided_by(pipe, positive, negative, pictures=1):
    """The same pipeline whose transformer is ``positive`` for the prompt and ``negative`` for the negative prompt: what
    every LoRA on a branch must equal. Each predicts alone, in a call of its own."""

    class Both(torch.nn.Module):
        dtype, device, config = positive.dtype, torch.device("cpu"), positive.config
        in_channels, context = positive.config.in_channels, "cond"

        def cache_context(self, name):
            self.context = name
            return contextlib.nullcontext()

        def forward(self, *args, **kwargs):
            if isinstance(pipe, diffusers.QwenImagePipeline):
                return (positive if self.context == "cond" else negative)(*args, **kwargs)
            x, t, text = args[:3]
            found = positive(x[:pictures], t[:pictures], text[:pictures], **kwargs)[0]
            if len(x) > pictures:
                found += negative(x[pictures:], t[pictures:], text[pictures:], **kwargs)[0]
            return (found,)

    pipe.register_modules(transformer=None)
    pipe.transformer = Both()
    return pipe


@pytest.fixture(params=["qwen", "z"])
def family(request):
    return request.param


@pytest.fixture
def arch(family):
    with known(TINY_Z):
        yield MINI if family == "qwen" else TINY_Z


def close(found, expected, bound=1e-5):
    """By the norm of the difference."""
    return float((found.float() - expected.float()).norm()) <= bound * float(expected.float().norm())


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("branch", ["positive", "negative", "both"])
def test_a_generation_is_that_of_two_transformers(tmp_path, family, arch, branch, dtype):
    lora = lora_of(arch, dtype=dtype)
    lora.save(tmp_path / "style.safetensors")
    pipe = pipeline(family, dtype)
    plain_model, with_it = merged(pipe.transformer), merged(pipe.transformer, (lora, 0.7))
    plain, before = generate(pipe, pictures=2), hooks_of(pipe.transformer)
    with i2l_ext.hooks.branch.apply(pipe, tmp_path / "style.safetensors", branch=branch, weight=0.7) as applied:
        assert applied.missing == ()
        found, alone = generate(pipe, pictures=2), generate(pipe, 1.0)
    assert hooks_of(pipe.transformer) == before and torch.equal(generate(pipe, pictures=2), plain)
    positive, negative = (with_it if branch in (name, "both") else plain_model for name in ("positive", "negative"))
    twin = guided_by(pipeline(family, dtype), positive, negative, 2)
    expected = generate(twin, pictures=2)
    assert not close(plain, expected, 2e-2), "the LoRA is too weak to tell anything"
    assert close(found, expected, EXACT[dtype])
    assert close(alone, generate(guided_by(pipeline(family, dtype), positive, negative), 1.0), EXACT[dtype]), (
        "no negative branch at all"
    )


def test_two_loras_one_on_each_branch_and_removed_one_by_one(tmp_path, family, arch):
    style, grey = lora_of(arch), lora_of(arch, rank=2, seed=2)
    style.save(tmp_path / "style.safetensors")
    grey.save(tmp_path / "style-grey.safetensors")
    pipe = pipeline(family)
    plain, before, model = generate(pipe), hooks_of(pipe.transformer), merged(pipe.transformer)
    first = i2l_ext.hooks.branch.apply(pipe, tmp_path / "style.safetensors")
    second = i2l_ext.hooks.branch.apply(pipe, tmp_path / "style-grey.safetensors", branch="negative", weight=0.5)
    (tmp_path / "style.safetensors").unlink()
    both = guided_by(pipeline(family), merged(model, (style, 1.0)), merged(model, (grey, 0.5)))
    assert close(generate(pipe), generate(both))
    first.remove()
    assert close(generate(pipe), generate(guided_by(pipeline(family), model, merged(model, (grey, 0.5)))))
    second.remove()
    second.remove()
    assert hooks_of(pipe.transformer) == before and torch.equal(generate(pipe), plain)


def test_only_some_steps(tmp_path, family, arch):
    lora_of(arch).save(tmp_path / "style.safetensors")
    pipe = pipeline(family)
    calls = []
    for number in range(2):
        with i2l_ext.hooks.branch.apply(pipe, tmp_path / "style.safetensors", start=number / 2, stop=(number + 1) / 2):
            layer = "transformer_blocks.0.attn.to_q" if family == "qwen" else "layers.0.attention.to_q"
            handle = pipe.transformer.register_forward_pre_hook(
                lambda model, args, layer=layer: calls.append(bool(hooks_of(model)[layer][0]))
            )
            generate(pipe, 1.0)
            handle.remove()
    assert calls == [True, False, False, True]


@pytest.mark.parametrize("branch", ["positive", "negative"])
def test_z_image_without_guidance_from_a_time_on(tmp_path, branch):
    """Its pipeline can leave the negative half out of the batch after a time: here after the first of four steps."""
    with known(TINY_Z):
        lora = lora_of(TINY_Z)
        lora.save(tmp_path / "style.safetensors")
        pipe = pipeline("z")
        pair = [merged(pipe.transformer, (lora, float(branch == name))) for name in ("positive", "negative")]
        with i2l_ext.hooks.branch.apply(pipe, tmp_path / "style.safetensors", branch=branch):
            found = generate(pipe, steps=4, cfg_truncation=0.01)
        assert close(found, generate(guided_by(pipeline("z"), *pair), steps=4, cfg_truncation=0.01))


def test_what_cannot_be_is_said_and_changes_nothing(tmp_path):
    lora_of(MINI).save(tmp_path / "mini.safetensors")
    pipe = pipeline("qwen")
    before = hooks_of(pipe.transformer)
    apply = i2l_ext.hooks.branch.apply
    with pytest.raises(UserError, match="branch is one of positive, negative, both, not 'cond'"):
        apply(pipe, tmp_path / "mini.safetensors", branch="cond")
    with pytest.raises(UserError, match=r"0 <= start < stop <= 1, not 0\.5 and 0\.2"):
        apply(pipe, tmp_path / "mini.safetensors", start=0.5, stop=0.2)
    with pytest.raises(UserError, match=r"transformer is a NoneType; a branch is known of QwenImageTransformer2DModel"):
        apply(object(), tmp_path / "mini.safetensors")
    with pytest.raises(UserError, match="there is no such file"):
        apply(pipe, tmp_path / "no.safetensors")
    with pytest.raises(UserError, match=r"mini.safetensors: a LoRA of Miniature of Qwen-Image, of which .* 0 of 60"):
        apply(pipeline("z"), tmp_path / "mini.safetensors")
    assert hooks_of(pipe.transformer) == before
    with apply(pipe, tmp_path / "mini.safetensors"):
        with pytest.raises(UserError, match="outside of its pipeline"):
            pipe.transformer(hidden_states=torch.zeros(1, 4, 48))
    assert hooks_of(pipe.transformer) == before


def test_an_applied_lora_is_freed_with_the_pipeline(tmp_path):
    lora_of(MINI).save(tmp_path / "mini.safetensors")
    pipe = pipeline("qwen")
    i2l_ext.hooks.branch.apply(pipe, tmp_path / "mini.safetensors")
    kept = weakref.ref(pipe.transformer)
    del pipe
    gc.collect()
    assert kept() is None
