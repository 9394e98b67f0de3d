"""Ranks: the optimum, held against the dense SVD; growth that can learn; merge; the pictures."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from i2l_ext.converters import Lora, UserError, inspect, rank
from i2l_ext.converters.architectures import MINI
from test_converters_commands import i2l

MODULES = list(MINI.i2l_modules)


def factors(path, r, seed=0, decay=1.0):
    generator = torch.Generator().manual_seed(seed)
    d_out, d_in = MINI.modules[path].shape
    falls = torch.tensor([decay**i for i in range(r)])
    return torch.randn(r, d_in, generator=generator), torch.randn(d_out, r, generator=generator) * falls


def mini(r=6, decay=0.7, modules=MODULES):
    return Lora.of(MINI, {path: factors(path, r, seed, decay) for seed, path in enumerate(modules)})


def relative(a, b):
    return float((a - b).norm() / b.norm())


@settings(deadline=None, max_examples=40)
@given(
    path=st.sampled_from(MODULES),
    r=st.integers(1, 12),
    k=st.integers(1, 12),
    offset=st.sampled_from([0.0, 3.0]),
    exact=st.booleans(),
)
def test_truncation_is_the_optimum_of_the_dense_svd(path, r, k, offset, exact):
    down, up = factors(path, r, seed=r)
    up = up + offset  # rows that share an offset: what a centred PCA loses
    found = rank.svd_of_product(down, up, exact=exact)
    dense = up.double() @ down.double()
    s = torch.linalg.svdvals(dense)
    a, b = rank.factors_of_rank(found, k, rank.kaiming_rows(path, 0))
    assert (a.shape, b.shape) == ((k, down.shape[1]), (up.shape[0], k))
    optimum = (s[k:].square().sum()).sqrt()
    error = (b.double() @ a.double() - dense).norm()
    assert error <= optimum * (1 + 1e-4) + 1e-5 * dense.norm()
    assert torch.allclose(found.s.double()[: min(r, k)], s[: min(r, k)], rtol=1e-4, atol=1e-5 * float(s[0]))


def test_exact_is_exact():
    down, up = (factor.double() for factor in factors(MODULES[0], 8))
    found = rank.svd_of_product(down, up, exact=True)
    assert found.s.dtype == torch.float64
    assert relative((found.u * found.s) @ found.vh, up @ down) < 1e-14


@pytest.mark.parametrize("k", [2, 6, 16])
def test_form_is_balanced_for_training(k):
    lora = mini()
    resized = rank.resize(lora, k)
    for path in MODULES:
        down, up = resized[path]
        norms = up.norm(dim=0)
        known = min(k, 6)
        assert torch.allclose(down[:known].norm(dim=1), torch.full((known,), 1 / math.sqrt(3)), rtol=1e-4)
        assert (norms[: known - 1] >= norms[1:known] * (1 - 1e-5)).all()  # singular values descend
        assert (norms[known:] == 0).all()
        if k >= 6:
            assert relative(up @ down, lora.delta(path)) < 1e-5


def test_equal_norms_are_equal_and_every_rank_can_learn():
    lora = mini()
    weak = next(iter(MODULES))
    factors = {path: lora[path] for path in lora} | {weak: (lora[weak][0], lora[weak][1] * 1e-3)}
    lora = Lora.of(lora.arch, factors)
    resized = rank.resize(lora, 8, equal=True)
    for path in MODULES:
        down, up = resized[path]
        rows, columns = down.norm(dim=1), up.norm(dim=0)
        longer = columns > 0.6
        assert torch.allclose(rows[longer], columns[longer], rtol=1e-4)
        assert (rows >= (1 - 1e-5) / math.sqrt(3))[:6].all() and (rows > 0.3).all()
        assert longer.any() != (path == weak)
        assert relative(up @ down, lora.delta(path)) < 1e-5


def test_growth_draws_what_a_fresh_lora_has():
    rows = rank.kaiming_rows("x", 0)(400, 300)
    assert rows.abs().max() <= 1 / math.sqrt(300)
    assert float(rows.norm(dim=1).mean()) == pytest.approx(1 / math.sqrt(3), rel=0.01)
    assert torch.equal(rows[:5], rank.kaiming_rows("x", 0)(5, 300))
    assert not torch.equal(rows[:5], rank.kaiming_rows("y", 0)(5, 300))
    assert not torch.equal(rows[:5], rank.kaiming_rows("x", 1)(5, 300))


def gradients(down, up, steps=1):
    """Which ranks have moved after gradient steps on a random regression."""
    torch.manual_seed(0)
    down, up = torch.nn.Parameter(down.clone()), torch.nn.Parameter(up.clone())
    first = down.detach().clone(), up.detach().clone()
    optimiser = torch.optim.SGD([down, up], lr=1e-2)
    for _ in range(steps):
        x = torch.randn(64, down.shape[1])
        loss = (x @ down.T @ up.T - torch.randn(64, up.shape[0])).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return [bool((down[i] != first[0][i]).any() or (up[:, i] != first[1][:, i]).any()) for i in range(len(down))]


def test_one_step_moves_every_rank():
    down, up = rank.resize(mini(4), 16)[MODULES[0]]
    assert all(gradients(down, up))
    padded = torch.cat([down[:4], torch.zeros(12, down.shape[1])]), torch.cat([up[:, :4], torch.zeros(len(up), 12)], 1)
    assert gradients(*padded, steps=5) == [True] * 4 + [False] * 12  # what zero padding does: dead ranks


def test_a_rank_deficient_file_has_no_dead_rank():
    down, up = factors(MODULES[0], 4)
    up[:, 2:] = up[:, :2]
    down[2:] = down[:2]
    again = rank.resize(Lora.of(MINI, {MODULES[0]: (down, up)}), 4)[MODULES[0]]
    assert all(gradients(*again))
    nothing = rank.resize(Lora.of(MINI, {MODULES[0]: (down * 0, up * 0)}), 4)[MODULES[0]]
    assert all(gradients(*nothing))


def test_fill_adds_fresh_modules():
    lora = mini(4, modules=MODULES[:2])
    filled = rank.resize(lora, 4, fill=MODULES)
    assert list(filled.specs) == MODULES
    down, up = filled[MODULES[5]]
    assert not up.any() and all(gradients(down, up))


def test_wrong_ranks():
    for wrong in (0, -1, 5000):
        with pytest.raises(UserError, match="from 1 to 4096"):
            rank.resize(mini(), wrong)


# effect kept and allocation


def test_the_effect_kept_chooses_the_smallest_rank():
    values = rank.singular_values(mini(6, 0.3))
    for share in (0.5, 0.9, 0.99, 1.0):
        k = rank.rank_for([*values.values()], share)
        assert rank.effect_kept(MINI, values, dict.fromkeys(values, k))["all"] >= share - 1e-12
        if k > 1:
            assert rank.effect_kept(MINI, values, dict.fromkeys(values, k - 1))["all"] < share
        for path, own in rank.ranks_for(values, share).items():
            assert rank.effect_kept(MINI, {path: values[path]}, {path: own})["all"] >= share - 1e-12
            assert own == 1 or rank.effect_kept(MINI, {path: values[path]}, {path: own - 1})["all"] < share


def test_allocation_beats_a_uniform_rank_at_the_same_size():
    lora = Lora.of(MINI, {path: factors(path, 8, seed, 0.2 if seed % 2 else 0.95) for seed, path in enumerate(MODULES)})
    values = rank.singular_values(lora)
    ranks = rank.ranks_of_same_size(MINI, values, 4)
    size = sum(r * sum(MINI.modules[path].shape) for path, r in ranks.items())
    assert size <= 4 * sum(sum(MINI.modules[path].shape) for path in MODULES)
    assert min(ranks.values()) >= 1
    uniform = rank.effect_kept(MINI, values, dict.fromkeys(MODULES, 4))["all"]
    assert rank.effect_kept(MINI, values, ranks)["all"] > uniform


# commands


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "style.safetensors"
    mini(6, 0.5).save(path, "kohya")
    return path


def test_rank_command_reports_what_it_kept(file, capsys):
    assert i2l("rank", file, "--rank", "2", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["file"].endswith("style_r2.safetensors")
    assert (told["rank"], told["key_format"], told["dtype"]) == (2, "kohya", "F32")
    values = rank.singular_values(Lora.read(file))
    assert told["kept"]["all"] == pytest.approx(
        rank.effect_kept(MINI, values, dict.fromkeys(values, 2))["all"], rel=1e-5
    )
    assert set(told["kept"]) == {"all"} | {MINI.modules[path].kind.name for path in MODULES}
    small = Lora.read(told["file"])
    for path in MODULES:
        optimum = values[path][2:].square().sum().sqrt()
        error = (small.delta(path) - Lora.read(file).delta(path)).norm()
        assert float(error) == pytest.approx(float(optimum), rel=1e-4)
    assert small.metadata["ss_network_dim"] == "2" and small.metadata["i2l.rank_from"] == "6"


def test_rank_by_effect_kept_and_by_module(file, tmp_path, capsys):
    assert i2l("rank", file, "--effect-kept", "0.95", "--per-module", "-o", tmp_path / "a") == 0
    assert i2l("rank", file, "--effect-kept", "0.95", "-o", tmp_path / "b") == 0
    assert i2l("rank", file, "--rank", "3", "--per-module", "--exact", "-o", tmp_path / "c") == 0
    assert len(inspect(tmp_path / "b").ranks) == 1
    values = rank.singular_values(Lora.read(file))
    assert {p: spec.rank for p, spec in Lora.read(tmp_path / "a").specs.items()} == rank.ranks_for(values, 0.95)
    assert (tmp_path / "c").stat().st_size <= 1.05 * (tmp_path / "b").stat().st_size * 3 / inspect(
        tmp_path / "b"
    ).ranks.popitem()[0]


@pytest.mark.parametrize(
    "wrong",
    [
        ["--effect-kept", "0"],
        ["--effect-kept", "1.5"],
        ["--effect-kept", "nan"],
        ["--rank", "0"],
        ["--rank", "-3", "--per-module"],
    ],
)
def test_rank_refuses_what_cannot_be_had(file, wrong):
    with pytest.raises(UserError, match=r"rank must be from 1 to 4096|effect kept must be a (share above 0|number)"):
        i2l("rank", file, *wrong)
    assert len(list(file.parent.iterdir())) == 1


def test_merge_is_the_weighted_sum(tmp_path, capsys):
    for name, seed in (("a", 1), ("b", 2)):
        Lora.of(MINI, {path: factors(path, 3, seed) for path in MODULES}, {"same": "1", "name": name}).save(
            tmp_path / name
        )
    assert i2l("merge", f"{tmp_path / 'a'}:0.7", f"{tmp_path / 'b'}:-0.25", "-o", tmp_path / "out", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    a, b, out = (Lora.read(tmp_path / name) for name in ("a", "b", "out"))
    assert told["rank"] == 6
    for path in MODULES:
        assert relative(out.delta(path), 0.7 * a.delta(path) - 0.25 * b.delta(path)) < 1e-6
    assert out.metadata["same"] == "1" and "name" not in out.metadata
    assert json.loads(out.metadata["i2l.merged"]) == [{"file": "a", "weight": 0.7}, {"file": "b", "weight": -0.25}]


def test_merge_to_a_rank_and_a_selection(tmp_path, capsys):
    for name, seed in (("a", 1), ("b", 2)):
        Lora.of(MINI, {path: factors(path, 3, seed) for path in MODULES}).save(tmp_path / name)
    parts = [str(tmp_path / "a"), f"{tmp_path / 'b'}:0.5"]
    assert i2l("merge", *parts, "--rank", "4", "--kinds", "attn", "-o", tmp_path / "out") == 0
    out = Lora.read(tmp_path / "out")
    assert {spec.rank for spec in out.specs.values()} == {4}
    assert all("attn" in path for path in out)
    assert "effect kept" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("command", ["rank", "convert", "merge"])
def test_numbers_that_become_wider_are_told(tmp_path, capsys, command, dtype):
    mini().cast(dtype).save(tmp_path / "a")
    parts = [f"{tmp_path / 'a'}:0.3", str(tmp_path / "a")] if command == "merge" else [str(tmp_path / "a")]
    line, word = (command, *parts, "--rank", "1", "-o", str(tmp_path / "out")), {"BF16": "bf16", "F16": "fp16"}[dtype]
    assert i2l(*line) == 0
    assert f"Written in fp32, as it was computed. In {word} the file" in capsys.readouterr().err
    assert i2l(*line, "--overwrite", "--dtype", word) == 0
    assert "Written in fp32" not in capsys.readouterr().err
    assert {spec.dtype for spec in Lora.read(tmp_path / "out").specs.values()} == {dtype}


def test_merge_keeps_bytes_narrow_where_weights_cost_nothing(tmp_path):
    mini().cast("BF16").save(tmp_path / "a")
    assert i2l("merge", f"{tmp_path / 'a'}:0.5", str(tmp_path / "a"), "-o", tmp_path / "out") == 0
    out = Lora.read(tmp_path / "out")
    assert {spec.dtype for spec in out.specs.values()} == {"BF16"}
    path = MODULES[0]
    down, up = (factor.double() for factor in Lora.read(tmp_path / "a")[path])
    assert (
        torch.equal((out[path][1].double() @ out[path][0].double()), 1.5 * (up @ down))
        or relative(out[path][1].double() @ out[path][0].double(), 1.5 * (up @ down)) < 1e-12
    )


def test_a_part_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        i2l("merge", str(tmp_path / "C:nothing.safetensors"))
    with pytest.raises(UserError, match="not a weight"):
        i2l("merge", f"{tmp_path / 'a'}:nan")


def test_plot_is_a_picture(file, tmp_path, capsys):
    from PIL import Image

    assert i2l("inspect", file, "--plot", tmp_path / "p.png", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    with Image.open(tmp_path / "p.png") as image:
        assert image.format == "PNG" and min(image.size) > 500
        assert len(image.convert("RGB").getcolors(1 << 24)) > 50
    assert told["rank_for_effect"]["0.9"] <= told["rank_for_effect"]["0.999"] <= 6
    with pytest.raises(UserError, match="exists already"):
        i2l("inspect", file, "--plot", tmp_path / "p.png")
