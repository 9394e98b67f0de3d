"""Training: its configuration, its heads against the decoder, and runs that are killed, resumed and shared out."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from i2l_ext.commands.main import main
from i2l_ext.commands.train import _bases
from i2l_ext.converters.architectures import MINI
from i2l_ext.converters.errors import UserError
from i2l_ext.decoder import DecoderSpec, ResidualSpec
from i2l_ext.decoder.decode import Decoder
from i2l_ext.training import config, experts, muon
from i2l_ext.training.examples import Examples, style_ranges
from i2l_ext.training.heads import TrainableHeads, whitening_matrix
from i2l_ext.training.loop import TrainingCheckpoint, build_optimizer
from i2l_ext.training.metrics import read_metrics

ROOT = Path(__file__).parent.parent
ONE = [{"name": "style", "schedule": {"steps": 1}}]
CONFIGS = sorted((ROOT / "configs" / "train").glob("*.yaml"))


def small(tmp_path, **changes):
    """The miniature's configuration with few steps and few pictures."""
    raw = yaml.safe_load((ROOT / "configs" / "train" / "mini.yaml").read_text())
    raw.update(output=str(tmp_path / "run"), lanes=1, precision="no", **changes)
    raw["data"] = {"kind": "world", "styles": 12, "contents": 3}
    raw["foundations"] = {
        name: {"steps": 3, "batch": 4} for name in ("autoencoder", "base", "siglip2", "dinov3", "qwen_vl", "judge")
    } | {"pictures": 64}
    for expert in raw["experts"]:
        expert["schedule"] = {"steps": 4, "batch": 4, "log_every": 1, "save_every": 2}
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path, raw


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_the_configurations_beside_the_code_parse(path):
    config.parse_config(yaml.safe_load(path.read_text()))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"exprts": []}, "exprts: no such key; did you mean 'experts'?"),
        ({"data": {"kind": "wrld"}}, "data.kind: 'wrld' is none of world, folder."),
        ({"data": {"kind": "folder", "path": "/nowhere/at/all"}}, "the folder /nowhere/at/all does not exist."),
        ({"data": {"kind": "folder"}}, "data.path: say which folder"),
        ({"seed": "one"}, "seed: a value of type int is due, not 'one'."),
        ({"seed": -1}, "seed: -1 is negative."),
        ({"experts": [{"name": "style"}]}, "experts[0].schedule: this key is missing."),
        ({"experts": [{"name": "s", "schedule": {"steps": 1, "learning_rat": 0.1}}]}, "did you mean 'learning_rate'?"),
        ({"experts": [{"name": "s", "upon": ["t"], "schedule": {"steps": 1}}]}, "none of the experts before it"),
        ({"data": {"kind": "folder", "path": "."}}, "bias: a bias can be trained for mini only"),
        ({"foundations": None}, "foundations: mini's base has to be trained first"),
        ({"data": {"kind": "folder", "path": "."}, "experts": ONE}, "data.kind: 'folder' is not for mini"),
        ({"base": {"kind": "qwen-image"}, "experts": ONE}, "data.kind: 'world' is not for Qwen-Image"),
        (
            {"base": {"kind": "qwen-image"}, "data": {"kind": "folder", "path": "."}, "experts": ONE},
            "foundations: this section is for mini",
        ),
    ],
)
def test_a_wrong_configuration_gets_one_clear_line(tmp_path, capsys, change, words):
    path, raw = small(tmp_path)
    raw.update(change)
    path.write_text(yaml.safe_dump(raw))
    assert main(["train", str(path)]) == 1
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_every_base_of_a_configuration_can_be_trained_for():
    assert tuple(_bases()) == config.CHOICES[(config.BaseConfig, "kind")]


