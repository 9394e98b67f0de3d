"""The predictor of arXiv 2606.13809: our decoder against a plain implementation written from its description, pictures
that are seen together, what a header may say, and how it is trained."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from i2l_ext import images
from i2l_ext.commands.main import main
from i2l_ext.converters.architectures import MINI, QWEN_IMAGE, Z_IMAGE
from i2l_ext.decoder import DecoderSpec
from i2l_ext.decoder.decode import Decoder
from i2l_ext.decoder.spec import TransformerSpec, spec_of
from i2l_ext.embed import embed
from i2l_ext.encoders.dims import SIGLIP2_MINI
from i2l_ext.mini import dataset
from i2l_ext.mini.base import MiniBase
from i2l_ext.mini.sampler import WEIGHTS
from i2l_ext.models import catalogue
from i2l_ext.models.heads import seeing_patches
from i2l_ext.training import config, experts, loop
from i2l_ext.training.examples import Examples, style_ranges
from i2l_ext.training.heads import whitening_matrix
from i2l_ext.training.metrics import read_metrics
from i2l_ext.training.queries import References, TrainableQueries
from i2l_ext.weights.compute import Callbacks, ComputeOptions
from small_encoders import SIGLIP, relative, save, weights
from test_make import assert_same, deltas
from test_training import small

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


# ---- a block at a time


def test_a_block_of_weights_is_in_memory_at_a_time(tmp_path, monkeypatch):
    from i2l_ext.weights import stream as streaming

    deep = DecoderSpec(MINI, 64, 5, RANK, None, "queries", TransformerSpec(TOKEN, 64, 16, 4, 16, 2048))
    path = save(tmp_path / "heads.safetensors", weights(deep.shapes))
    sizes, plain = [], streaming.page_buffer
    monkeypatch.setattr(streaming, "page_buffer", lambda nbytes: (sizes.append(nbytes), plain(nbytes))[1])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    made(path, pictures(2), [0.5, 0.5], deep)
    block = 4 * sum(map(math.prod, deep.transformer.block.values()))
    queries = 4 * sum(map(math.prod, (*deep.queries.values(), *deep.transformer.ends.values())))
    blocks = [size for size in sizes if block <= size < 2 * block]
    assert len(blocks) == 2, "one in use, one that is read ahead"
    assert sum(sizes) < path.stat().st_size / 4
    assert sum(sizes) - sum(blocks) < 2 * queries + 8192 * (len(deep.queries) + 20)


def test_it_can_be_stopped_in_the_transformer(stored):
    from i2l_ext.converters.errors import Cancelled

    with Decoder(stored[1], SPEC, Callbacks(cancelled=lambda: True)) as decoder:
        lora = decoder.lora(pictures(1), [1.0])
        with pytest.raises(Cancelled):
            lora[next(iter(lora))]


# ---- from pictures to file


@pytest.fixture(scope="module")
def own_heads(tmp_path_factory):
    """A file of heads for the small models of the tests: their SigLIP2 has 16 tokens of 64 numbers a picture."""
    spec = replace(SPEC, transformer=replace(SPEC.transformer, token=SIGLIP.width))
    return spec, save(tmp_path_factory.mktemp("own") / "queries.safetensors", weights(spec.shapes))


def tokens_of(world, paths):
    """What transformers' own SigLIP makes of the pictures."""
    from transformers import SiglipVisionModel

    from i2l_ext.embed import NORMALIZATIONS
    from i2l_ext.encoders import siglip2
    from i2l_ext.encoders.keys import file_key

    model, how = SiglipVisionModel(siglip2.config(SIGLIP)).eval(), NORMALIZATIONS["siglip2"]
    saved = load_file(world.file("small-siglip2"))
    model.load_state_dict({key: saved[file_key("siglip2", key)] for key in model.state_dict()})
    squares = [images.open_image(path).square for path in paths]
    pixels = [images.pixels(square, SIGLIP.image, how.mean, how.std, rounded=how.rounded) for square in squares]
    with torch.no_grad():
        return model(torch.stack([torch.from_numpy(one) for one in pixels])).last_hidden_state


def test_pictures_are_seen_together(make, world, own_heads):
    _, path = own_heads
    made = make("--heads", path, "--weights", 2, 2, 1, "--strength", 0.8, pictures=world.pictures)
    assert made["rank"] == RANK and [one["weight"] for one in made["images"]] == [0.4, 0.4, 0.2]
    expected = plain_lora(load_file(path), tokens_of(world, world.pictures), [1, 1, 0.5])
    assert_same(deltas(made["file"]), {path: 0.8 * (up @ down).float() for path, (down, up) in expected.items()}, 1e-4)


