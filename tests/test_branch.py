"""LoRAs beside a model's layers, on the rows that want them: the same as a merged and an unmerged model."""

import gc
import weakref

import pytest
import torch
from torch import nn

from branch_models import MINI, TINY_Z, Fused, hooks_of, known, lora_of, merged, qwen, qwen_inputs
from i2l_ext.branch import BranchAdapter, Strength, adapter_of, forget_adapter, match_lora
from i2l_ext.converters import Lora, UserError
from i2l_ext.converters.architectures import QWEN_IMAGE

pytest.importorskip("diffusers")
WIDTH = MINI.modules["transformer_blocks.0.attn.to_q"].shape[1]
EXACT = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def predict(model, rows, **other):
    dtype = next(model.parameters()).dtype
    inputs = {
        key: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for key, value in (qwen_inputs(rows) | other).items()
    }
    with torch.no_grad():
        return model(**inputs)[0]


def near(found, expected, bound=1e-5):
    """Relative to the largest number expected."""
    return float((found - expected).abs().max()) <= bound * float(expected.abs().max())


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("positive", [[True], [False], [True, False], [False, True], [True, False, False, True]])
def test_rows_are_those_of_a_merged_and_an_unmerged_model(dtype, positive):
    model, lora = qwen().to(dtype), lora_of(MINI)
    with_it, without = predict(merged(model, (lora, 0.8)), len(positive)), predict(model, len(positive))
    assert not near(with_it, without, 0.05), "the LoRA is too weak to tell anything"
    adapter = BranchAdapter(model, [lora])
    before = hooks_of(model)
    with adapter.active([Strength(0.8)], positive):
        found = predict(model, len(positive))
    for row, is_positive in enumerate(positive):
        expected = with_it[row] if is_positive else without[row]
        assert near(found[row], expected, EXACT[dtype])
    assert hooks_of(model) == before
    assert torch.equal(predict(model, len(positive)), without), "bit-equal to before"
    assert not adapter.uncalled


def test_a_row_without_a_lora_is_bit_equal_in_the_same_batch():
    """A linear layer mixes no rows: one that is not touched has the same bits."""
    model, lora = qwen(), lora_of(MINI)
    layer, x = model.transformer_blocks[0].attn.to_q, torch.randn(3, 7, WIDTH)
    plain = layer(x)
    with BranchAdapter(model, [lora]).active([Strength()], [True, False, True]):
        found = layer(x)
    assert torch.equal(found[1], plain[1]) and not torch.equal(found[0], plain[0])


def test_several_loras_add_up_each_with_its_own_strengths():
    model, style, grey = qwen(), lora_of(MINI), lora_of(MINI, rank=7, seed=2)
    adapter = BranchAdapter(model, [style, grey])
    with adapter.active([Strength(1.2, 0.0), Strength(-0.3, 0.9)], [False, True]):
        found = predict(model, 2)
    assert near(found[0], predict(merged(model, (grey, 0.9)), 2)[0])
    assert near(found[1], predict(merged(model, (style, 1.2), (grey, -0.3)), 2)[1])
    with adapter.active([Strength(0.5), Strength(0.5)], [True, True]):
        found = predict(model, 2)
    assert near(found, predict(merged(model, (style, 0.5), (grey, 0.5)), 2))


def test_weights_that_differ_are_not_rounded_to_the_layers_dtype():
    """bf16 would make 0.8 of a LoRA 0.80078 of it, and only where another one has another weight."""
    path, hidden = "transformer_blocks.0.attn.to_q", 128
    rank_one = torch.zeros(1, hidden), torch.zeros(hidden, 1)
    rank_one[0][0, 0] = rank_one[1][0, 0] = 1.0
    model = qwen().bfloat16()
    layer = model.get_submodule(path)
    nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
    x = torch.zeros(1, 256, hidden, dtype=torch.bfloat16)
    x[0, :, 0] = torch.arange(256)
    loras = [Lora.of(MINI, {path: rank_one}), Lora.of(MINI, {path: rank_one})]
    with BranchAdapter(model, loras).active([Strength(0.8), Strength(0.0)], [True]):
        found = layer(x)[0, :, 0]
    assert torch.equal(found, (0.8 * torch.arange(256)).bfloat16())


