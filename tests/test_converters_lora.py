"""The Lora value: laziness, scaling, joining, selection, metadata."""

import subprocess
import sys

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from i2l_ext.converters import Lora, UserError, concatenate, files, select
from i2l_ext.converters.architectures import MINI, QWEN_IMAGE, Z_IMAGE
from i2l_ext.converters.lora import FactorSpec, multiplies_exactly
from i2l_ext.converters.metadata import updated_metadata
from i2l_ext.converters.select import KINDS

MODULES = list(MINI.i2l_modules)


def mini(rank=2, dtype=torch.float32, seed=0, modules=MODULES, metadata=None):
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for path in modules:
        d_out, d_in = MINI.modules[path].shape
        factors[path] = (
            torch.randn(rank, d_in, generator=generator).to(dtype),
            torch.randn(d_out, rank, generator=generator).to(dtype),
        )
    return Lora.of(MINI, factors, metadata)


def test_importing_the_converters_imports_neither_torch_nor_numpy():
    code = "import sys, i2l_ext.converters; sys.exit(bool({'torch', 'numpy', 'safetensors'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_of_refuses_what_the_architecture_lacks():
    with pytest.raises(UserError, match="has no module nonsense"):
        Lora.of(MINI, {"nonsense": (torch.ones(1, 2), torch.ones(2, 1))})
    with pytest.raises(UserError, match=r"proj_out: factors \[1, 2\] and \[2, 1\] do not fit"):
        Lora.of(MINI, {"proj_out": (torch.ones(1, 2), torch.ones(2, 1))})


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 4), st.floats(-2, 2)), min_size=1, max_size=4))
def test_the_update_of_joined_parts_is_their_weighted_sum(parts):
    loras = [mini(rank, seed=seed) for seed, (rank, _) in enumerate(parts)]
    joined = concatenate(loras, [weight for _, weight in parts])
    path = MODULES[0]
    expected = sum(weight * lora.delta(path).double() for lora, (_, weight) in zip(loras, parts, strict=True))
    assert joined.specs[path].rank == sum(rank for rank, _ in parts)
    assert torch.allclose(joined.delta(path).double(), expected, atol=1e-4)


def test_strength_half_halves_the_update():
    assert torch.equal(mini().scaled(0.5).delta(MODULES[0]), 0.5 * mini().delta(MODULES[0]))


def test_parts_of_two_models_are_not_joined():
    other = Lora(QWEN_IMAGE, {}, dict.__getitem__)
    with pytest.raises(UserError, match=r"Qwen-Image cannot be merged"):
        concatenate([mini(), other], [1, 1])


def test_factors_are_made_one_module_at_a_time(tmp_path):
    """No factor is made before it is written, and none is kept: this is what keeps memory small."""
    alive, most, made = set(), 0, 0

    class Watched(torch.Tensor):
        pass

    def load(path):
        nonlocal most, made
        import weakref

        down, up = (factor.clone() for factor in source[path])
        alive.add(path)
        weakref.finalize(up, alive.discard, path)
        most, made = max(most, len(alive)), made + 1
        return down, up

    source = mini()
    Lora(MINI, source.specs, load).save(tmp_path / "f")
    assert made == len(MODULES)
    assert most <= 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_bytes_are_copied_where_nothing_changes(tmp_path, dtype):
    mini(3, dtype).save(tmp_path / "a", "kohya")
    lora = Lora.read(tmp_path / "a")
    for path in MODULES:
        for factor in (0, 1):
            raw = b"".join(bytes(piece) for piece in lora.source.raw(path, factor))
            assert raw == bytes(files.tensor_bytes(lora[path][factor].contiguous()))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("factor", [0, 1])
