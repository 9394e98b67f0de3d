"""Other networks than plain LoRA: what they are, and the LoRA that each becomes, against PEFT and LyCORIS."""

import json
import subprocess
import sys
from importlib import util
from pathlib import Path

import peft
import pytest
import safetensors.torch
import torch
from torch import nn

from i2l_ext.converters import Lora, UserError, networks, rank
from i2l_ext.converters.architectures import MINI, Z_IMAGE
from i2l_ext.converters.inspection import inspect
from test_converters_commands import factors, i2l

PATH = "transformer_blocks.0.img_mlp.net.0.proj"
D_OUT, D_IN = MINI.modules[PATH].shape
STORED = Path(__file__).parent / "networks"


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def write(path, parts, module=PATH, prefix="transformer.", more=None):
    """A file with one module's parts by suffix, such as lokr_w1."""
    tensors = {f"{prefix}{module}.{part}": tensor.contiguous() for part, tensor in parts.items()}
    safetensors.torch.save_file(tensors | (more or {}), path)
    return path


def close(ours, theirs, bound=1e-5):
    return float((ours - theirs).norm() / theirs.norm()) < bound


def optimum(difference, k):
    """The error of the nearest matrix of rank k."""
    return float(torch.linalg.svdvals(difference.double())[k:].norm())


LOKR = {
    "both whole": {"lokr_w1": (16, 8), "lokr_w2": (32, 16), "alpha": 7.0},
    "w2 in factors": {"lokr_w1": (16, 8), "lokr_w2_a": (32, 3), "lokr_w2_b": (3, 16), "alpha": 6.0},
    "both in factors": {
        "lokr_w1_a": (16, 2), "lokr_w1_b": (2, 8), "lokr_w2_a": (32, 2), "lokr_w2_b": (2, 16), "alpha": 1.0,
    },
    "w1 in factors": {"lokr_w1_a": (16, 2), "lokr_w1_b": (2, 8), "lokr_w2": (32, 16), "alpha": 3.0},
    "no alpha": {"lokr_w1": (16, 8), "lokr_w2_a": (32, 3), "lokr_w2_b": (3, 16)},
    "a third factor": {"lokr_w1": (16, 8), "lokr_w2_a": (3, 32), "lokr_w2_b": (3, 16), "lokr_t2": (3, 3)},
    "as a convolution of one point": {"lokr_w1": (16, 8), "lokr_w2": (32, 16, 1, 1)},
}  # fmt: skip
LOHA = {
    "loha": {"hada_w1_a": (512, 3), "hada_w1_b": (3, 128), "hada_w2_a": (512, 3), "hada_w2_b": (3, 128), "alpha": 1.5},
    "loha of a high rank": {"hada_w1_a": (512, 9), "hada_w1_b": (9, 128), "hada_w2_a": (512, 9), "hada_w2_b": (9, 128)},
    "a third factor": {
        **{f"hada_w{n}_{x}": (3, size) for n in (1, 2) for x, size in (("a", 512), ("b", 128))},
        "hada_t1": (3, 3), "hada_t2": (3, 3),
    },
}  # fmt: skip
PRODUCTS = {
    f"{kind} {name}": shapes for kind, table in (("LoKr", LOKR), ("LoHa", LOHA)) for name, shapes in table.items()
}


def made(shapes):
    return {
        part: torch.tensor(shape) if isinstance(shape, float) else random(*shape, seed=seed)
        for seed, (part, shape) in enumerate(shapes.items())
    }


def expected(parts):
    """The difference, written out from the published definitions; float64."""
    given = {part: tensor.double().flatten(1) if tensor.dim() > 1 else tensor for part, tensor in parts.items()}

    def half(name):
        if name in given:
            return given[name]
        a, b, t = given[f"{name}_a"], given[f"{name}_b"], given.get(name.replace("_w", "_t"))
        return a @ b if t is None else torch.einsum("ij,ip,jr->pr", t, a, b)

    lokr = any(part.startswith("lokr") for part in given)
    first, second = (half(f"{'lokr' if lokr else 'hada'}_w{n}") for n in (1, 2))
    rank = next((given[part].shape[1] for part in ("lokr_w1_a", "lokr_w2_a", "hada_w1_a") if part in given), None)
    scale = float(given["alpha"]) / rank if rank and "alpha" in given else 1.0
    return scale * (torch.kron(first, second) if lokr else first * second)