def test_a_missing_or_broken_file_gets_one_line(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        config.read_config(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(UserError, match="not YAML"):
        config.read_config(tmp_path / "bad.yaml")


@pytest.mark.parametrize("kind", ["direct", "core"])
@pytest.mark.parametrize("residual", [None, (5, 7, 3)])
def test_trained_heads_and_the_decoder_make_the_same_lora(tmp_path, kind, residual):
    torch.manual_seed(0)
    heads = TrainableHeads(MINI, embedding=10, compress=6, rank=4, kind=kind, residual=residual)
    for parameter in heads.parameters():  # zeros would hide everything
        torch.nn.init.normal_(parameter, std=0.3)
    path = tmp_path / "heads.safetensors"
    save_file({key: value.contiguous() for key, value in heads.state_dict().items()}, path)
    spec = DecoderSpec(MINI, 10, compress=6, rank=4, residual=residual and ResidualSpec(*residual), kind=kind)
    assert {key: tuple(value.shape) for key, value in heads.state_dict().items()} == spec.shapes

    x, tokens = torch.randn(3, 10), torch.randn(3, 5, 7) if residual else None
    scales = [0.5, 0.3, 0.2]
    with torch.no_grad(), Decoder(path, spec) as opened:
        pairs = heads(x, tokens)
        lora = opened.lora(x, scales, tokens)
        assert set(lora) == set(pairs) == set(MINI.i2l_modules)
        for module, (down, up) in pairs.items():
            expected = sum(scale * up[n] @ down[n] for n, scale in enumerate(scales))
            assert torch.allclose(lora.delta(module), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["direct", "core"])
def test_whitened_heads_are_saved_as_plain_ones(kind):
    torch.manual_seed(0)
    x = torch.randn(50, 10) @ torch.diag(torch.logspace(-2, 1, 10)) + 0.3
    residual = (5, 7, 3)
    whitened, plain = (
        TrainableHeads(MINI, embedding=10, compress=6, rank=4, kind=kind, residual=residual) for _ in range(2)
    )
    for parameter in whitened.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    whitened.whitening = whitening_matrix(x, 1e-3)
    through = x @ whitened.whitening
    assert torch.linalg.cond(through.T @ through) < 0.01 * torch.linalg.cond(x.T @ x)
    assert through.square().mean().item() == pytest.approx(x.square().mean().item(), rel=1e-4)
    plain.load_state_dict(whitened.folded_state_dict())
    tokens = torch.randn(50, 5, 7)
    with torch.no_grad():
        for one, other in zip(whitened(x, tokens).values(), plain(x, tokens).values(), strict=True):
            assert torch.allclose(one[1], other[1], rtol=1e-3, atol=1e-3 * other[1].abs().max())
            assert torch.allclose(one[0], other[0], rtol=1e-3, atol=1e-3 * other[0].abs().max())


def test_new_heads_change_nothing_and_learn():
    heads = TrainableHeads(MINI, embedding=10, compress=6, rank=4)
    for down, up in heads(torch.randn(2, 10)).values():
        assert up.abs().max() == 0 and down.abs().max() > 0


def test_partners_share_the_style_and_differ():
    first, count = style_ranges([3, 1, 4])
    nothing = torch.zeros(8, 1, 1)
    examples = Examples(first, count, torch.zeros(8, 1, 1, 1), nothing, nothing, nothing, nothing, nothing)
    style = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2])
    rows = torch.arange(8).repeat(50)
    partners = examples.sample_same_style(rows, torch.Generator().manual_seed(0))
    assert torch.equal(style[partners], style[rows])
    alone = rows == 3
    assert (partners[~alone] != rows[~alone]).all() and (partners[alone] == 3).all()
    assert all(len(set(partners[rows == n].tolist())) == count[n] - 1 for n in (0, 1, 2, 4, 5, 6, 7))


def test_folders_of_pictures_are_checked_before_anything_is_loaded(tmp_path):
    from PIL import Image

    from i2l_ext.training.qwen_image import FrozenQwenImage, pictures_by_style

    with pytest.raises(UserError, match="holds no folders"):
        pictures_by_style(tmp_path)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (40, 40)).save(tmp_path / name / "one.png")
    (tmp_path / "a" / "one.txt").write_text("a picture")
    with pytest.raises(UserError, match=r"one\.png: no caption"):
        pictures_by_style(tmp_path)
    (tmp_path / "b" / "one.txt").write_text("a picture")
    assert [len(style) for style in pictures_by_style(tmp_path)] == [1, 1]
    with pytest.raises(UserError, match=r"no transformer/config\.json"):
        FrozenQwenImage(tmp_path, None, False)


def command(*arguments):
    return [sys.executable, "-m", "i2l_ext", "train", *map(str, arguments)]


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def test_a_picture_that_cannot_be_read_gets_one_line(tmp_path, capsys):
    (tmp_path / "pictures" / "ink").mkdir(parents=True)
    (tmp_path / "pictures" / "ink" / "one.png").write_bytes(b"no picture at all")
    (tmp_path / "pictures" / "ink" / "one.txt").write_text("a cat")
    raw = yaml.safe_load((ROOT / "configs" / "train" / "qwen-image.yaml").read_text())
    raw.update(output=str(tmp_path / "run"), precision="no")
    raw["base"]["path"] = str(tmp_path)
    raw["data"] = {"kind": "folder", "path": str(tmp_path / "pictures")}
    path = tmp_path / "real.yaml"
    path.write_text(yaml.safe_dump(raw))
    assert main(["train", str(path), "--only", "examples"]) == 1
    err = capsys.readouterr().err
    assert "one.png" in err and err.count("\n") == 1