@pytest.mark.parametrize("copied", [True, False])
def test_what_is_not_finite_is_never_written(tmp_path, poison, factor, copied):
    lora = mini()
    lora[MODULES[3]][factor][0, 0] = poison
    if copied:
        tensors = {}
        for path in MODULES:
            tensors |= {f"{path}.lora_A.weight": lora[path][0], f"{path}.lora_B.weight": lora[path][1]}
        safetensors.torch.save_file(tensors, tmp_path / "in.safetensors")
        lora = Lora.read(tmp_path / "in.safetensors")
        assert lora.source.raw(MODULES[3], factor)
    with pytest.raises(UserError, match=MODULES[3] + r".*NaN or infinity"):
        lora.save(tmp_path / "out.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == (["in.safetensors"] if copied else [])


@pytest.mark.parametrize("alpha", [0.0, float("nan"), float("inf")])
def test_an_alpha_that_harms_is_refused(tmp_path, alpha):
    down, up = mini()["proj_out" if "proj_out" in MODULES else MODULES[0]]
    stem = f"lora_unet_{MODULES[0].replace('.', '_')}"
    tensors = {stem + ".lora_down.weight": down, stem + ".lora_up.weight": up, stem + ".alpha": torch.tensor(alpha)}
    safetensors.torch.save_file(tensors, tmp_path / "f")
    with pytest.raises(UserError, match=r"alpha is .*do nothing or harm"):
        Lora.read(tmp_path / "f")


def test_a_negative_alpha_inverts_the_update(tmp_path):
    down, up = mini()[MODULES[0]]
    stem = f"lora_unet_{MODULES[0].replace('.', '_')}"
    tensors = {stem + ".lora_down.weight": down, stem + ".lora_up.weight": up, stem + ".alpha": torch.tensor(-1.0)}
    safetensors.torch.save_file(tensors, tmp_path / "f")
    assert torch.equal(Lora.read(tmp_path / "f").delta(MODULES[0]), -0.5 * (up @ down))


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F64"])
@given(power=st.integers(-20, 20), number=st.floats(-1e9, 1e9).filter(lambda x: x == 0 or abs(x) > 1e-9))
def test_a_power_of_two_keeps_every_digit(dtype, power, number):
    tensor = torch.tensor(number, dtype=torch.float64).to(files.torch_dtype(dtype))
    assert multiplies_exactly(2.0**power, dtype)
    assert (tensor * 2.0**power).double() == tensor.double() * 2.0**power


def test_multiplies_exactly_knows_its_limits():
    assert not multiplies_exactly(0.3, "F32") and not multiplies_exactly(0.5, "F16") and multiplies_exactly(1, "F16")


def test_what_a_cast_loses_is_told_by_save_and_refused_above_a_bound(tmp_path):
    assert mini().cast("F16").save(tmp_path / "usual") is None
    narrow = mini().scaled(1e-6).cast("F16")
    with pytest.raises(UserError, match=r"^f: fp16 .*% of its update is lost.*nothing was written"):
        narrow.save(tmp_path / "f")
    with pytest.raises(UserError, match="nothing was written"):  # also where something was done with it since
        select(narrow, kinds="attn:2").save(tmp_path / "f")
    assert [path.name for path in tmp_path.iterdir()] == ["usual"]
    told = narrow.save(tmp_path / "f", lossy=True)
    assert (
        f"{narrow.losses.lost():.1%} of its update is lost" in told and Lora.read(tmp_path / "f").specs == narrow.specs
    )
    assert mini().scaled(1e-6).cast("BF16").save(tmp_path / "wide") is None


@pytest.mark.parametrize("made", [lambda lora: lora.scaled(1e-6), lambda lora: concatenate([lora, lora], [0.5, 1e-6])])
def test_a_weight_loses_no_digit_of_fp16_factors(made):
    lora = mini().cast("F16")
    whole = made(Lora.of(lora.arch, {path: tuple(factor.float() for factor in lora[path]) for path in lora}))
    for path in MODULES[:4]:
        assert (made(lora).delta(path) - whole.delta(path)).norm() <= 1e-6 * whole.delta(path).norm()


# selection

BLOCKS = {
    "0": {0: 1.0},
    "0-1:0.5": {0: 0.5, 1: 0.5, 2: 1.0, 3: 1.0, 4: 1.0},
    "0,2:0.25": {0: 1.0, 2: 0.25},
    "rest:0.5,1:2": {0: 0.5, 1: 2.0, 2: 0.5, 3: 0.5, 4: 0.5},
    "early:0": {1: 1.0, 2: 1.0, 3: 1.0, 4: 1.0},  # a third of five blocks, rounded down
    "0-2:0.5,1:0": {0: 0.5, 2: 0.5, 3: 1.0, 4: 1.0},
}


@pytest.mark.parametrize("text", BLOCKS)
def test_blocks_are_kept_scaled_or_dropped(text):
    assert MINI.stacks[0].depth == 5
    lora, chosen = mini(), select(mini(), text)
    for path in MODULES:
        weight = BLOCKS[text].get(MINI.modules[path].block)
        assert (path in chosen.specs) == (weight is not None)
        if weight:
            assert torch.equal(chosen.delta(path), weight * lora.delta(path))


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("attn", r"attn"),
        ("txt:0", r"attn\.to_[qkvo](?!dd)|img"),
        ("img", r"attn\.to_(?!add)|img"),
        ("attn.to_q,attn.to_k", r"attn\.to_[qk]"),
        ("*_mod.1", r"(img|txt)_mod"),
    ],
)
def test_kinds_are_kept_or_dropped(text, kept):
    import re

    chosen = select(mini(), kinds=text)
    assert set(chosen.specs) == {path for path in MODULES if re.match(kept, MINI.modules[path].kind.name)}