@pytest.mark.parametrize("case", PRODUCTS)
def test_products_are_exact_at_their_rank_and_optimal_below(tmp_path, case):
    parts = made(PRODUCTS[case])
    lora = Lora.read(write(tmp_path / "f", parts))
    want = expected(parts)
    down, up = lora[PATH]
    assert down.shape == (lora.specs[PATH].rank, D_IN) and up.shape == (D_OUT, lora.specs[PATH].rank)
    assert close(lora.delta(PATH), want)
    for k in (1, 2, 5):
        resized = rank.resize(lora, k)
        error = float((resized.delta(PATH) - want).norm())
        assert error <= optimum(want, k) * 1.0001 + 1e-5 * float(want.norm())
        kept = rank.resizer_of(resized).effect_kept()["all"]
        assert kept == pytest.approx(1 - (optimum(want, k) / float(want.norm())) ** 2, abs=1e-4)
    exact = rank.resize(lora, 2, exact=True).delta(PATH)
    assert close(exact, rank.resize(lora, 2).delta(PATH), 1e-4)
    values = rank.singular_values(lora)[PATH]
    assert torch.allclose(values[:4], torch.linalg.svdvals(want)[:4], rtol=1e-4)


class Small(nn.Module):
    def __init__(self, d_in=D_IN, d_out=D_OUT):
        super().__init__()
        self.layer = nn.Linear(d_in, d_out, bias=False)


PEFT = {
    "LoKr": lambda: peft.LoKrConfig(r=4, alpha=6, target_modules=["layer"], init_weights=False),
    "LoKr of two products": lambda: peft.LoKrConfig(
        r=4, alpha=2, target_modules=["layer"], init_weights=False, decompose_both=True
    ),
    "LoKr by factor": lambda: peft.LoKrConfig(
        r=2, alpha=2, target_modules=["layer"], init_weights=False, decompose_factor=4
    ),
    "LoKr whole": lambda: peft.LoKrConfig(r=64, alpha=64, target_modules=["layer"], init_weights=False),
    "LoHa": lambda: peft.LoHaConfig(r=4, alpha=6, target_modules=["layer"], init_weights=False),
    "DoRA": lambda: peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["layer"], init_lora_weights=False, use_dora=True
    ),
}


@pytest.mark.parametrize("case", PEFT)
def test_as_peft_computes_it(tmp_path, case):
    torch.manual_seed(0)
    small = Small()
    weight = small.layer.weight.detach().clone()
    config = PEFT[case]()
    model = peft.get_peft_model(small, config)
    layer = model.base_model.model.layer
    if case == "DoRA":
        with torch.no_grad():
            layer.lora_magnitude_vector["default"].weight.mul_(1 + 0.2 * torch.rand(D_OUT))
    state = peft.get_peft_model_state_dict(model)
    parts = {key.split("layer.", 1)[1]: tensor.detach() for key, tensor in state.items()}
    parts["alpha"] = torch.tensor(float(getattr(config, "alpha", None) or config.lora_alpha))
    path, base = write(tmp_path / "f", parts, prefix="base_model.model."), tmp_path / "base.safetensors"
    safetensors.torch.save_file({f"model.diffusion_model.{PATH}.weight": weight}, base)
    assert inspect(path).kinds_of_network == {case.split()[0]: 1}
    lora = Lora.read(path, base)
    merged = model.merge_and_unload().layer.weight.detach() - weight
    assert close(lora.delta(PATH), merged)