def losses(folder, task):
    return {line["step"]: line["loss"] for line in read_metrics(folder / "metrics.jsonl") if line["task"] == task}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A whole run at little cost: its configuration, and the folder it left."""
    folder = tmp_path_factory.mktemp("trained")
    path, raw = small(folder)
    assert main(["train", str(path)]) == 0
    return raw, folder / "run"


def test_one_command_trains_everything(trained):
    raw, folder = trained
    names = {"base", "siglip2", "dinov3", "qwen_vl", "judge", "examples", *(e["name"] for e in raw["experts"])}
    assert names <= {path.stem for path in folder.glob("*.safetensors")}
    assert (folder / "loss.png").stat().st_size > 1000
    assert set(losses(folder, "coarse")) == {1, 2, 3, 4}


def copy_up_to_style(source, raw, tmp_path, steps, **schedule):
    """A run's folder with everything before the first expert done."""
    path, _ = small(tmp_path)
    changed = {**raw, "output": str(tmp_path / "run"), "experts": [{**raw["experts"][0], "name": "style"}]}
    changed["experts"][0]["schedule"] = {"steps": steps, "batch": 4, "log_every": 1, "save_every": 5, **schedule}
    path.write_text(yaml.safe_dump(changed))
    (tmp_path / "run").mkdir()
    for name in ("base", "siglip2", "dinov3", "qwen_vl", "judge", "examples"):
        (tmp_path / "run" / f"{name}.safetensors").symlink_to(source / f"{name}.safetensors")
    return path, tmp_path / "run"


@pytest.mark.parametrize("matrix_rate", [0.0, 0.002], ids=["adamw", "muon"])
def test_a_killed_run_resumes_to_the_same_result(trained, tmp_path, matrix_rate):
    raw, source = trained
    results = []
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        path, folder = copy_up_to_style(source, raw, tmp_path / name, steps=60, matrix_rate=matrix_rate)
        if name == "killed":
            process = subprocess.Popen(command(path), env=environment(), stderr=subprocess.DEVNULL)
            while not list(folder.glob("style.steps/step-*")) and process.poll() is None:
                time.sleep(0.02)
            process.send_signal(signal.SIGKILL)
            process.wait()
            assert not (folder / "style.safetensors").exists(), "it was faster than the kill"
        subprocess.run(command(path), env=environment(), check=True, capture_output=True)
        results.append((load_file(folder / "style.safetensors"), losses(folder, "style")))
    (whole, curve), (resumed, again) = results
    assert curve.keys() == again.keys() == set(range(1, 61))
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert curve == again


def test_a_checkpoint_holds_everything_that_the_next_step_depends_on(tmp_path):
    """Without the optimiser's state the next steps would be others: the test above could not fail otherwise."""
    schedule = config.Schedule(steps=4, matrix_rate=0.002, warmup=1)
    ends = []
    for keep in (lambda key: True, lambda key: "momentum/" not in key, lambda key: "moment2/" not in key):
        torch.manual_seed(0)
        module = torch.nn.Linear(6, 5)
        optimizer = build_optimizer(schedule, list(module.parameters()))
        checkpoint = TrainingCheckpoint(tmp_path / str(len(ends)), module, optimizer, {
            name: p.detach().clone() for name, p in module.named_parameters()
        })  # fmt: skip
        for step in range(6):
            if step == 3:
                checkpoint.save(step)
                [file] = checkpoint.folder.iterdir()
                save_file({key: value for key, value in load_file(file).items() if keep(key)}, file)
                torch.nn.init.zeros_(module.weight)
                optimizer.state.clear()
                assert checkpoint.load() == step
            optimizer.zero_grad()
            x = torch.randn(9, 6, generator=torch.Generator().manual_seed(step))
            (module(x) - step).square().mean().backward()
            optimizer.step()
        ends.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    whole = ends[0]
    assert all((other - whole).abs().max() > 1e-4 for other in ends[1:])


