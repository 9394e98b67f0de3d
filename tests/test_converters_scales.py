"""Scales that do not stand in tensors: diffusers' header, PEFT's configuration beside the file, and the user's word.

The files are written by diffusers and PEFT themselves, and what they load is what an update must be.
"""

import json
import math
import time

import pytest
import safetensors.torch
import torch

from i2l_ext.converters import Lora, UserError, consumers, files, inspect
from i2l_ext.converters.architectures import MINI
from i2l_ext.converters.scales import ADAPTER_METADATA, NamePatterns

DEPTH, HEADS, SIZE = 5, 4, 32
TARGETS = ["to_q", "to_k", "to_out.0", "img_mlp.net.2"]

CONFIGS = {
    "stronger": {"r": 4, "lora_alpha": 16},
    "weaker": {"r": 4, "lora_alpha": 3},
    "neutral": {"r": 4, "lora_alpha": 4},
    "negative": {"r": 4, "lora_alpha": -2},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "alphas by kind": {"r": 4, "lora_alpha": 8, "alpha_pattern": {"to_k": 2, "to_out.0": 5}},
    "ranks and alphas by name": {
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {"transformer_blocks.0.attn.to_q": 6, "to_q": 3},
        "alpha_pattern": {"^transformer_blocks.1.attn.to_k": 1, "to_k": 2, r".*\.[01]\.attn\.to_q": 7},
    },
    "expressions": {"r": 2, "lora_alpha": 8, "alpha_pattern": {r"transformer_blocks\.\d+\.attn\.to_(q|k)": 3}},
}


def model():
    """The miniature, in diffusers' own class."""
    from diffusers import QwenImageTransformer2DModel

    torch.manual_seed(0)
    return QwenImageTransformer2DModel(
        in_channels=64, out_channels=12, num_layers=DEPTH, attention_head_dim=SIZE, num_attention_heads=HEADS,
        joint_attention_dim=64, axes_dims_rope=(8, 12, 12),
    )  # fmt: skip


def randomize(adapted):
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return adapted


def updates(adapted, adapter="default"):
    """What PEFT adds to each weight, in float64, by module path."""
    return {
        name.removeprefix("base_model.model."): layer.get_delta_weight(adapter).double()
        for name, layer in adapted.named_modules()
        if hasattr(layer, "get_delta_weight")
    }


def same(lora, expected):
    assert lora.specs.keys() == expected.keys()
    for path, exact in expected.items():
        down, up = lora[path]
        assert (up.double() @ down.double() - exact).norm() <= 1e-6 * exact.norm()


def diffusers_file(folder, config):
    from diffusers.loaders.lora_pipeline import QwenImageLoraLoaderMixin
    from diffusers.training_utils import _collate_lora_metadata
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    adapted = model()
    adapted.add_adapter(LoraConfig(init_lora_weights="gaussian", target_modules=TARGETS, **config))
    randomize(adapted)
    QwenImageLoraLoaderMixin.save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(adapted),
        **_collate_lora_metadata({"transformer": adapted}),
    )
    return folder / "pytorch_lora_weights.safetensors", updates(adapted)


def peft_folder(folder, config):
    from peft import LoraConfig, get_peft_model

    adapted = randomize(get_peft_model(model(), LoraConfig(target_modules=TARGETS, **config)))
    adapted.save_pretrained(folder)
    return folder / "adapter_model.safetensors", updates(adapted)


OTHER_NETWORKS = {
    "LoKr": ("LoKrConfig", {"r": 2, "alpha": 6}),
    "LoKr of two whole matrices": ("LoKrConfig", {"r": 64, "alpha": 16}),
    "LoKr of two products": ("LoKrConfig", {"r": 2, "alpha": 3, "decompose_both": True}),
    "LoKr by pattern": (
        "LoKrConfig",
        {
            "r": 3, "alpha": 6, "decompose_factor": 4,
            "rank_pattern": {"to_q": 2, "img_mlp.net.2": 64}, "alpha_pattern": {r".*\.[01]\.attn\.to_(q|k)": 1},
        },
    ),
    "LoHa": ("LoHaConfig", {"r": 3, "alpha": 7, "rank_pattern": {"to_k": 2}, "alpha_pattern": {"to_q": -1}}),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHER_NETWORKS)
def test_the_scale_of_other_networks_is_as_in_peft(tmp_path, case):
    import peft

    name, config = OTHER_NETWORKS[case]
    adapted = peft.get_peft_model(model(), getattr(peft, name)(target_modules=TARGETS, init_weights=False, **config))
    adapted.eval().save_pretrained(tmp_path / "lora")
    expected = updates(adapted)
    same(Lora.read(tmp_path / "lora"), expected)
    found = inspect(tmp_path / "lora")
    assert found.scale_sources == {"adapter_config.json": len(expected)} and not found.scale_problems