def test_tokens_and_pooled_embeddings_are_both_cached(make, world, own_heads, monkeypatch):
    from i2l_ext.encoders import siglip2

    first = {"pooled": make("--name", "a"), "tokens": make("--name", "b", "--heads", own_heads[1])}
    monkeypatch.setattr(siglip2, "encode", lambda *_: pytest.fail("it was computed again"))
    again = {"pooled": make("--name", "c"), "tokens": make("--name", "d", "--heads", own_heads[1])}
    for which, made in again.items():
        assert_same(deltas(made["file"]), deltas(first[which]["file"]), 0)


def test_each_lora_sees_its_own_pictures(make, world, own_heads, tmp_path, capsys):
    folder = tmp_path / "styles" / "pair"
    folder.mkdir(parents=True)
    for number, to in enumerate((folder.parent / "one.png", folder / "a.png", folder / "b.png")):
        shutil.copy(world.pictures[number], to)
    options = ["--lora-dir", tmp_path / "each", "--heads", own_heads[1], "--model", "small", "--precision", "fp32"]
    assert main(["make", "--each", str(folder.parent), "--json", *map(str, options)]) == 0
    found = {one["name"]: one for one in map(json.loads, capsys.readouterr().out.splitlines())}
    assert {one["rank"] for one in found.values()} == {RANK}
    for name, pictures in (("one", world.pictures[:1]), ("pair", world.pictures[1:])):
        alone = make("--heads", own_heads[1], "--name", name, pictures=pictures)
        assert_same(deltas(found[name]["file"]), deltas(alone["file"]), 1e-4)


def test_the_grey_pair_is_of_this_kind_too(make, world, own_heads):
    made = make("--heads", own_heads[1], "--grey", pictures=world.pictures)
    file = Path(made["file"])
    grey = deltas(file.with_name(f"{made['name']}-grey.safetensors"))
    assert grey.keys() == deltas(file).keys()
    with pytest.raises(AssertionError):
        assert_same(grey, deltas(file), 1e-2)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda spec: replace(spec, transformer=replace(spec.transformer, token=9)), "take patch tokens of 9, not 64"),
        (lambda spec: replace(spec, arch=Z_IMAGE), "write for Z-Image"),
        (lambda spec: replace(spec, embed=WIDTH + 1), "not the heads of an i2L model"),
        ({"blocks.0.attention.qkv.weight": (50, WIDTH)}, "'blocks.0.attention.qkv.weight' has the shape [50, 24]"),
        ({"blocks.1.mlp.down.weight": (WIDTH, 41)}, "'blocks.1.mlp.down.weight' has the shape [24, 41]"),
        ({"norm.weight": (WIDTH + 1,)}, "'norm.weight' has the shape [25] and not [24]"),
        ({"blocks.2.attention.norm_k.weight": None}, "'blocks.2.attention.norm_k.weight' is missing"),
        ({"blocks.9.more": (1,)}, "is missing"),
        ({"image.weight": (WIDTH, 64, 1)}, "not the heads of an i2L model"),
        ({"blocks.0.attention.norm_q.weight": (0,)}, "not the heads of an i2L model"),
    ],
    ids=str,
)
def test_dimensions_that_do_not_fit_get_one_line(make, own_heads, tmp_path, change, told):
    spec, _ = own_heads
    changed = spec.shapes | change if isinstance(change, dict) else change(spec).shapes
    path = tmp_path / "wrong.safetensors"
    save_file({key: torch.zeros(shape) for key, shape in changed.items() if shape is not None}, path)
    code, error = make("--heads", path)
    assert code == 1 and told in error and error.count("\n") == 1
    assert not list((tmp_path / "Lora").glob("*"))


# ---- training


def small_expert(**changes):
    raw = {"name": "queries", "kind": "queries", "compress": 5, "rank": RANK, "schedule": {"steps": 4, "batch": 4}}
    raw["queries"] = {"width": WIDTH, "depth": 2, "heads": 3, "mlp": 16, "references": 3}
    return raw | changes


def expert_of(raw):
    return config.parse_config({"name": "n", "output": "o", "experts": [raw]}).experts[0]


def examples_of(counts, contents=None, tokens=5):
    """Examples of styles with ``counts`` pictures, their patch tokens random."""
    first, count = style_ranges(counts)
    nothing, generator = torch.zeros(len(first), 1, 1), torch.Generator().manual_seed(0)
    return Examples(
        first, count, nothing[..., None], *[nothing] * 5, content=contents and torch.tensor(contents),
        patches=torch.randn(len(first), tokens, TOKEN, generator=generator).half(),
        grey=torch.full((1, tokens, TOKEN), 0.5).half(),
    )  # fmt: skip