def test_muon_moves_the_kernels_of_a_convolution_as_one_matrix():
    torch.manual_seed(0)
    kernels = torch.nn.Parameter(torch.randn(6, 4, 3, 3))
    before, gradient = kernels.detach().clone(), torch.randn_like(kernels)
    kernels.grad = gradient.clone()
    muon.Muon([kernels], lr=1.0, matrix_scale=0.1).step()
    moved = torch.linalg.svdvals((before - kernels.detach()).flatten(1))
    assert moved.min() > 0.05 and moved.max() < 0.13  # the rate, for every direction
    assert ((before - kernels.detach()) * gradient).sum() > 0


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 5, 20), (2, 20, 5)])
def test_muon_moves_matrices_by_orthogonal_ones(shape):
    torch.manual_seed(0)
    matrices = torch.randn(shape) * 7
    values = torch.linalg.svdvals(muon.orthogonalize(matrices))
    assert values.min() > 0.3 and values.max() < 1.3
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    cosine = torch.nn.functional.cosine_similarity(muon.orthogonalize(matrices).flatten(1), (u @ v).flatten(1))
    assert cosine.min() > 0.9


def test_muon_leaves_vectors_to_adamw():
    ends = []
    for name in ("adamw", "muon"):
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(7))
        schedule = config.Schedule(steps=9, matrix_rate=0.02 if name == "muon" else 0.0, weight_decay=0.1)
        optimizer = build_optimizer(schedule, [p])
        for step in range(9):
            optimizer.zero_grad()
            (p * (step + 1)).sin().sum().backward()
            optimizer.step()
        ends.append(p.detach())
    assert torch.allclose(*ends, atol=1e-6)


def test_two_processes_draw_the_same_loss_curve(trained, tmp_path):
    raw, source = trained
    curves = []
    for processes in (1, 2):
        (tmp_path / str(processes)).mkdir()
        path, folder = copy_up_to_style(source, raw, tmp_path / str(processes), steps=12)
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(processes),
                  "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
                  "--main_process_port", "0", "-m", "i2l_ext", "train", str(path)]  # fmt: skip
        line = launch if processes > 1 else command(path)
        done = subprocess.run(line, env=environment(), capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr[-2000:]
        curves.append(losses(folder, "style"))
    one, two = curves
    assert one.keys() == two.keys() == set(range(1, 13))
    assert max(abs(one[step] - two[step]) for step in one) < 2e-3 * max(one.values())


def test_a_folder_belongs_to_one_configuration(trained, tmp_path, capsys):
    raw, _ = trained
    path = tmp_path / "other.yaml"
    path.write_text(yaml.safe_dump({**raw, "seed": 5}))
    assert main(["train", str(path)]) == 1
    assert "belongs to another configuration" in capsys.readouterr().err


def test_gradient_checkpointing_and_bf16_train_to_nearly_the_same(trained):
    from i2l_ext.mini.base import MiniBase

    raw, folder = trained
    examples = Examples.load(folder / "examples.safetensors")
    expert = config.parse_config(raw).experts[0]
    found = []
    for checkpointing, dtype in ((False, None), (True, None), (True, torch.bfloat16)):
        base = MiniBase.load(folder / "base.safetensors")
        if checkpointing:
            base.transformer.enable_gradient_checkpointing()
            base.train()
        task = experts.expert_task(expert, base, examples, [], seed=1, dtype=dtype)
        for parameter in task.module.parameters():
            torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(3))
        loss = task.loss(task.module, task.rng(0), slice(0, 4))
        loss.backward()
        # The last block's text stream leads nowhere: its heads get no gradient.
        grads = [p.grad.flatten() for p in task.module.parameters() if p.grad is not None]
        found.append((loss.item(), torch.cat(grads)))
    (plain, grad), (again, same), (half, near) = found
    assert again == pytest.approx(plain, rel=1e-5) and torch.allclose(same, grad, atol=1e-4 * grad.abs().max())
    assert half == pytest.approx(plain, rel=0.03)
    assert torch.nn.functional.cosine_similarity(near, grad, dim=0) > 0.98


def test_checkpoints_of_a_broken_write_do_not_count(trained, tmp_path):
    raw, source = trained
    path, folder = copy_up_to_style(source, raw, tmp_path, steps=6)
    (folder / "style.steps").mkdir()
    (folder / "style.steps" / ".i2l-0123456789ab.part").write_bytes(b"half a file")
    assert main(["train", str(path)]) == 0
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if line["task"] == "style"] == list(range(1, 7))
    assert re.fullmatch(r"step-\d{7}\.safetensors", next((folder / "style.steps").glob("step-*")).name)