@pytest.mark.parametrize("wrong", [{"r": 3}, {"peft_type": "LOHA"}, {"peft_type": "LORA", "lora_alpha": 2}])
def test_a_configuration_of_another_network_or_rank_is_not_believed(tmp_path, wrong):
    import peft

    adapted = peft.get_peft_model(model(), peft.LoKrConfig(target_modules=TARGETS, init_weights=False, r=2, alpha=6))
    adapted.save_pretrained(tmp_path / "lora")
    path = tmp_path / "lora" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | wrong))
    with pytest.raises(UserError, match="the scale is unknown; say it with --alpha"):
        Lora.read(tmp_path / "lora")
    assert "the scale is unknown" in inspect(tmp_path / "lora").problems[0]


def diffusers_updates(path):
    """What diffusers' own loader adds to the weights for a file."""
    from diffusers.loaders.lora_pipeline import QwenImageLoraLoaderMixin as Loader

    state, metadata = Loader.lora_state_dict(str(path), return_lora_metadata=True)
    fresh = model()
    Loader.load_lora_into_transformer(state, fresh, adapter_name="x", metadata=metadata)
    return updates(fresh, "x")


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("written", [diffusers_file, peft_folder])
def test_the_scale_is_read_where_peft_and_diffusers_write_it(tmp_path, written, config):
    if config.get("use_rslora") and config.get("rank_pattern"):
        pytest.skip("PEFT warns of both")
    path, expected = written(tmp_path / "lora", config)
    same(Lora.read(path), expected)
    same(Lora.read(path.parent), expected)  # the folder is the LoRA
    found = inspect(path)
    place = f"header ({ADAPTER_METADATA})" if written is diffusers_file else "adapter_config.json"
    assert found.scale_sources == {place: len(expected)} and not found.problems
    assert inspect(path.parent).scales == found.scales
    assert consumers.check(path.parent)[0].slots.keys() == expected.keys()


@pytest.mark.parametrize("to", ["webui", "kohya", "diffusers", "diffsynth"])
@pytest.mark.parametrize("config", ["ranks and alphas by name", "rslora"])
def test_what_is_written_loads_in_diffusers_at_the_same_strength(tmp_path, config, to):
    path, expected = diffusers_file(tmp_path / "lora", CONFIGS[config])
    Lora.read(path).save(tmp_path / "out.safetensors", to)
    loaded = diffusers_updates(tmp_path / "out.safetensors")
    assert loaded.keys() == expected.keys()
    for name, exact in expected.items():
        assert (loaded[name] - exact).norm() <= 1e-6 * exact.norm()


def test_a_header_of_another_rank_is_told_and_not_believed(tmp_path):
    """As a tool leaves it that resizes the factors and keeps the header."""
    path, _ = diffusers_file(tmp_path / "lora", {"r": 4, "lora_alpha": 16})
    header = files.TensorFile(path).header.metadata
    tensors = safetensors.torch.load_file(path)
    halved = {key: t[:2] if "lora_A" in key else t[:, :2].contiguous() for key, t in tensors.items()}
    safetensors.torch.save_file(halved, path, header)
    with pytest.raises(UserError, match=r"has rank 2, not 4 as its header .*--alpha"):
        Lora.read(path)
    assert any("has rank 2, not 4" in problem for problem in inspect(path).problems)
    assert consumers.check(path)[1]
    key = "transformer.transformer_blocks.0.attn.to_q.lora_"
    exact = halved[key + "B.weight"] @ halved[key + "A.weight"]
    assert torch.allclose(Lora.read(path, alpha=2).delta("transformer_blocks.0.attn.to_q"), exact)


def bare(path, metadata=None, alpha=None, modules=("proj_out",), prefix="transformer."):
    tensors = {}
    for module in modules:
        d_out, d_in = MINI.modules[module].shape
        tensors |= {f"{prefix}{module}.lora_A.weight": torch.randn(4, d_in)}
        tensors |= {f"{prefix}{module}.lora_B.weight": torch.randn(d_out, 4)}
        if alpha is not None:
            tensors[f"{prefix}{module}.alpha"] = torch.tensor(alpha)
    safetensors.torch.save_file(tensors, path, metadata)
    return path


def header(**raw):
    return {ADAPTER_METADATA: json.dumps({f"transformer.{key}": value for key, value in raw.items()})}