def test_image_and_text_streams_share_nothing_and_leave_nothing():
    whole = Lora(QWEN_IMAGE, dict.fromkeys(QWEN_IMAGE.i2l_modules, FactorSpec(4, "BF16")), dict.__getitem__)
    image, text = (set(select(whole, kinds=kind).specs) for kind in ("img", "txt"))
    assert not image & text
    assert image | text == set(QWEN_IMAGE.i2l_modules)
    groups = [set(select(whole, kinds=kind).specs) for kind in ("attn", "mlp", "mod")]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 720


def test_other_stacks_by_their_name():
    whole = Lora(Z_IMAGE, dict.fromkeys(Z_IMAGE.i2l_modules, FactorSpec(4, "BF16")), dict.__getitem__)
    assert len(select(whole, "noise_refiner").specs) == 14
    assert len(select(whole, "context_refiner.1").specs) == 7
    assert len(select(whole, "context_refiner:0").specs) == 238 - 14
    assert len(select(whole, "0-29").specs) == 210


def test_weights_that_cost_digits_widen():
    specs = select(mini(dtype=torch.bfloat16), "0:0.5,1:0.3").specs
    dtypes = {MINI.modules[path].block: spec.dtype for path, spec in specs.items()}
    assert dtypes == {0: "BF16", 1: "F32", 2: "BF16", 3: "BF16", 4: "BF16"}


@pytest.mark.parametrize(
    ("blocks", "kinds", "reason"),
    [
        ("99", None, "not within the blocks of .*0-4, early"),
        ("nonsense", None, "not a block"),
        ("2-1", None, "not within"),
        ("0:much", None, "not a weight"),
        ("0:nan", None, "not a weight"),
        ("", None, "names nothing"),
        (None, "nonsense", r"not a kind of layer of .*attn, mlp"),
        ("0", "attn:0,mlp:0,mod:0", "Nothing of the LoRA is left"),
    ],
)
def test_wrong_selections(blocks, kinds, reason):
    with pytest.raises(UserError, match=reason):
        select(mini(), blocks, kinds)


def test_each_preset_names_something():
    for arch in (QWEN_IMAGE, Z_IMAGE, MINI):
        whole = Lora(arch, dict.fromkeys(arch.modules, FactorSpec(4, "BF16")), dict.__getitem__)
        for preset in KINDS:
            if arch is Z_IMAGE and preset in ("img", "txt"):
                with pytest.raises(UserError):
                    select(whole, kinds=preset)
            else:
                assert select(whole, kinds=preset).specs


# metadata

OLD = {
    "ss_output_name": "old",
    "ss_network_dim": "32",
    "ss_network_alpha": "1",
    "modelspec.title": "old",
    "sshs_model_hash": "123",
    "i2l.model": "qwen-image-style",
    "anything": "else",
}


def test_metadata_are_kept_but_for_what_would_be_wrong():
    new = updated_metadata(mini(3, metadata=OLD), "webui", "new")
    assert new == {
        "ss_output_name": "new",
        "ss_network_dim": "3",
        "ss_network_alpha": "3",
        "modelspec.title": "new",
        "i2l.model": "qwen-image-style",
        "anything": "else",
    }


def test_kohya_metadata_say_dim_and_alpha():
    assert updated_metadata(mini(3), "webui", "new") == {}
    assert updated_metadata(mini(3), "kohya", "new") == {
        "ss_network_dim": "3",
        "ss_network_alpha": "3",
        "ss_network_module": "networks.lora_qwen_image",
    }


def test_what_is_saved_from_python_tells_no_old_rank_or_hash(tmp_path):
    old = OLD | {"lora_adapter_metadata": '{"transformer.r": 32}', "modelspec.hash_sha256": "0x1"}
    for metadata in (None, old):
        mini(3, metadata=old).save(tmp_path / "f", metadata=metadata, overwrite=True)
        told = Lora.read(tmp_path / "f").metadata
        assert told == {
            key: "3" if key.startswith("ss_network") else value for key, value in OLD.items() if "hash" not in key
        }


def test_ranks_that_differ_are_called_dynamic():
    first, second = MODULES[:2]
    uneven = Lora.of(MINI, {first: mini(1)[first], second: mini(2)[second]}, {"ss_network_dim": "1"})
    assert updated_metadata(uneven, "webui")["ss_network_dim"] == "Dynamic"
