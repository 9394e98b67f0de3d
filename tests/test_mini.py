"""The miniature's world, its measures, and drawing with LoRAs."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from i2l_ext import images
from i2l_ext.branch import Strength
from i2l_ext.commands.main import main
from i2l_ext.converters.architectures import MINI
from i2l_ext.converters.errors import UserError
from i2l_ext.converters.lora import Lora
from i2l_ext.embed import NORMALIZATIONS
from i2l_ext.encoders import qwen_view
from i2l_ext.encoders.dims import QWEN_VL_MINI
from i2l_ext.mini import foundations, looks, measures, prompts, sampler, trainable_encoders, world
from i2l_ext.mini.base import TRANSFORMER_CONFIG, MiniBase
from i2l_ext.mini.prompts import MAX_WORDS, VOCABULARY, tokenize
from i2l_ext.mini.things import THINGS
from i2l_ext.training.heads import PerSampleLora


def scenes(count, seed=0):
    rng = np.random.default_rng(seed)
    return [looks.random_style(rng) for _ in range(count)], [world.random_content(rng) for _ in range(count)]


@pytest.fixture(scope="module")
def mini_sampler(tmp_path_factory):
    from safetensors.torch import save_file

    torch.manual_seed(0)
    base = MiniBase()
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    save_file({key: value.contiguous() for key, value in base.state_dict().items()}, path)
    return sampler.Sampler(path)


def random_lora(rank=4, seed=0):
    rng = torch.Generator().manual_seed(seed)
    shapes = {path: module.shape for path, module in MINI.i2l_modules.items()}
    return Lora.of(
        MINI,
        {
            path: (torch.randn(rank, d_in, generator=rng) / 10, torch.randn(d_out, rank, generator=rng) / 10)
            for path, (d_out, d_in) in shapes.items()
        },
    )


@pytest.mark.parametrize("thing", THINGS)
def test_every_thing_has_the_area_of_the_unit_circle(thing):
    scale, field = THINGS[thing].scale, THINGS[thing].body
    steps = torch.linspace(-3, 3, 1500)
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    area = (field(x / scale, y / scale) < 0).float().mean().item() * 36
    assert area == pytest.approx(math.pi, rel=0.02)


def test_pictures_come_from_their_seed_and_stay_in_range():
    first, again = (world.render(*scenes(16, seed=3), 64) for _ in range(2))
    assert torch.equal(first, again)
    assert first.shape == (16, 3, 64, 64) and first.min() >= 0 and first.max() <= 1
    assert not torch.equal(first, world.render(*scenes(16, seed=4), 64))


def test_captions_are_words_the_base_knows():
    for style, content in zip(*scenes(300), strict=True):
        assert len(tokenize(world.caption(content, style))) <= MAX_WORDS
        assert tokenize(world.caption(content)) == world.caption(content).split()
    assert tokenize(world.caption(None)) == ["a", "picture"]
    assert len(set(VOCABULARY)) == len(VOCABULARY)


def test_training_sees_what_the_pipeline_shows_the_encoders():
    styles, contents = scenes(6, seed=8)
    source = world.render(styles, contents, 256)
    views = {
        kind: trainable_encoders.normalize_pixels(kind, foundations.encoder_view(source, 1024, 64))
        for kind in ("siglip2", "dinov3")
    }
    tokens = trainable_encoders.qwen_patches(foundations.encoder_view(source, 32))
    for n, picture in enumerate(source):
        image = sampler.as_image(picture)
        square = images.cover(image, images.SIDE)
        for kind, view in views.items():
            expected = images.pixels(
                square, 64, NORMALIZATIONS[kind].mean, NORMALIZATIONS[kind].std, rounded=NORMALIZATIONS[kind].rounded
            )
            assert np.abs(view[n].numpy() - expected).max() < 0.03
        expected = qwen_view.patches(images.cover(image, 32), QWEN_VL_MINI)
        assert np.abs(tokens[n].numpy() - expected).max() < 0.03


def test_unrelated_styles_are_one_apart_and_a_picture_is_at_no_distance_from_itself():
    styles, contents = scenes(400)
    others, elsewhere = scenes(400, seed=1)
    a, b = (world.downscale(world.render(*part)) for part in ((styles, contents), (others, elsewhere)))
    same = world.downscale(world.render(styles, elsewhere))
    for measure in (measures.colour_distance, measures.texture_distance):
        assert measure(a, b).mean().item() == pytest.approx(1, abs=0.12)
        assert measure(a, a).max() == 0
        assert measure(a, same).mean() < 0.25
    assert measures.set_distance(a, b) < 0.1 < measures.set_distance(a, 0.5 * b)


def test_an_architecture_entry_matches_the_base():
    base = MiniBase()
    linears = {n: m for n, m in base.transformer.named_modules() if isinstance(m, torch.nn.Linear)}
    assert {path: module.shape for path, module in MINI.modules.items()} == {
        path: tuple(layer.weight.shape) for path, layer in linears.items()
    }
    assert TRANSFORMER_CONFIG["num_layers"] == MINI.stacks[0].depth


def test_a_drawing_depends_on_prompt_and_seed_only(mini_sampler):
    prompts, seeds = ["a star", "a moon left", "a star"], [5, 5, 6]
    together = mini_sampler.generate(prompts, seeds)
    for n, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        assert torch.allclose(together[n], mini_sampler.generate([prompt], [seed])[0], atol=1e-4)
    assert (together[0] - together[2]).abs().mean() > 1e-3


def test_a_lora_acts_by_its_weight_and_leaves_no_trace(mini_sampler):
    plain = mini_sampler.generate(["a star"], [0])
    lora = random_lora()
    one = mini_sampler.generate(["a star"], [0], [(lora, 1.0)])
    assert (one - plain).abs().max() > 1e-3
    assert torch.equal(mini_sampler.generate(["a star"], [0], [(lora, 0.0)]), plain)
    twice = mini_sampler.generate(["a star"], [0], [(lora, 0.5), (lora, 0.5)])
    assert torch.allclose(twice, one, atol=1e-3)
    assert torch.equal(mini_sampler.generate(["a star"], [0]), plain)


def test_hooks_give_each_sample_its_own_lora(mini_sampler):
    loras = [random_lora(seed=1), random_lora(seed=2)]
    merged = [mini_sampler.generate(["a star"], [0], [(lora, 1.0)])[0] for lora in loras]
    hooks = PerSampleLora(mini_sampler.base.transformer, MINI.i2l_modules)
    hooks.factors = {
        path: tuple(torch.stack([lora[path][part] for lora in loras]) for part in (0, 1)) for path in MINI.i2l_modules
    }
    drawn = mini_sampler.base.generate(["a star"] * 2, [0, 0])
    hooks.remove()
    assert torch.allclose(drawn, torch.stack(merged), atol=1e-3)
    assert torch.equal(mini_sampler.base.generate(["a star"], [0]), mini_sampler.base.generate(["a star"], [0]))


def test_prompts_carry_loras_as_in_a_webui():
    assert prompts.split_lora_tags("a star <lora:mine:0.5>") == ("a star", [("mine", 0.5)])
    assert prompts.split_lora_tags("<lora:a><lora:b:-1>a star")[1] == [("a", 1.0), ("b", -1.0)]
    with pytest.raises(UserError, match="must be a number"):
        prompts.split_lora_tags("a star <lora:mine:much>")


def test_the_draw_command(tmp_path, capsys):
    random_lora().save(tmp_path / "mine.safetensors")
    out = tmp_path / "out.png"
    line = ["draw", "--lora-dir", str(tmp_path), "--seed", "1", "--grid", "0,1", "--size", "64"]
    assert main([*line, "--prompt", "a star <lora:mine:1>", "-o", str(out)]) == 0
    assert Image.open(out).width > 2 * 64
    for wrong, words in (
        (["--prompt", "a dragon"], "'dragon'"),
        (["--prompt", "a star <lora:nobody:1>"], "there is no LoRA 'nobody' in it"),
        (["--prompt", "a star <lora:nobody:1>"], "Make one: i2l make PICTURE --model mini --name nobody --lora-dir"),
        (["--prompt", "a star", "--grid", "0,x"], "numbers with commas"),
        (["--lora", str(tmp_path / "none.safetensors:0.5")], "no such file"),
    ):
        capsys.readouterr()
        assert main([*line, *wrong, "-o", str(tmp_path / "none.png")]) == 1
        err = capsys.readouterr().err
        assert words in err and err.count("\n") == 1
        assert not (tmp_path / "none.png").exists()


def test_the_draw_command_with_a_negative_branch(tmp_path, capsys):
    """Each choice draws what the sampler generates with those strengths; what cannot be is said."""
    loras = {name: random_lora(seed=seed) for name, seed in (("mine", 1), ("mine-grey", 2))}
    loras["mine"].save(tmp_path / "mine.safetensors")
    line = ["draw", "--prompt", "a star <lora:mine:0.8>", "--lora-dir", str(tmp_path), "--size", "64", "--overwrite"]

    def drawn(*options):
        assert main([*line, *options, "-o", str(tmp_path / "out.png")]) == 0, capsys.readouterr().err
        return Image.open(tmp_path / "out.png").tobytes()

    for wrong, words in (
        (["--branch", "grey"], "no mine-grey.safetensors beside mine.safetensors"),
        (["--branch", "both", "--cfg", "1"], "--cfg 1 has no negative branch"),
        (["--cfg", "0.5"], "choose 1 to 30"),
        (["--negative", "a dragon"], "'dragon'"),
    ):
        capsys.readouterr()
        assert main([*line, *wrong, "-o", str(tmp_path / "none.png")]) == 1
        assert words in capsys.readouterr().err and not (tmp_path / "none.png").exists()
    loras["mine-grey"].save(tmp_path / "mine-grey.safetensors")
    base = sampler.Sampler()
    adapter = base.adapter(list(loras.values()))
    found = {branch: drawn("--branch", branch, "--cfg", "2") for branch in ("positive", "both", "grey")}
    for branch, (negative, grey) in {"positive": (0.0, 0.0), "both": (0.8, 0.0), "grey": (0.0, 0.8)}.items():
        strengths = [Strength(0.8, negative), Strength(0.0, grey)]
        pixels = base.generate_guided(adapter, strengths, ["a star"], [0], 2.0)
        assert found[branch] == sampler.as_image(pixels[0]).tobytes()
    assert len({*found.values(), drawn()}) == 4
    assert drawn("--negative", "a circle") == drawn("--negative", "a circle", "--cfg", "4", "--branch", "both")


def test_guidance_of_one_is_the_base_alone():
    """Without a negative branch, and with one whose prompt is the same, the image is the prompt's own."""
    base = sampler.Sampler()
    plain = base.generate(["a star", "a ring"], [1, 2])
    for scale, negative in ((1.0, "a picture"), (3.0, "a star")):
        guided = base.generate_guided(base.adapter([]), [], ["a star"], [1], scale, negative)
        assert torch.allclose(guided[0], plain[0], atol=1e-4)