def test_loras_of_other_layers_share_an_adapter():
    paths = list(MINI.i2l_modules)
    model, first, second = qwen(), lora_of(MINI, paths=paths[:9]), lora_of(MINI, seed=2, paths=paths[6:12])
    with BranchAdapter(model, [first, second]).active([Strength(0.7), Strength(1.1)], [True]):
        found = predict(model, 1)
    assert near(found, predict(merged(model, (first, 0.7), (second, 1.1)), 1))


@pytest.mark.parametrize(
    ("strength", "acts"),
    [(Strength(), "1111"), (Strength(start=0.25, stop=0.75), "0110"), (Strength(stop=0.5), "1100"),
     (Strength(start=0.3), "0011"), (Strength(start=0.5, stop=0.5), "0000"), (Strength(0.0), "0000")],
)  # fmt: skip
def test_start_and_stop_are_shares_of_the_steps(strength, acts):
    assert "".join("01"[strength.at(True, step / 4) != 0] for step in range(4)) == acts
    assert not any(strength.at(False, step / 4) for step in range(4))


def test_a_lora_that_does_not_act_puts_no_hook_on_a_layer():
    model = qwen()
    adapter, before = BranchAdapter(model, [lora_of(MINI)]), hooks_of(model)
    for strengths, positive, progress in (
        ([Strength()], [False], 0.0),
        ([Strength(start=0.5)], [True], 0.4),
        ([Strength(0.0, 0.0)], [True, False], 0.0),
    ):
        with adapter.active(strengths, positive, progress):
            assert hooks_of(model) == before


def test_an_error_in_the_block_leaves_no_hook():
    model = qwen()
    adapter, before = BranchAdapter(model, [lora_of(MINI)]), hooks_of(model)
    with pytest.raises(ZeroDivisionError):
        with adapter.active([Strength()], [True]):
            1 / 0  # noqa: B018
    assert hooks_of(model) == before


@pytest.mark.parametrize("positive", [[True, True], [True, False], [False, True, False]])
def test_a_fused_layer_is_changed_by_slices_of_rows(positive):
    with known(TINY_Z):
        paths = [f"layers.{n}.attention.{name}" for n in (0, 1) for name in ("to_q", "to_v", "to_out.0")]
        first, second = lora_of(TINY_Z, paths=paths), lora_of(TINY_Z, rank=3, seed=2, paths=paths[:2])
        model, x = Fused(), torch.randn(len(positive), 5, 256)
        adapter = BranchAdapter(model, [first, second])
        assert [match.modules for match in adapter.matches] == [6, 2]
        fused = Fused()
        with torch.no_grad():
            for lora, weight in ((first, 1.0), (second, 0.5)):
                for path in lora:
                    block, name = fused.layers[int(path.split(".")[1])].attention, path.split("attention.")[1]
                    rows = {"to_q": slice(0, 256), "to_v": slice(512, 768)}.get(name)
                    layer = block.out if rows is None else block.qkv
                    layer.weight[rows or slice(None)] += weight * lora.delta(path)
        with torch.no_grad(), adapter.active([Strength(), Strength(0.5)], positive):
            found = model(x)
        for row, is_positive in enumerate(positive):
            assert near(found[row], (fused if is_positive else Fused())(x)[row])