def test_what_is_trained_makes_the_same_lora_in_the_decoder(tmp_path):
    torch.manual_seed(0)
    module = TrainableQueries(MINI, TOKEN, expert_of(small_expert()))
    for down, up in module(pictures(4).view(2, 2, 7, TOKEN)).values():
        assert up.shape[0] == down.shape[0] == 2 and up.abs().max() == 0 and down.abs().max() > 0
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    module.whitening = whitening_matrix(pictures(9).flatten(0, 1) * torch.logspace(-1, 1, TOKEN), 0.01)
    tensors = module.folded_state_dict()
    spec = spec_of({key: tuple(tensor.shape) for key, tensor in tensors.items()})
    assert spec == module.spec
    with torch.no_grad():
        found = {path: (down[0], up[0]) for path, (down, up) in module(pictures(3)[None]).items()}
    theirs = made(save(tmp_path / "heads.safetensors", tensors), pictures(3), [1 / 3] * 3, spec)
    assert differ(found, theirs) < 1e-4


def test_references_and_target_share_the_style_and_not_the_content():
    styles, contents = [4, 1, 3, 2], [0, 1, 1, 2, 5, 3, 3, 3, 0, 4]
    examples = examples_of(styles, contents)
    style, content = torch.arange(4).repeat_interleave(torch.tensor(styles)), torch.tensor(contents)
    rows = torch.arange(10).repeat(60)
    found = examples.sample_other_contents(rows, 3, torch.Generator().manual_seed(0))
    assert found.shape == (600, 3) and (style[found] == style[rows, None]).all()
    lonely = ((rows >= 4) & (rows < 8))[:, None]  # the only picture of its style, and pictures that show the same
    assert ((content[found] != content[rows, None]) | lonely).all()
    assert (found[rows == 4] == 4).all() and (found[rows == 5] != 5).all()
    assert all(len(set(one.tolist())) == 3 for one in found[(rows == 0) | (rows == 3)])
    assert all(set(one.tolist()) == {0, 3} for one in found[rows == 1]), "two are there: they repeat"
    assert {tuple(sorted(one.tolist())) for one in found[rows == 8]} == {(9, 9, 9)}
    plain = examples_of(styles)
    assert (plain.sample_other_contents(rows, 1, torch.Generator())[:, 0] != rows)[rows != 4].all()