def test_the_shipped_weights_are_what_the_catalogue_says():
    from i2l_ext.converters.files import TensorFile
    from i2l_ext.models import catalogue, store
    from i2l_ext.weights.structure import check_structure

    total = sum(path.stat().st_size for path in sampler.WEIGHTS.glob("*.safetensors"))
    assert total < 24e6
    for name in ("mini", "mini-queries", "mini-coarse", "mini-coarse-fine", "mini-coarse-fine-bias"):
        model = catalogue.find(name)
        store.require(model)
        for part in model.parts:
            with TensorFile(store.PACKAGE / part.files[0]) as file:
                shapes = file.header.shapes
                assert sum(math.prod(shape) for shape in shapes.values()) == part.parameters
                if part.kind != "bias":
                    check_structure(part.id, part.shapes, shapes)


def test_a_shipped_sample_gives_its_colours_to_another_content():
    """The whole chain on shipped weights: picture -> LoRA -> drawing, nearer to the picture than without."""
    from i2l_ext.mini.evaluation import Evaluator, unseen_pictures

    evaluator = Evaluator()
    samples = [group[0] for group in unseen_pictures(4, 1, offset=60_000)]
    targets = torch.stack([sample.pixels for sample in samples])
    loras = evaluator.make_loras("mini", samples)
    with_it = torch.cat([evaluator.generate(["a ring"], lora) for lora in loras])
    without = evaluator.generate(["a ring"]).expand(4, -1, -1, -1)
    assert (measures.style_distance(with_it, targets) < 0.6 * measures.style_distance(without, targets)).all()
    assert evaluator.classifier.things(without[:1]) == ["ring"]
    assert len(list(sampler.SAMPLES.glob("*.png"))) == 8
