"""A host's call of its model, imitated: cond_or_uncond in one batch and in separate calls, AND, tiles, batches."""

import math

import pytest
import torch
from torch import nn

from branch_models import MINI, hooks_of, lora_of, merged, qwen, qwen_inputs
from i2l_ext.branch import OPTION, BranchAdapter, GuidedLoras, Strength, follow, unfollow
from i2l_ext.branch.guidance import positive_rows, steps_done
from i2l_ext.converters import UserError

pytest.importorskip("diffusers")


class HostModel(nn.Module):
    """A transformer that is called as Forge Neo and ComfyUI do, around diffusers' class."""

    def __init__(self, inner):
        super().__init__()
        self.transformer_blocks, self._inner = inner.transformer_blocks, [inner]

    def forward(self, x, timesteps, context, transformer_options={}):  # noqa: B006  as theirs
        if transformer_options.get("fail"):
            raise ZeroDivisionError
        inputs = qwen_inputs(len(x)) | {"hidden_states": x, "timestep": timesteps, "encoder_hidden_states": context}
        return self._inner[0](**inputs)[0]


PICTURES = 2


def rows_of(name, pictures=PICTURES):
    inputs = qwen_inputs(pictures, seed=len(name))
    return inputs["hidden_states"], inputs["encoder_hidden_states"]


def call(model, branches, options, tiles=1, sigma=0.7):
    """One call with a chunk of pictures for each branch; with tiles, the whole batch once for each."""
    chunks = [rows_of(f"{branch}") for branch in branches]
    x, context = (torch.cat([chunk[i] for chunk in chunks] * tiles) for i in (0, 1))
    told = {
        "cond_or_uncond": branches, "sigmas": torch.full((PICTURES,), sigma),
        "sampling_sigmas": torch.linspace(1, 0, 11),
    }  # fmt: skip
    with torch.no_grad():
        return model(x, torch.full((len(x),), 0.7), context=context, transformer_options=told | options)


@pytest.mark.parametrize("tiles", [1, 3])
@pytest.mark.parametrize("branches", [[0], [1], [1, 0], [0, 1], [1, 0, 0], [0, 0, 1]])
def test_every_kind_of_call_agrees_with_two_models(branches, tiles):
    model, lora = HostModel(qwen()), lora_of(MINI)
    with_it, without = HostModel(merged(qwen(), (lora, 1.0))), HostModel(qwen())
    before = hooks_of(model)
    follow(model)
    follow(model)
    options = {OPTION: GuidedLoras(BranchAdapter(model, [lora]), (Strength(),))}
    found = call(model, branches, options, tiles).split(PICTURES)
    for chunk, branch in zip(found, branches * tiles, strict=True):
        expected = call(without if branch else with_it, [branch], {})
        assert torch.allclose(chunk, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)
    plain = call(without, branches, {}, tiles)
    assert torch.equal(call(model, branches, {}, tiles), plain), "a call that carries nothing"
    unfollow(model)
    unfollow(model)
    assert hooks_of(model) == before and torch.equal(call(model, branches, options, tiles), plain)


def test_after_an_error_in_the_models_call_its_layers_have_no_hook():
    model = HostModel(qwen())
    follow(model)
    before = hooks_of(model)
    options = {OPTION: GuidedLoras(BranchAdapter(model, [lora_of(MINI)]), (Strength(),)), "fail": True}
    with pytest.raises(ZeroDivisionError):
        call(model, [1, 0], options)
    assert hooks_of(model) == before


def test_start_and_stop_follow_the_hosts_noise_levels():
    model, lora = HostModel(qwen()), lora_of(MINI)
    follow(model)
    adapter = BranchAdapter(model, [lora])
    options = {OPTION: GuidedLoras(adapter, (Strength(start=0.3, stop=0.6),))}
    plain = call(HostModel(qwen()), [0], {})
    acts = "".join("01"[not torch.equal(call(model, [0], options, sigma=1 - i / 10), plain)] for i in range(10))
    assert acts == "0001110000"


def test_a_pass_that_begins_later_counts_its_own_steps():
    levels = [1.0, 0.8, 0.6, 0.4, 0.2, 0.0]
    assert [steps_done(level, 1.0, levels) for level in levels[:-1]] == [0, 0.2, 0.4, 0.6, 0.8]
    assert [steps_done(level, 0.4, levels) for level in (0.4, 0.2)] == [0, 0.5], "img2img: of two steps"
    assert steps_done(0.5, 1.0, levels) == 0.4, "a second look within a step"
    assert steps_done(0.0, 1.0, levels) == 0.8 and steps_done(1.0, 1.0, [1.0]) == 0


def test_a_sampler_without_steps_is_told_only_where_it_matters():
    model = HostModel(qwen())
    follow(model)
    adapter = BranchAdapter(model, [lora_of(MINI)])
    x, context = rows_of("")
    told = {"cond_or_uncond": [0], "sigmas": torch.ones(PICTURES)}
    for strength, fails in ((Strength(), False), (Strength(stop=0.5), True)):
        options = told | {OPTION: GuidedLoras(adapter, (strength,))}
        if fails:
            with pytest.raises(UserError, match="does not tell its steps"):
                model(x, torch.ones(PICTURES), context=context, transformer_options=options)
        else:
            assert math.isfinite(model(x, torch.ones(PICTURES), context=context, transformer_options=options).sum())


def test_rows():
    assert positive_rows(2, [1, 0], 1) == [False, True]
    assert positive_rows(6, [1, 0, 0], 2) == [False, False, True, True, True, True]
    assert positive_rows(8, [1, 0], 2) == [False, False, True, True] * 2