def test_a_step_sees_one_or_several_pictures_and_sometimes_grey():
    examples = examples_of([4] * 50)
    expert = expert_of(small_expert(queries={**small_expert()["queries"], "grey": 0.25}))
    counts, grey = set(), 0
    targets = torch.arange(200)
    for step in range(20):
        seen = References.sample(expert, examples, targets, torch.Generator().manual_seed(step))
        counts.add(seen.rows.shape[1])
        tokens = seen.tokens(examples, slice(50, 150))
        assert tokens.shape == (100, seen.rows.shape[1], 5, TOKEN)
        assert torch.equal((tokens == 0.5).flatten(1).all(1), seen.grey[50:150])
        grey += int(seen.grey.sum())
        own = References.sample(replace(expert, target="self"), examples, targets, torch.Generator().manual_seed(step))
        assert torch.equal(own.rows[:, 0], targets)
    assert counts == {1, 2, 3} and 0.2 < grey / 4000 < 0.3


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"view": 16}, "queries takes patch tokens alone: leave out view and upon."),
        ({"target": "base"}, "choose pair or self."),
        ({"queries": {"width": 96, "heads": 5}}, "the width must be a multiple of it."),
        ({"queries": {"heads": 0}}, "the width must be a multiple of it."),
        ({"queries": {"references": 0}}, "queries.references: at least 1."),
        ({"queries": {"depth": 0}}, "depth and mlp must be at least 1."),
        ({"queries": {"timesteps": 0}}, "queries.timesteps: at least 1."),
        ({"queries": {"grey": 1.5}}, "queries.grey: a share, 0 to 1."),
        ({"queries": {"widht": 1}}, "did you mean 'width'?"),
    ],
    ids=str,
)
def test_wrong_settings_get_one_line(tmp_path, capsys, change, told):
    path, raw = small(tmp_path)
    raw["experts"] = [small_expert(**change)]
    path.write_text(yaml.safe_dump(raw))
    assert main(["train", str(path)]) == 1
    err = capsys.readouterr().err
    assert told in err and err.count("\n") == 1
    raw["experts"] = [small_expert(), {"name": "more", "upon": ["queries"], "schedule": {"steps": 1}}]
    path.write_text(yaml.safe_dump(raw))
    assert main(["train", str(path)]) == 1 and "which stands alone" in capsys.readouterr().err


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A configuration of one small expert, and a folder with the shipped base and encoders and a few examples."""
    folder = tmp_path_factory.mktemp("prepared")
    _, raw = small(folder)
    schedule = {"steps": 4, "batch": 2, "learning_rate": 3.0e-3, "warmup": 1, "log_every": 1, "save_every": 2}
    raw["experts"] = [small_expert(even=0.01, rank=1, schedule=schedule)]
    for part in ("base", "siglip2", "dinov3", "qwen_vl", "judge"):  # the autoencoder is in the base
        (folder / f"{part}.safetensors").symlink_to(WEIGHTS / f"{part}.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset, "BASE_IMAGES", 2)
        dataset.make_examples(expert_data(raw), folder, [], True, 0).save(folder / "examples.safetensors")
    return raw, folder


def expert_data(raw):
    return config.parse_config({**raw, "experts": []}).data


def test_examples_have_the_tokens_that_a_make_sees(prepared):
    """The same pictures through the pipeline: SigLIP2 of the miniature, half precision apart."""
    _, folder = prepared
    examples = Examples.load(folder / "examples.safetensors")
    assert examples.patches.shape == (36, SIGLIP2_MINI.tokens, SIGLIP2_MINI.width)
    grey = images.plain((128, 128, 128))
    model = seeing_patches(catalogue.MODELS["mini"])
    files = {"mini-siglip2": [folder / "siglip2.safetensors"]}
    seen = embed([grey], model, files, ComputeOptions(dtype="float32"))
    assert relative(examples.grey, seen.image) < 2e-3


def test_a_stopped_run_ends_as_a_whole_one_and_as_another(prepared, tmp_path, monkeypatch):
    raw, source = prepared
    ends = []
    for name in ("whole", "again", "stopped"):
        folder, path = tmp_path / name, tmp_path / f"{name}.yaml"
        folder.mkdir()
        for file in source.glob("*.safetensors"):
            (folder / file.name).symlink_to(file.resolve())
        path.write_text(yaml.safe_dump({**raw, "output": str(folder)}))
        if name == "stopped":
            with monkeypatch.context() as patch:
                patch.setattr(loop.TrainingCheckpoint, "save", stop_after(loop.TrainingCheckpoint.save))
                assert main(["train", str(path)]) == 130
            assert not (folder / "queries.safetensors").exists()
        assert main(["train", str(path)]) == 0
        curve = {line["step"]: line["loss"] for line in read_metrics(folder / "metrics.jsonl")}
        ends.append((load_file(folder / "queries.safetensors"), curve))
    (whole, curve), *others = ends
    assert spec_of({key: tuple(tensor.shape) for key, tensor in whole.items()}) is not None
    assert whole["image.weight"].dtype == torch.bfloat16 and len(curve) == 4
    for tensors, losses in others:
        assert losses == curve and all(torch.equal(tensors[key], whole[key]) for key in whole)


def test_a_target_is_learnt_at_several_timesteps(prepared, monkeypatch):
    """The LoRA is made once for a sample; the base sees its target at other timesteps, side by side."""
    raw, folder = prepared
    base, examples = MiniBase.load(folder / "base.safetensors"), Examples.load(folder / "examples.safetensors")
    queries = {**raw["experts"][0].get("queries", {}), "timesteps": 3}
    expert = expert_of({**raw["experts"][0], "queries": queries, "schedule": {"steps": 1, "batch": 2}})
    task = experts.expert_task(expert, base, examples, [], seed=0)
    seen, made, plain = [], [], task.module.forward
    monkeypatch.setattr(task.module, "forward", lambda tokens: (made.append(len(tokens)), plain(tokens))[1])
    hook = base.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    task.loss(task.module, task.rng(0), slice(0, 2)).backward()
    hook.remove()
    ((x, t, text, _),) = seen
    assert made == [2] and len(x) == 6 and len(set(t.tolist())) == 6
    assert torch.equal(text[0], text[2]) and not torch.equal(x[0], x[1])


def test_it_learns(prepared):
    raw, folder = prepared
    base = MiniBase.load(folder / "base.safetensors")
    expert = expert_of({**raw["experts"][0], "schedule": {"steps": 1, "batch": 4}})
    task = experts.expert_task(expert, base, Examples.load(folder / "examples.safetensors"), [], seed=0)
    optimizer = torch.optim.AdamW(task.module.parameters(), lr=5e-3)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = task.loss(task.module, task.rng(0), slice(0, 4))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in (task.module.weights[k] for k in LEARNING))


LEARNING = ("image/weight", "image/bias", "norm/weight", "blocks/0/attention/qkv/weight", "blocks/1/mlp/down/weight")


def stop_after(save):
    """A checkpoint's ``save`` as it is when somebody stops the run just after it."""

    def stopped(self, step):
        save(self, step)
        raise KeyboardInterrupt

    return stopped