def test_a_layer_that_is_no_linear_of_torch_is_changed_too():
    """A quantized layer: its weight is never looked at, and its shape is seen when it runs."""

    class Quantized(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.weight, self.linear = (linear.weight * 16).round().char(), linear

        def forward(self, x):
            return nn.functional.linear(x, self.weight.to(x) / 16, self.linear.bias)

    model, lora = qwen(), lora_of(MINI, paths=["transformer_blocks.0.attn.to_q"])
    quantized = Quantized(model.transformer_blocks[0].attn.to_q)
    model.transformer_blocks[0].attn.to_q = quantized
    x, weight = torch.randn(1, 4, WIDTH), quantized.weight.clone()
    with BranchAdapter(model, [lora]).active([Strength()], [True]):
        found = quantized(x)
    assert near(found, quantized(x) + x @ lora.delta("transformer_blocks.0.attn.to_q").T)
    assert torch.equal(quantized.weight, weight)
    wrong = lora_of(MINI, paths=["transformer_blocks.0.attn.to_q"])
    with BranchAdapter(model, [wrong]).active([Strength()], [True]):
        with pytest.raises(UserError, match=f"the layer maps {WIDTH} to 8, the LoRA {WIDTH} to {WIDTH}"):
            quantized.weight = quantized.weight[:8]
            quantized.linear.bias = None
            quantized(x)


def test_a_layer_without_the_rows_of_the_batch_is_refused_unless_all_rows_are_alike():
    model, lora = qwen(), lora_of(MINI, paths=["transformer_blocks.0.attn.to_q"])
    layer, x = model.transformer_blocks[0].attn.to_q, torch.randn(9, WIDTH)
    adapter = BranchAdapter(model, [lora])
    with adapter.active([Strength()], [True, False]):
        with pytest.raises(UserError, match=r"attn\.to_q: has 9 rows for a batch of 2"):
            layer(x)
    with adapter.active([Strength()], [True, True]):
        assert near(layer(x), torch.nn.functional.linear(x, layer.weight + lora.delta(*lora), layer.bias))


def test_what_does_not_fit_is_said_in_one_line():
    with pytest.raises(UserError, match="a LoRA of Qwen-Image, of which the loaded model has 0 of 720 modules"):
        match_lora(Fused(), lora_of(QWEN_IMAGE, rank=1))
    with pytest.raises(UserError, match=r"is \[768, 128\], in Qwen-Image \[18432, 3072\]"):
        match_lora(qwen(), lora_of(QWEN_IMAGE, rank=1), "big")
    model = qwen()
    del model.transformer_blocks[2]
    match = match_lora(model, lora_of(MINI))
    assert match.modules == 48 and len(match.missing) == 12
    del model.transformer_blocks[1:]
    with pytest.raises(UserError, match="12 of 60 modules"):
        match_lora(model, lora_of(MINI))
    with pytest.raises(ValueError, match="1 strengths for 2 LoRAs"):
        BranchAdapter(qwen(), [lora_of(MINI), lora_of(MINI)]).switch_on([Strength()], [True])


def test_factors_follow_the_layers_dtype_and_are_kept(tmp_path):
    lora_of(MINI, dtype=torch.bfloat16).save(tmp_path / "a.safetensors")
    model = qwen()
    adapter = adapter_of(model, [tmp_path / "a.safetensors"])
    size = adapter.nbytes
    with adapter.active([Strength()], [True]):
        predict(model, 1)
    assert adapter.nbytes == 2 * size, "float32 now, as the layers are"
    assert adapter_of(model, [tmp_path / "a.safetensors"]) is adapter
    lora_of(MINI, rank=2).save(tmp_path / "a.safetensors", overwrite=True)
    assert adapter_of(model, [tmp_path / "a.safetensors"]) is not adapter, "the file has changed"
    with pytest.raises(UserError, match=r"b.safetensors: cannot be read"):
        adapter_of(model, [tmp_path / "b.safetensors"])


def test_factors_are_freed_with_the_model_and_when_asked(tmp_path):
    lora_of(MINI).save(tmp_path / "a.safetensors")
    model = qwen()
    before = hooks_of(model)
    kept = weakref.ref(adapter_of(model, [tmp_path / "a.safetensors"]))
    kept().switch_on([Strength()], [True])
    forget_adapter(model)
    gc.collect()
    assert kept() is None and hooks_of(model) == before
    kept = weakref.ref(adapter_of(model, [tmp_path / "a.safetensors"]))
    del model
    gc.collect()
    assert kept() is None


def test_layers_that_never_ran_are_named():
    model = qwen()
    adapter = BranchAdapter(model, [lora_of(MINI)])
    with adapter.active([Strength()], [True]):
        model.transformer_blocks[0].attn.to_q(torch.randn(1, WIDTH))
    assert len(adapter.uncalled) == len(MINI.i2l_modules) - 1 and "transformer_blocks.0.attn.to_k" in adapter.uncalled
