"""The predictor of arXiv 2606.13809: our decoder against a plain implementation written from its description, pictures
that are seen together, what a header may say, and how it is trained."""

import math

import pytest
import torch
from safetensors.torch import save_file

from i2l_ext.converters.architectures import MINI, QWEN_IMAGE, Z_IMAGE
from i2l_ext.decoder import DecoderSpec
from i2l_ext.decoder.decode import Decoder
from i2l_ext.decoder.spec import TransformerSpec, spec_of
from small_encoders import relative, save, weights

TOKEN, WIDTH, RANK = 20, 24, 3
SPEC = DecoderSpec(MINI, WIDTH, 5, RANK, None, "queries", TransformerSpec(TOKEN, WIDTH, 3, 2, 8, 40))


def plain_lora(tensors, tokens, counts):
    """The LoRA {path: (down, up)} by loops over heads, queries and blocks, in float64. ``tokens``: one [T, token] for
    each picture; ``counts``: how many times each counts. Nothing of i2l_ext is used."""
    w = {key: tensor.double() for key, tensor in tensors.items()}

    def rms(x, scale):
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * scale

    names = sorted({key.split(".")[1] for key in w if key.startswith("module_dict.")})
    sequence, weight = [], []
    for name in names:
        for side in "ab":
            for query in w[f"module_dict.{name}.query_{side}"]:
                sequence.append(query)
                weight.append(1.0)
    total = len(sequence)
    for picture, count in zip(tokens, counts, strict=True):
        for token in picture.double():
            sequence.append(w["image.weight"] @ token + w["image.bias"])
            weight.append(count)
    x, weight = torch.stack(sequence), torch.tensor(weight, dtype=torch.float64)
    depth = 0
    while f"blocks.{depth}.mlp.up.weight" in w:
        b = {key.removeprefix(f"blocks.{depth}."): t for key, t in w.items() if key.startswith(f"blocks.{depth}.")}
        size = len(b["attention.norm_q.weight"])
        heads = b["attention.out.weight"].shape[1] // size
        h = rms(x, b["attention_norm.weight"])
        q, k, v = (h @ part.T for part in b["attention.qkv.weight"].split(heads * size))
        mixed = []
        for n in range(heads):
            own = slice(n * size, (n + 1) * size)
            one = rms(q[:, own], b["attention.norm_q.weight"])
            other = rms(k[:, own], b["attention.norm_k.weight"])
            scores = (one @ other.T / math.sqrt(size)).exp() * weight
            mixed.append(scores / scores.sum(1, keepdim=True) @ v[:, own])
        x = x + torch.cat(mixed, 1) @ b["attention.out.weight"].T
        gate, up = (rms(x, b["mlp_norm.weight"]) @ b["mlp.up.weight"].T).chunk(2, 1)
        x = x + (gate / (1 + (-gate).exp()) * up) @ b["mlp.down.weight"].T
        depth += 1
    vectors = iter(rms(x[:total], w["norm.weight"]))
    lora = {}
    for name in names:
        factors = []
        for side in "ab":
            key = f"module_dict.{name}.proj_{side}"
            rows = [next(vectors) for _ in w[f"module_dict.{name}.query_{side}"]]
            factors.append(torch.stack([w[f"{key}.proj_out.weight"] @ (w[f"{key}.proj_in.weight"] @ r) for r in rows]))
        lora[name.replace("___", ".")] = factors[0], factors[1].T
    return lora


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Random weights and their file."""
    tensors = weights(SPEC.shapes)
    return tensors, save(tmp_path_factory.mktemp("queries") / "heads.safetensors", tensors)


def pictures(count, seed=1, tokens=7):
    return torch.randn(count, tokens, TOKEN, generator=torch.Generator().manual_seed(seed))


def made(path, tokens, scales, spec=SPEC):
    with Decoder(path, spec) as decoder:
        lora = decoder.lora(tokens, scales)
        return {module: tuple(factor.clone() for factor in lora[module]) for module in lora}


def differ(ours, theirs):
    """The greatest relative difference of all factors."""
    assert ours.keys() == theirs.keys()
    return max(relative(one, other) for path in ours for one, other in zip(ours[path], theirs[path], strict=True))


@pytest.mark.parametrize("count", [1, 3])
def test_the_decoder_agrees_with_a_plain_implementation(stored, count):
    tensors, path = stored
    ours = made(path, pictures(count), [1 / count] * count)
    assert set(ours) == set(MINI.i2l_modules)
    assert all(down.shape[0] == up.shape[1] == RANK for down, up in ours.values())
    assert differ(ours, plain_lora(tensors, pictures(count), [1] * count)) < 1e-5


def test_weights_are_how_often_a_picture_counts(stored):
    tensors, path = stored
    tokens = pictures(3)
    ours = made(path, tokens, [0.5, 0.25, 0.25])
    assert differ(ours, plain_lora(tensors, tokens, [1, 0.5, 0.5])) < 1e-5
    assert differ(ours, made(path, tokens, [1 / 3] * 3)) > 1e-2
    from i2l_ext.decoder.transformer import block, enter, leave, picture_bias

    # a picture of weight 3 is a picture that is given three times, but for the largest weight, which counts as 1
    twice = torch.cat([tokens[:1], tokens[:1], tokens[:1], tokens[1:2]])[None]
    queries = torch.cat([tensors[key] for key in SPEC.queries])
    found = []
    for seen, bias in ((twice, None), (tokens[None, :2], math.log(3) + picture_bias(torch.tensor([[3.0, 1]]), 0, 7))):
        x = enter(queries, seen, tensors)
        for number in range(SPEC.transformer.depth):
            own = {name: tensors[key] for name, key in SPEC.transformer.names(number).items()}
            mask = None if bias is None else torch.nn.functional.pad(bias, (len(queries), 0))
            x = block(x, own, SPEC.transformer.head_dim, mask)
        found.append(leave(x, len(queries), tensors))
    assert relative(*found) < 1e-5


def test_a_weight_near_nothing_leaves_a_picture_out(stored):
    _, path = stored
    tokens = pictures(2)
    assert differ(made(path, tokens, [1 - 1e-9, 1e-9]), made(path, tokens[:1], [1.0])) < 1e-5


def test_strength_scales_the_update_alone(stored):
    _, path = stored
    whole, half = (made(path, pictures(2), [s * 0.7, s * 0.3]) for s in (1.0, -0.5))
    for module, (down, up) in whole.items():
        assert torch.allclose(half[module][0], -0.5 * down, rtol=1e-5, atol=1e-6)
        assert torch.allclose(half[module][1], up, rtol=1e-5, atol=1e-6)


def test_the_order_of_pictures_does_not_matter(stored):
    _, path = stored
    tokens = pictures(3)
    assert differ(made(path, tokens, [0.5, 0.3, 0.2]), made(path, tokens.flip(0), [0.2, 0.3, 0.5])) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_other_formats_are_computed_in_bf16(tmp_path, dtype):
    tensors = {key: tensor.to(dtype) for key, tensor in weights(SPEC.shapes).items()}
    ours = made(save(tmp_path / "heads.safetensors", tensors, dtype), pictures(2), [0.5, 0.5])
    theirs = plain_lora(tensors, pictures(2).bfloat16(), [1, 1])
    for path, factors in ours.items():
        for factor, other in zip(factors, theirs[path], strict=True):
            assert factor.dtype == torch.bfloat16
            assert (factor.double() - other).norm() < 0.05 * other.norm()


def test_tokens_of_another_width_or_number_are_refused(stored):
    with Decoder(stored[1], SPEC) as decoder:
        for tokens in (pictures(2)[..., :-1], pictures(3), pictures(2).flatten(0, 1)):
            with pytest.raises(ValueError, match="patch tokens"):
                decoder.lora(tokens, [0.5, 0.5])


@pytest.mark.parametrize("arch", [MINI, Z_IMAGE, QWEN_IMAGE], ids=lambda arch: arch.id)
def test_dimensions_are_read_from_the_header(arch):
    spec = DecoderSpec(arch, 64, 16, 8, None, "queries", TransformerSpec(1536, 64, 5, 3, 16, 128))
    assert spec_of(spec.shapes) == spec
    for key in ("image.bias", "blocks.4.mlp.up.weight", next(iter(spec.queries))):
        assert spec_of({name: shape for name, shape in spec.shapes.items() if name != key}) is None
    assert spec_of(spec.shapes | {"more": (1,)}) is None