@pytest.mark.skipif(not util.find_spec("lycoris"), reason="lycoris-lora is not installed")
@pytest.mark.parametrize("dora", [False, True, "columns"])
@pytest.mark.parametrize("kind", ["lokr", "lokr full", "lokr both", "loha", "locon", "full"])
def test_as_lycoris_computes_it(tmp_path, kind, dora):
    """The change of a layer's output. `get_diff_weight` of version 4.1 multiplies by the scale twice."""
    from lycoris import modules

    if kind == "full" and dora:
        pytest.skip("there is none")
    torch.manual_seed(0)
    small = Small()
    options = {"lokr": {"factor": 8}, "lokr full": {"full_matrix": True}, "lokr both": {"decompose_both": True}}
    classes = {"loha": modules.LohaModule, "locon": modules.LoConModule, "full": modules.FullModule}
    network = classes.get(kind, modules.LokrModule)(
        "x", small.layer, 1.0, lora_dim=2, alpha=3.0, weight_decompose=bool(dora), wd_on_out=dora != "columns",
        **options.get(kind, {}),
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name == "dora_scale":
                parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
            elif "org" not in name:
                parameter.normal_()
        weight = small.layer.weight.detach().clone()
        parts = {key: tensor.detach().clone() for key, tensor in network.state_dict().items() if "org" not in key}
        if kind == "full":
            want = parts["diff"]
        else:
            inputs = torch.eye(D_IN)
            want = (network(inputs) - small.layer(inputs)).T
    base = tmp_path / "base.safetensors"
    safetensors.torch.save_file({f"{PATH}.weight": weight}, base)
    lora = Lora.read(write(tmp_path / "f", parts, PATH.replace(".", "_"), "lycoris_"), base)
    assert close(lora.delta(PATH), want)
    assert lora.read_from.reading.key_format == "lycoris"


def test_a_file_that_lycoris_wrote():
    """Stored: a LoKr in factors, a whole one, and a LoHa, with what each layer added to an input of ones."""
    path = STORED / "lycoris.safetensors"
    found = inspect(path)
    assert (found.reading.key_format, found.maker, found.kinds_of_network) == (
        "lycoris",
        "LyCORIS",
        {"LoKr": 2, "LoHa": 1},
    )
    assert found.scales == {1.5: 2, 1.0: 1} and found.finite
    lora = Lora.read(path)
    for module, rows in json.loads(lora.metadata["sums of rows"]).items():
        assert close(lora.delta(module).sum(1), torch.tensor(rows))


def dora(columns=False, module=PATH, d_out=D_OUT, d_in=D_IN):
    down, up = random(3, d_in), random(d_out, 3)
    magnitude = 1 + random(1, d_in).abs() if columns else 1 + random(d_out, 1).abs()
    return {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(6.0), "dora_scale": magnitude}


def dora_difference(parts, weight):
    changed = weight.double() + 2 * parts["lora_up.weight"].double() @ parts["lora_down.weight"].double()
    columns = parts["dora_scale"].shape[0] == 1
    return parts["dora_scale"] * changed / changed.norm(dim=0 if columns else 1, keepdim=True) - weight


@pytest.mark.parametrize("columns", [False, True])
def test_dora_becomes_the_nearest_lora(tmp_path, capsys, columns):
    """The base lies in a folder of diffusers in two files."""
    parts, weight = dora(columns), random(D_OUT, D_IN)
    path, base = write(tmp_path / "d.safetensors", parts), tmp_path / "base" / "transformer"
    base.mkdir(parents=True)
    other = "transformer_blocks.0.attn.to_q.weight"
    for name, key, tensor in (("1", other, random(128, 128)), ("2", f"{PATH}.weight", weight)):
        safetensors.torch.save_file({key: tensor.bfloat16()}, base / f"{name}.safetensors")
    want = dora_difference(parts, weight.bfloat16().float())
    assert i2l("convert", path, "--rank", "6", "--base", tmp_path / "base", "-o", tmp_path / "out", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    error = float((Lora.read(tmp_path / "out").delta(PATH) - want).norm())
    assert error == pytest.approx(optimum(want, 6), rel=1e-4)
    assert told["rank"] == 6 and told["kept"]["all"] == pytest.approx(1 - (error / float(want.norm())) ** 2, abs=1e-4)
    assert not inspect(tmp_path / "out").reading.networks


def test_dora_that_changes_little_keeps_its_digits():
    weight = random(64, 48).bfloat16().float()
    update = 1e-4 * random(64, 48, seed=1)
    changed = weight.double() + update.double()
    magnitude = (changed.norm(dim=1, keepdim=True) * (1 + 1e-4 * random(64, 1).double())).float()
    want = magnitude.double() * changed / changed.norm(dim=1, keepdim=True) - weight.double()
    assert close(networks.decomposed_difference(weight, update, magnitude), want, 1e-4)


def test_a_full_difference_and_biases(tmp_path, capsys):
    path = write(tmp_path / "f", {"diff": random(D_OUT, D_IN), "diff_b": random(D_OUT)})
    assert i2l("inspect", path) == 0
    told = capsys.readouterr().out
    assert "full difference" in told and "1 bias differences: a LoRA has none" in told
    assert i2l("convert", path, "--rank", "4", "-o", tmp_path / "out") == 0
    assert "1 bias difference keys are not carried over" in capsys.readouterr().err
    out = Lora.read(tmp_path / "out")
    want = random(D_OUT, D_IN)
    assert float((out.delta(PATH) - want).norm()) == pytest.approx(optimum(want, 4), rel=1e-4)


def test_large_matrices_come_near_the_optimum():
    """By Krylov iteration, where a decomposition of the whole would take long. A flat spectrum is the hardest."""
    for matrix in (random(700, 500), random(700, 3) @ random(3, 500) + 1e-3 * random(700, 500)):
        svd = networks.svd_of_matrix(matrix, 8)
        error = float((svd.u * svd.s[:8] @ svd.vh - matrix).norm())
        assert error <= optimum(matrix, 8) * 1.0001
        assert svd.s.shape == (9,) and float(svd.s[8]) == pytest.approx(error, abs=1e-3 * float(matrix.norm()))


QKV = ("layers.3.attention.qkv", [f"layers.3.attention.to_{x}" for x in "qkv"])


@pytest.mark.parametrize("with_base", [False, True])
def test_fused_layers_are_split(tmp_path, with_base):
    """Z-Image's first implementation has q, k and v as one layer, in the network and in the base."""
    name, paths = QKV
    parts = {"lokr_w1": random(4, 4), "lokr_w2_a": random(2880, 1), "lokr_w2_b": random(1, 960)}
    want, base = expected(parts), tmp_path / "base"
    if with_base:
        parts |= {"dora_scale": 1 + random(11520, 1).abs()}
        weight = random(11520, 3840)
        safetensors.torch.save_file({f"model.diffusion_model.{name}.weight": weight}, base)
        changed = want + weight
        want = parts["dora_scale"] * changed / changed.norm(dim=1, keepdim=True) - weight
    path = write(tmp_path / "f", parts, name, "diffusion_model.")
    lora = Lora.read(path, base if with_base else None)
    assert lora.arch is Z_IMAGE and list(lora) == paths
    resized = rank.resize(lora, 4)
    for path, rows in zip(paths, want.split(3840), strict=True):
        if with_base:
            difference = lora.read_from.svd(path, 2, exact=False)
            assert float(difference.s.square().sum()) == pytest.approx(float(rows.square().sum()), rel=1e-4)
        else:
            assert close(lora.delta(path), rows)
            assert close(resized.delta(path), rows)


def test_several_networks_in_one_file(tmp_path, capsys):
    """A plain LoRA of a lower rank stays as it is."""
    first, second = "transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.to_q"
    down, up = factors(first)
    more = {f"transformer.{first}.lora_A.weight": down, f"transformer.{first}.lora_B.weight": up}
    path = write(tmp_path / "f", {"lokr_w1": random(8, 8), "lokr_w2": random(16, 16)}, second, more=more)
    assert i2l("inspect", path, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["networks"], told["modules"], told["ranks"]) == ({"LoRA": 1, "LoKr": 1}, 2, {"2": 1, "128": 1})
    assert told["key_format"] == "diffusers"
    assert i2l("convert", path, "--rank", "4", "-o", tmp_path / "out") == 0
    out = Lora.read(tmp_path / "out")
    assert {path: spec.rank for path, spec in out.specs.items()} == {first: 2, second: 4}
    assert close(out.delta(first), up @ down)


@pytest.mark.parametrize("names", [("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")])
def test_a_dora_is_in_one_key_format(tmp_path, names):
    parts = dora()
    down, up = (parts.pop(f"lora_{part}.weight") for part in ("down", "up"))
    found = inspect(write(tmp_path / "f", parts | dict(zip(names, (down, up), strict=True)), prefix="diffusion_model."))
    assert len(found.reading.key_formats) == 1 and not [line for line in found.problems if "key formats" in line]


NETWORKS = {
    "LoKr": lambda: made(LOKR["w2 in factors"]),
    "whole LoKr": lambda: made(LOKR["both whole"]),
    "LoHa": lambda: made(LOHA["loha"]),
    "full difference": lambda: {"diff": random(D_OUT, D_IN)},
    "DoRA": dora,
    "half a LoRA": lambda: {"lora_A.weight": random(2, D_IN)},
    "LoRA of alpha 0": lambda: {
        "lora_A.weight": random(2, D_IN), "lora_B.weight": random(D_OUT, 2), "alpha": torch.tensor(0.0),
    },
}  # fmt: skip


@pytest.mark.parametrize("network", NETWORKS)
def test_what_cannot_be_drawn_is_described_all_the_same(tmp_path, capsys, network):
    more = {"transformer.proj_out.lora_A.weight": random(1, 128), "transformer.proj_out.lora_B.weight": random(48, 1)}
    path, picture = write(tmp_path / "f.safetensors", NETWORKS[network](), more=more), tmp_path / "f.png"
    assert i2l("inspect", path, "--plot", picture, "--json") == 0
    told, drawn = json.loads(capsys.readouterr().out), network in list(NETWORKS)[:4]
    assert told["modules"] >= 1
    assert [picture.exists(), "plot" in told, "unplotted" in told] == [drawn, drawn, not drawn]
    if network == "DoRA":
        base = tmp_path / "base.safetensors"
        safetensors.torch.save_file({f"{PATH}.weight": random(D_OUT, D_IN, seed=9)}, base)
        assert i2l("inspect", path, "--plot", picture, "--base", base) == 0 and picture.exists()
        assert i2l("inspect", path, "--plot", tmp_path / "g.png") == 0 and not (tmp_path / "g.png").exists()
        assert "not drawn: f.safetensors: " in capsys.readouterr().out


GOOD = {"lokr_w1": random(16, 8), "lokr_w2_a": random(32, 1), "lokr_w2_b": random(1, 16)}
WHOLE = {"lokr_w1": random(16, 8), "lokr_w2": random(32, 16)}
WRONG = {
    "too large": (WHOLE, (), f"{PATH} is LoKr of rank 128.*--rank K"),
    "no base": (dora(), ("--rank", "2"), "is DoRA, whose change depends.*--base CHECKPOINT and --rank K"),
    "no base of a LoKr": (GOOD | {"dora_scale": random(512, 1)}, ("--rank", "2"), "LoKr with DoRA"),
    "no file": (dora(), ("--rank", "2", "--base", "nowhere"), "nowhere: there is no such file"),
    "not this model's": (dora(), ("--rank", "2", "--base", "other"), "holds no weight of"),
    "of another width": (dora(), ("--rank", "2", "--base", "wide"), r"\[512, 129\], not \[512, 128\]"),
    "quantized": (dora(), ("--rank", "2", "--base", "fp8"), "F8_E4M3. Give the base model in bf16"),
    "NaN in the base": (dora(), ("--rank", "2", "--base", "nan"), "nan: the weight of .* holds NaN"),
    "NaN": (WHOLE | {"lokr_w1": torch.full((16, 8), torch.nan)}, ("--rank", "2"), "NaN or infinity"),
    "half": ({"lokr_w1": random(16, 8), "lokr_w2_a": random(32, 1)}, ("--rank", "2"), "only one of its two factors"),
    "of another layer": (GOOD | {"lokr_w1": random(16, 4)}, (), "it maps 64 to 512"),
    "ranks that differ": (GOOD | {"lokr_w2_b": random(2, 16)}, (), "have ranks 1 and 2"),
    "a convolution": (WHOLE | {"lokr_w2": random(32, 16, 3, 3)}, (), "not a matrix"),
    "a convolution's third factor": (GOOD | {"lokr_t2": random(1, 1, 3, 3)}, (), r"lokr_t2 is \[1, 1, 3, 3\]"),
    "nothing in it": (WHOLE | {"lokr_w1": random(0, 8)}, (), "not a matrix"),
    "halves that differ": (
        {"hada_w1_a": random(512, 1), "hada_w1_b": random(1, 128), "hada_w2_a": random(512, 1),
         "hada_w2_b": random(1, 127)}, (), "its halves are",
    ),
    "alpha 0": (GOOD | {"alpha": torch.tensor(0.0)}, (), "alpha is 0"),
    "a magnitude of another length": (dora() | {"dora_scale": random(5, 1)}, (), r"its magnitude is \[5, 1\]"),
    "integers": ({key: tensor.int() for key, tensor in GOOD.items()}, (), "dtype I32"),
}  # fmt: skip
BASES = {
    "other": {"x.weight": random(2, 2)},
    "wide": {f"{PATH}.weight": random(512, 129)},
    "fp8": {f"{PATH}.weight": random(512, 128).to(torch.float8_e4m3fn)},
    "nan": {f"{PATH}.weight": torch.full((512, 128), torch.nan)},
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_gets_one_line_and_nothing_is_written(tmp_path, monkeypatch, capsys, case):
    parts, options, reason = WRONG[case]
    for name, tensors in BASES.items():
        safetensors.torch.save_file(tensors, tmp_path / name)
    path = write(tmp_path / "f.safetensors", parts)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=reason) as caught:
        i2l("convert", path, *options, "-o", tmp_path / "out.safetensors")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out.safetensors").exists()
    assert {file.name for file in tmp_path.iterdir()} == {"f.safetensors", *BASES}


def test_an_alpha_of_several_numbers_does_not_fit():
    network = networks.Network("LoKr", {"lokr_w1": "a", "lokr_w2": "b", "alpha": "c"})
    shapes = {"a": (16, 8), "b": (32, 16), "c": ()}
    assert networks.misfit(network, shapes, 512, 128) is None
    assert networks.misfit(network, shapes | {"c": (2,)}, 512, 128) == "its alpha is not a number"


def test_a_whole_lokr_is_refused_where_no_rank_is_said(tmp_path):
    path = write(tmp_path / "f.safetensors", WHOLE)
    for command in (("merge", path), ("export", path, "--for", "diffusers")):
        with pytest.raises(UserError, match="i2l convert` with --rank K"):
            i2l(*command, "-o", tmp_path / "out")
    assert i2l("rank", path, "--effect-kept", "0.5", "-o", tmp_path / "out") == 0
    assert 1 <= Lora.read(tmp_path / "out").rank < 128


def test_check_names_the_conversion_for_every_program_that_has_the_model(tmp_path, capsys):
    """Whether any loads another network itself was not tried."""
    for parts, title, base in ((WHOLE, "LoKr", ""), (dora(), "DoRA", " --base CHECKPOINT")):
        path = write(tmp_path / "f.safetensors", parts)
        assert i2l("check", path, "--json") == 0
        told = json.loads(capsys.readouterr().out)["consumers"]
        assert {one["status"] for one in told} == {"untried", "no model"}
        details = {one["detail"] for one in told if one["status"] == "untried"}
        line = f"holds {title}: make a plain LoRA of it first: `i2l convert FILE --rank K{base}`"
        assert details == {line} and not any(one["loads"] or one["repair"] for one in told)


def test_check_of_a_base_counts_the_modules_of_other_networks(tmp_path, capsys):
    base = tmp_path / "base.safetensors"
    safetensors.torch.save_file({f"model.diffusion_model.{PATH}.weight": random(D_OUT, D_IN)}, base)
    assert i2l("check", write(tmp_path / "f.safetensors", WHOLE), "--base", base, "--json") == 0
    told = json.loads(capsys.readouterr().out)["base"]
    assert (told["status"], told["fitting"]) == ("all", 1)


def test_two_networks_of_one_module_are_refused(tmp_path, capsys):
    down, up = factors(PATH)
    path = write(tmp_path / "f", WHOLE | {"lora_A.weight": down, "lora_B.weight": up})
    assert i2l("inspect", path) == 0
    assert f"problem   {PATH} holds LoKr and LoRA: one network a module is read" in capsys.readouterr().out
    with pytest.raises(UserError, match=rf"the module {PATH} holds LoKr and LoRA"):
        i2l("convert", path, "--rank", "2", "-o", tmp_path / "out")


def test_the_scale_of_a_network_is_said_or_asked_for(tmp_path, capsys):
    """The configuration of PEFT beside the file is of another network: nothing is guessed."""
    parts = made(LOKR["no alpha"])
    path = write(tmp_path / "adapter_model.safetensors", parts, prefix="base_model.model.")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 3, "lora_alpha": 6}))
    with pytest.raises(UserError, match=r"is LoKr, not LoRA as its adapter_config\.json says.*--alpha"):
        Lora.read(path)
    assert close(Lora.read(path, alpha=6).delta(PATH), expected(parts | {"alpha": torch.tensor(6.0)}))
    with pytest.raises(UserError, match="says its scale itself"):
        Lora.read(write(tmp_path / "f", made(LOKR["w2 in factors"])), alpha=2)
    with pytest.raises(UserError, match=r"alpha of .* is 0: the LoRA would do nothing"):
        Lora.read(write(tmp_path / "f", parts), alpha=0)


def test_looking_needs_no_torch(tmp_path):
    code = (
        "import sys; from i2l_ext.converters.inspection import inspect, report_lines;"
        "print(*report_lines(inspect(sys.argv[1], values=len(sys.argv) < 3)), sep='\\n');"
        "sys.exit('torch' in sys.modules)"
    )
    path = write(tmp_path / "f", WHOLE | {"dora_scale": random(512, 1)})
    for extra in ([], ["header"]):
        done = subprocess.run([sys.executable, "-c", code, path, *extra], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "LoKr with DoRA in 1 modules: `i2l convert --rank K --base CHECKPOINT`" in done.stdout
