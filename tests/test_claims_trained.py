"""The claims that train LoRAs: styles side by side, starts as `i2l export` writes them, runs that go on; kept rows."""

import pytest
import torch

from i2l_ext.converters.architectures import MINI
from i2l_ext.converters.export import export
from i2l_ext.converters.lora import Lora
from i2l_ext.training.flow import sample_timesteps, timestep_quantiles

pytest.importorskip("diffusers")

from i2l_ext.mini import finetuning, report, start_claims
from i2l_ext.mini.base import MiniBase
from i2l_ext.mini.evaluation import ClaimRow
from i2l_ext.mini.records import Records
from i2l_ext.mini.sampler import WEIGHTS


def random_lora(rank=12, seed=0, empty=()):
    rng = torch.Generator().manual_seed(seed)
    factors = {}
    for path, module in MINI.i2l_modules.items():
        d_out, d_in = module.shape
        up = torch.randn(d_out, rank, generator=rng) * (path not in empty)
        factors[path] = (torch.randn(rank, d_in, generator=rng) / 10, up / 10)
    return Lora.of(MINI, factors)


def test_styles_trained_side_by_side_are_trained_as_alone():
    base = MiniBase.load(WEIGHTS / "base.safetensors")
    sets = finetuning.style_sets(2, 3, 123)
    starts = [start_claims.kaiming_start(1), start_claims.i2l_start(random_lora(), equal=True)]

    def train(which):
        chosen = start_claims.stacked([starts[n] for n in which])
        return finetuning.train_loras(base, chosen, [sets[n] for n in which], 3e-3, 6, keep=(0, 6))

    together, alone = train([0, 1]), [train([0]), train([1])]
    assert together.losses.shape == (2, 2)  # before any step, and after five
    assert (together.losses[1] < together.losses[0]).all()
    assert torch.allclose(together.losses, torch.cat([one.losses for one in alone], 1), rtol=1e-3)
    path = next(iter(starts[0]))
    assert torch.equal(together.factors[0][path][0][1], starts[1][path][0])
    assert torch.allclose(together.factors[6][path][1][0], alone[0].factors[6][path][1][0], atol=1e-4)


def test_a_training_ends_when_the_held_out_loss_falls_no_more():
    base = MiniBase.load(WEIGHTS / "base.safetensors")
    starts = start_claims.stacked([start_claims.kaiming_start(1)])
    wild = finetuning.train_loras(base, starts, finetuning.style_sets(1, 2, 123), 3.0, 40, patience=5)
    assert len(wild.losses) < 40 // finetuning.EVERY


@pytest.mark.parametrize("trainer", ["musubi-tuner", "flymyai"])
def test_the_start_is_what_export_writes(trainer, tmp_path):
    lora = random_lora()
    written = Lora.read(export(lora, trainer, start_claims.RANK, tmp_path / "start").init)
    start = start_claims.i2l_start(lora, equal=True)
    for path in written:
        for one, other in zip(written[path], start[path], strict=True):
            assert torch.allclose(one, other, atol=1e-5)


def test_every_start_has_the_update_of_its_kind():
    lora = random_lora()
    best = start_claims.i2l_start(lora)
    for name, start in start_claims.STARTS.items():
        for path, (down, up) in start(lora, 3).items():
            update = up @ down
            assert torch.allclose(update, (best[path][1] @ best[path][0]) * name.startswith("i2L"), atol=1e-4)
            assert (down.norm(dim=1) > 0.1).all()  # can learn
    assert {*start_claims.WHOLE.starts, *start_claims.QUICK.starts} <= start_claims.STARTS.keys()


def test_quantiles_stand_for_the_timesteps_of_a_training():
    drawn = sample_timesteps(100_000, torch.Generator().manual_seed(0))
    assert timestep_quantiles(16).mean().item() == pytest.approx(drawn.mean().item(), abs=0.01)
    assert timestep_quantiles(16).std().item() == pytest.approx(drawn.std().item(), abs=0.02)


def test_a_killed_run_goes_on_with_what_it_found(tmp_path):
    asked = []

    def run(records, breaks=False):
        for rate in (1, 2, 3):
            if breaks and rate == 3:
                raise KeyboardInterrupt
            assert records.get({"rate": rate}, lambda rate=rate: asked.append(rate) or [rate, 0.5]) == [rate, 0.5]

    with pytest.raises(KeyboardInterrupt):
        run(Records(tmp_path / "kept"), breaks=True)
    run(Records(tmp_path / "kept"))
    assert asked == [1, 2, 3]
    next((tmp_path / "kept").glob("*.json")).write_text("{", encoding="utf-8")
    run(Records(tmp_path / "kept"))
    assert len(asked) == 4  # what cannot be read is measured again
    assert not [path for path in (tmp_path / "kept").iterdir() if path.suffix != ".json"]


def row(name, value, holds=None, note=""):
    return ClaimRow(name, "claim", "measure", "bound", value, holds, "1 picture", note)


def test_rows_that_were_not_measured_stay_in_the_table(tmp_path):
    from PIL import Image

    out, sheet = tmp_path / "claims.md", {name: Image.new("RGB", (8, 8)) for name in ("style", "start")}
    rows = [row("style", "old", False, "why"), row("coarse", "old"), row("coarse", "other"), row("start", "old")]
    report._write(out, rows, [row("style", "again")], sheet, keep=False)
    before = out.read_text(encoding="utf-8").splitlines()
    new = [row("number", "new"), row("start", "new", False, "because"), row("start", "more")]
    report._write(out, new, [], {"start": sheet["start"]}, keep=True)
    after = out.read_text(encoding="utf-8").splitlines()
    values = [line.split(" | ")[4] for line in after if line.startswith("| ") and line.count(" | ") == 6]
    assert values == ["measured", "old", "new", "old", "other", "new", "more"]
    assert [line for line in before if "start" not in line and line not in after] == []
    assert "- **style**: why" in after and "- **start**: because" in after
    assert any("claims/style.png" in line for line in after)