BROKEN = {
    "not JSON": {ADAPTER_METADATA: "{"},
    "a list": {ADAPTER_METADATA: "[]"},
    "nested": {ADAPTER_METADATA: "[" * 100_000},
    "text": header(r="4", lora_alpha=4),
    "a fraction": header(r=4.0, lora_alpha=4),
    "no rank": header(r=0, lora_alpha=4),
    "true": header(r=True, lora_alpha=4),
    "not finite": {ADAPTER_METADATA: '{"transformer.r": 4, "transformer.lora_alpha": NaN}'},
    "many digits": {ADAPTER_METADATA: '{"transformer.r": 4, "transformer.lora_alpha": ' + "9" * 5000 + "}"},
    "no table": header(r=4, lora_alpha=4, alpha_pattern=[1]),
    "text in a table": header(r=4, lora_alpha=4, alpha_pattern={"to_q": "2"}),
    "rslora as text": header(r=4, lora_alpha=4, use_rslora="no"),
    "slow": header(r=4, lora_alpha=4, alpha_pattern={"(a+)+b": 1}),
    "slower": header(r=4, lora_alpha=4, alpha_pattern={".*.*.*.*x": 1}),
    "not an expression": header(r=4, lora_alpha=4, alpha_pattern={"a(": 1}),
    "many expressions": header(r=4, lora_alpha=4, alpha_pattern={f"a+{n}": 1 for n in range(1000)}),
    "rank 0 by pattern": header(r=4, lora_alpha=4, rank_pattern={"proj_out": 0}),
    "alpha 0": header(r=4, lora_alpha=0),
}


@pytest.mark.parametrize("metadata", BROKEN.values(), ids=BROKEN)
def test_a_configuration_that_cannot_be_believed_ends_in_one_line(tmp_path, metadata):
    path = bare(tmp_path / "f", metadata)
    start = time.perf_counter()
    with pytest.raises(UserError) as told:
        Lora.read(path)
    assert "\n" not in str(told.value) and "f: " in str(told.value)
    assert inspect(path).problems and consumers.check(path)
    assert time.perf_counter() - start < 2
    assert Lora.read(path, alpha=8)  # the user knows better


def test_without_a_word_of_scales_a_configuration_says_nothing(tmp_path):
    for metadata in ({ADAPTER_METADATA: "{}"}, header(peft_type="LORA"), {ADAPTER_METADATA: '{"text_encoder.r": 4}'}):
        found = inspect(bare(tmp_path / "f", metadata))
        assert found.scales == {1.0: 1} and not found.problems


def test_tensors_count_before_the_header(tmp_path):
    path = bare(tmp_path / "f", header(r=4, lora_alpha=16), alpha=2.0)
    assert inspect(path).scales == {0.5: 1}


def test_the_user_says_the_alpha_of_a_file_that_does_not(tmp_path):
    path = bare(tmp_path / "f")
    assert torch.allclose(Lora.read(path, alpha=2).delta("proj_out"), Lora.read(path).delta("proj_out") / 2)
    for told in (bare(tmp_path / "g", alpha=2.0), bare(tmp_path / "h", header(r=4, lora_alpha=2))):
        with pytest.raises(UserError, match="says its scale itself"):
            Lora.read(told, alpha=2)


def test_the_configuration_beside_another_file_is_not_its_own(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 16}))
    assert inspect(bare(tmp_path / "other.safetensors")).scales == {1.0: 1}
    assert inspect(bare(tmp_path / "adapter_model.safetensors")).scales == {4.0: 1}


def test_folders_that_are_no_lora(tmp_path):
    with pytest.raises(UserError, match=r"no \.safetensors file"):
        Lora.read(tmp_path)
    bare(tmp_path / "a.safetensors")
    assert len(Lora.read(tmp_path)) == 1
    bare(tmp_path / "b.safetensors")
    with pytest.raises(UserError, match=r"2 \.safetensors files"):
        Lora.read(tmp_path)


@pytest.mark.parametrize(
    "pattern", ["to_q", "0.attn.to_q", "attn", "^transformer_blocks.0.attn.to_q", r"\d+.attn.to_(q|k)", "o_q"]
)
def test_patterns_match_as_peft_matches_them(pattern):  # fmt: skip
    from peft.utils.other import get_pattern_key

    for name in ("transformer_blocks.0.attn.to_q", "to_q", "x.to_q.y", "transformer_blocks.10.attn.to_k"):
        table = {"first": 1, pattern: 2, "to_q": 3}
        expected = table.get(get_pattern_key(table.keys(), name), 0)
        assert NamePatterns(table, "alpha_pattern").values(name, 0)[0] == expected


def test_a_pattern_for_every_module_costs_no_time():
    table = {path: number for number, path in enumerate(MINI.modules)} | {f"a.{n}": 0 for n in range(20_000)}
    start = time.perf_counter()
    patterns = NamePatterns(table, "alpha_pattern")
    assert [patterns.values(path, math.nan)[0] for path in MINI.modules] == [*range(len(MINI.modules))]
    assert time.perf_counter() - start < 1
