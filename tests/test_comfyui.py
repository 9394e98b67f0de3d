"""The nodes for ComfyUI, run in a stand-in for what they use of it (tests/fake_comfy), by the real engine."""

import importlib.util
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

import i2l_ext
from branch_models import MINI, lora_of, merged, qwen, qwen_inputs
from hubs import FakeHub
from i2l_ext.comfyui import extension, host, load_node, make_node, pictures, widgets
from i2l_ext.converters import Lora
from i2l_ext.converters.errors import UserError
from i2l_ext.models.catalogue import MODELS
from i2l_ext.service.service import Service

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
ENGINE = [sys.executable, str(HERE / "small_engine.py")]
STAND_INS = (
    "folder_paths",
    "nodes",
    "comfy",
    "comfy.sd",
    "comfy.utils",
    "comfy.model_management",
    "comfy.model_patcher",
)
NODES = extension.NODE_CLASS_MAPPINGS


@pytest.fixture(scope="module")
def comfy(tmp_path_factory):
    """ComfyUI's modules, with folders of their own, and the Service of this process with the tests' engine."""
    place = tmp_path_factory.mktemp("comfy")
    (place / "loras").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("I2L_TEST_COMFY", str(place))
        patch.syspath_prepend(str(HERE / "fake_comfy"))
        for name in STAND_INS:
            patch.delitem(sys.modules, name, raising=False)
        for name in STAND_INS:
            importlib.import_module(name)
        service = Service(host.ComfyHost(place / "state"), place / "state", ENGINE)
        for module in [host, *(sys.modules[f"i2l_ext.comfyui.{name}_node{s}"] for name, s in MODULES), pictures]:
            if hasattr(module, "comfy_service"):
                patch.setattr(module, "comfy_service", lambda: service)
        yield place
        service.queue.close()
        for name in STAND_INS:
            sys.modules.pop(name, None)


MODULES = (("make", ""), ("load", ""), ("file", "s"), ("model", "s"))


@pytest.fixture(scope="module")
def loras(comfy):
    return comfy / "loras"


@pytest.fixture(scope="module")
def images():
    """Two pictures of different sizes, as a list of batches."""
    return [torch.rand(1, 40, 56, 3, generator=torch.Generator().manual_seed(1)), torch.full((1, 64, 64, 3), 0.25)]


def make(images, **other):
    given = {"name": "meadow", "model": "mini", "strength": 1.0, "weights": "1, 0.5", "rank": 4, "node": "7"} | other
    return NODES["I2LMake"]().make(images[:1], images[1:], **{name: [value] for name, value in given.items()})


@pytest.fixture(scope="module")
def made(images, loras):
    """What the first node gives."""
    return make(images)


def run(kind, /, **inputs):
    node = NODES[kind]()
    return getattr(node, node.FUNCTION)(**inputs)


# what ComfyUI loads


def load_root(name="custom"):
    spec = importlib.util.spec_from_file_location(name, ROOT / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_root_gives_nodes_to_comfyui_alone(comfy):
    assert load_root().NODE_CLASS_MAPPINGS is NODES
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(sys.modules, "folder_paths")
        assert not hasattr(load_root(), "NODE_CLASS_MAPPINGS")


def test_comfyui_finds_the_package_and_starts_as_fast_as_before(tmp_path):
    """In a process of its own, elsewhere, and without our root on the path; nothing heavy is imported."""
    code = (
        "import sys, types, time, importlib.util\n"
        "for name in ('folder_paths', 'nodes'): sys.modules[name] = types.ModuleType(name)\n"
        "before, known = set(sys.modules), set(sys.path); start = time.perf_counter()\n"
        f"spec = importlib.util.spec_from_file_location('x', {str(ROOT / '__init__.py')!r})\n"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "print(len(module.NODE_CLASS_MAPPINGS), time.perf_counter() - start)\n"
        "print(*sorted(set(sys.modules) - before)); print('added:', *set(sys.path) - known)"
    )
    ended = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    first, modules, path = ended.stdout.splitlines()
    count, seconds = first.split()
    assert int(count) == len(NODES), ended.stderr
    assert float(seconds) < 1, "on any machine; 0.025 s where it was measured (docs/comfyui.md)"
    heavy = {"torch", "numpy", "PIL", "i2l_ext.requests", "i2l_ext.converters", "i2l_ext.models", "i2l_ext.service"}
    assert not heavy & set(modules.split())
    assert path == "added:"


def test_every_node_describes_itself(comfy, made):
    for name, node in NODES.items():
        inputs = node.INPUT_TYPES()
        json.dumps(inputs)
        assert node.DESCRIPTION and callable(getattr(node, node.FUNCTION)), name
        assert len(node.RETURN_TYPES) == len(node.RETURN_NAMES)
        for kind, told in (one for part in ("required", "optional") for one in inputs.get(part, {}).values()):
            assert told["tooltip"], name
            if isinstance(kind, list):
                assert told.get("default", kind[0]) in kind
            elif kind in ("INT", "FLOAT"):
                assert told["min"] <= told["default"] <= told["max"]
    assert set(extension.NODE_DISPLAY_NAME_MAPPINGS) == set(NODES)


def test_a_loras_name_fits_every_list_of_names_and_nothing_else():
    assert not widgets.LORA_NAME != ["a.safetensors"]  # noqa: SIM202 - so ComfyUI asks
    assert widgets.LORA_NAME == "COMBO"
    assert widgets.LORA_NAME != "STRING" and hash(widgets.LORA_NAME) == hash("COMBO")
    assert json.dumps(widgets.LORA_NAME) == '"COMBO"'


# pictures to a LoRA


def test_pictures_become_a_lora_in_the_first_loras_folder(made, loras):
    name, file, preview = made["result"]
    assert name == "meadow.safetensors" and Path(file) == loras / name
    assert {path.name for path in loras.glob("meadow.*")} == {name, "meadow.preview.png", "meadow.json"}
    assert preview.shape[0] == 1 and preview.shape[-1] == 3 and preview.min() >= 0 and preview.max() <= 1
    lora = Lora.read(file)
    assert lora.rank == 4
    assert [one["weight"] for one in json.loads(lora.metadata["i2l.images"])] == pytest.approx([2 / 3, 1 / 3])
    assert made["ui"]["i2l_lora"] == [name] and len(made["ui"]["images"]) == 1
    assert name in host.lora_names()


def test_progress_is_in_comfyuis_bar(made):
    import comfy.utils

    assert max(comfy.utils.shown) == 1 and len(set(comfy.utils.shown)) > 2


def test_pictures_come_and_go_exactly(comfy, tmp_path):
    """ComfyUI makes n / 255 of a byte n: the same byte reaches the engine."""
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).expand(1, 16, 16, 3)
    [id] = pictures.take_pictures([levels.float() / 255])
    [path] = pictures.comfy_service().uploads.paths([id])
    assert torch.equal(pictures.read_picture(path), levels.float() / 255)


def test_the_same_again_is_not_made_again(images, made, loras):
    """ComfyUI forgets results when memory is short: the node does not, as long as the file is there."""
    assert make(images)["result"][:2] == made["result"][:2]
    assert make_node.ImageToLora.IS_CHANGED() == ""
    name, file, _ = make(images, strength=0.5)["result"]
    assert name == "meadow-2.safetensors" and Path(made["result"][1]).is_file()
    for path in loras.glob("meadow-2.*"):
        path.unlink()
    assert make_node.ImageToLora.IS_CHANGED() == name
    assert make(images, strength=0.5)["result"][:2] == (name, file) and Path(file).is_file()
    assert make_node.ImageToLora.IS_CHANGED() == ""


def test_auto_is_what_is_there(images, loras):
    assert Lora.read(make(images, model="auto", name="chosen")["result"][1]).arch is MINI


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"weights": "1 x"}, "write numbers such as 1 0.5"),
        ({"weights": "1 1 1"}, "one weight for each picture"),
        ({"weights": "1 0"}, "greater than 0"),
        ({"name": "a/b"}, "for example a-b"),
        (
            {"model": "z-image-style"},
            r'z-image-style: model files are missing.* Here the node "i2L models" downloads it\.',
        ),
    ],
)
def test_a_wrong_input_is_one_line(images, loras, wrong, said):
    before = sorted(loras.iterdir())
    with pytest.raises(UserError, match=said) as error:
        make(images, **wrong)
    assert "\n" not in str(error.value) and sorted(loras.iterdir()) == before


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ([torch.full((1, 8, 8, 3), float("nan"))], "Picture 1 has values that are no numbers"),
        ([torch.zeros(1, 8, 8, 3), torch.zeros(1, 8, 8, 2)], "Picture 2 has the shape"),
        ([torch.zeros(0, 8, 8, 3)], "0 pictures"),
        ([torch.zeros(65, 8, 8, 3)], "65 pictures"),
    ],
)
def test_a_picture_that_is_none_is_refused(comfy, wrong, said):
    with pytest.raises(UserError, match=said):
        make(wrong)


def test_a_wrong_name_is_told_before_anything_runs(comfy):
    assert make_node.ImageToLora.VALIDATE_INPUTS(["my_style"]) is True
    assert make_node.ImageToLora.VALIDATE_INPUTS([None]) is True
    assert "for example a-b" in make_node.ImageToLora.VALIDATE_INPUTS(["a:b"])


@pytest.mark.parametrize(("branch", "grey", "said"), [
    ("both", "none", ""), ("positive only", "none", ""), (None, None, ""),
    ("both", "away.safetensors", "There is no LoRA"),
    ("positive, grey on the negative", "none", "made from a grey picture"), ("nowhere", "none", "branch is one of"),
])  # fmt: skip
def test_a_grey_lora_that_is_not_chosen_is_told_before_anything_runs(comfy, branch, grey, said):
    told = load_node.LoadI2LLora.VALIDATE_INPUTS(branch, grey)
    assert told is True if not said else said in told


@pytest.mark.parametrize(("error", "lines"), [(UserError("a line"), ["it ends: a line"]), (ValueError("a fault"), 2)])
def test_in_comfyuis_log_a_users_error_is_its_line_alone(comfy, caplog, error, lines):
    """ComfyUI logs a line and then a traceback of whatever a node raises. Ours of a fault stays."""
    try:
        raise error
    except (UserError, ValueError) as raised:
        logging.error(f"it ends: {raised}")  # noqa: LOG015 - as ComfyUI does
        logging.error(traceback.format_exc())  # noqa: LOG015
    logged = [record.getMessage() for record in caplog.records]
    assert logged == lines if isinstance(lines, list) else len(logged) == lines


# jobs


def ask(kind, **values):
    return lambda: host.comfy_service().queue.submit(kind, "", {"request": values})


def test_an_interrupt_is_heeded_within_a_second(comfy):
    from comfy import model_management

    def interrupt():
        model_management.interrupted = True

    threading.Timer(1.5, interrupt).start()
    start = time.monotonic()
    with pytest.raises(model_management.InterruptProcessingException):
        host.finished(ask("slow"), "1")
    assert time.monotonic() - start < 4, "2.5 seconds after the interrupt, on a busy machine too"
    job = host.comfy_service().queue.jobs()[-1]
    assert host.comfy_service().queue.wait(job.id, 2).state == "cancelled"


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("fail", "not enough of it. Memory ran out"),
        ("die", "stopped from outside"),
        ("refuse", "model files are missing"),
    ],
)
def test_a_job_that_fails_says_why_in_one_line(comfy, kind, said):
    with pytest.raises(UserError, match=said) as error:
        host.finished(ask(kind), None)
    assert "\n" not in str(error.value) and "WebUI" not in str(error.value)


def test_a_missing_package_is_told_as_it_is_mended_here(comfy):
    assert "install.py" in host.HINTS["package_missing"] and "ComfyUI" in host.HINTS["package_missing"]


def test_comfyuis_models_leave_the_card_for_what_computes(comfy, monkeypatch):
    from comfy import model_management

    monkeypatch.setattr(model_management, "cpu_state", model_management.CPUState.GPU)
    host.finished(ask("note"), None, computes=False)
    assert not model_management.freed
    host.finished(ask("note"), None)
    assert len(model_management.freed) == 1
    assert host.comfy_service().host.option("i2l_device") == "auto"


def test_on_a_processor_the_engine_computes_there_too(comfy):
    assert host.comfy_service().host.option("i2l_device") == "cpu"


def test_weights_are_found_in_comfyuis_folders(comfy, tmp_path, monkeypatch):
    import folder_paths

    elsewhere = tmp_path / "more"
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "text_encoders", ([str(elsewhere)], set()))
    folders = host.comfy_service().host.models_folders()
    assert folders[:2] == [comfy / "i2l", comfy] and elsewhere in folders
    assert comfy / "clip_vision" not in folders, "it is inside one that is searched"


def test_progress_tells_steps_and_bytes(comfy):
    from i2l_ext.engine.job import Job, Progress

    job = Job("1", "make", "", {}, comfy, state="running")
    steps = ({"id": "a", "title": "encode dinov3", "bytes": 4_000_000_000}, {"id": "b", "title": "decode", "bytes": 5})
    for progress, said in (
        (Progress(), "starting"),
        (Progress(steps, 0, 0.25), "encode dinov3 (1 of 2): 1.0 of 4.0 GB"),
        (Progress(steps, 1, 0.5), "decode (2 of 2): 50%"),
    ):
        job.progress = progress
        assert host.progress_line(job) == said
    job.state = "waiting"
    assert host.progress_line(job) == "waiting for another job"


# LoRA files


def test_a_lora_is_resized_merged_converted_checked_and_exported(made, loras):
    name = made["result"][0]
    [resized] = run("I2LResize", lora_name=name, rank=2, effect_kept=0.0, name="", node="1")["result"]
    assert resized == "meadow-rank2.safetensors" and Lora.read(loras / resized).rank == 2
    [share] = run("I2LResize", lora_name=name, rank=8, effect_kept=0.5, name="half")["result"]
    assert share == "half.safetensors" and Lora.read(loras / share).rank < 4
    [both] = run(
        "I2LMerge", lora_1=name, strength_1=1.0, lora_2=resized, strength_2=-1.0, lora_3="none", strength_3=1.0,
        rank=0, name="both",
    )["result"]  # fmt: skip
    first, second, merge = (Lora.read(loras / one) for one in (name, resized, both))
    path = next(iter(first))
    assert torch.allclose(merge.delta(path), first.delta(path) - second.delta(path), atol=1e-6)
    [kohya] = run("I2LConvert", lora_name=name, key_format="kohya", dtype="as made", rank=0, name="")["result"]
    assert Lora.read(loras / kohya).read_from.reading.key_format == "kohya"
    [text] = run("I2LCheck", lora_name=name)["result"]
    assert "ComfyUI: all, 60 modules" in text
    [folder] = run("I2LExport", lora_name=name, trainer="musubi-tuner", rank=0)["result"]
    assert (Path(folder) / "train.py").is_file()


def test_a_lora_that_is_gone_is_one_line(comfy):
    for name, more in (
        ("I2LCheck", {}),
        ("I2LConvert", {"key_format": "kohya", "dtype": "as made", "rank": 0, "name": ""}),
    ):
        with pytest.raises(UserError, match=r"There is no LoRA 'away\.safetensors'"):
            run(name, lora_name="away.safetensors", **more)


def test_the_models_are_listed_and_come_only_with_consent(comfy):
    listed = run("I2LModels", download="list only", source="huggingface", agree=False)["result"][0]
    assert "mini: " in listed and "(ready)" in listed and "GB to download" in listed and str(comfy / "i2l") in listed
    with pytest.raises(UserError, match="agree to the licences"):
        run("I2LModels", download="qwen-image-style", source="huggingface", agree=False)
    assert NODES["I2LModels"].IS_CHANGED() != NODES["I2LModels"].IS_CHANGED(), "never the same: what is here may change"


class Told:
    """ComfyUI's server: the texts that it was given for a node."""

    def __init__(self):
        self.texts = []

    def send_progress_text(self, text, node):
        self.texts.append((node, text))


@pytest.fixture
def hub(monkeypatch):
    """A hub on this machine with a v2 model, whose files may be of any size; the clients of the engine go there."""
    hub = FakeHub()
    part = MODELS["z-image-v2"].parts[-1]
    hub.add(part.repo, "model.py", b"# a template")
    hub.add(part.repo, "model.safetensors", shard(4_000_000))
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    yield hub
    hub.close()


def shard(size):
    header = json.dumps({"weight": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(size)


def test_a_model_comes_by_the_node_once_its_licence_is_agreed_to(comfy, hub, monkeypatch):
    import comfy.utils

    told = Told()
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=SimpleNamespace(instance=told)))
    asked = {"download": "z-image-v2", "source": "huggingface", "node": "5"}
    with pytest.raises(UserError, match="agree to the licences"):
        run("I2LModels", agree=False, **asked)
    assert not hub.seen, "nothing is asked of the hub before"
    comfy.utils.shown.clear()
    listed = run("I2LModels", agree=True, **asked)["result"][0]
    folder = host.comfy_service().host.models_folders()[0] / MODELS["z-image-v2"].parts[-1].repo
    assert {path.name for path in folder.iterdir()} >= {"model.py", "model.safetensors"}
    assert len((folder / "model.safetensors").read_bytes()) > 4_000_000
    assert "z-image-v2 from" not in listed and comfy.utils.shown[-1] == 1
    assert told.texts and {node for node, _ in told.texts} == {"5"}


def test_the_miniature_draws(made):
    lines = {"strength": 1.0, "prompt": "a circle\n\na star left", "seed": 0, "size": 64}
    [without] = run("I2LDraw", lora_name="none", **lines)["result"]
    drawn = run("I2LDraw", lora_name=made["result"][0], **lines)
    assert drawn["result"][0].shape == without.shape == (2, 64, 64, 3)
    assert not torch.equal(drawn["result"][0], without) and len(drawn["ui"]["images"]) == 2
    with pytest.raises(UserError, match="1 to 64 prompts"):
        run("I2LDraw", lora_name="none", **{**lines, "prompt": " \n"})


# a LoRA on a model


class Model:
    """ComfyUI's model around a transformer: the calls of both branches in one batch."""

    def __init__(self):
        self.diffusion_model = qwen()

    def apply_model(self, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs):
        return self.diffusion_model(**qwen_inputs(len(x)))[0]


@pytest.fixture
def patcher(comfy):
    from comfy.model_patcher import ModelPatcher

    return ModelPatcher(Model())


@pytest.fixture
def saved(loras):
    """A LoRA of the miniature in a file, by key format."""

    def save(key_format="webui", seed=1, name=None):
        name = name or f"random-{key_format}-{seed}.safetensors"
        lora_of(MINI, seed=seed).save(loras / name, key_format, overwrite=True)
        return name

    return save


def load(patcher, name, strength=1.0, branch="both", **more):
    return run("I2LLoad", model=patcher, lora_name=name, strength=strength, branch=branch, **more)[0]


def predict(patcher, parts=(1, 0), size=1, rows=None):
    from comfy.model_patcher import call

    options = {"cond_or_uncond": list(parts), "sigmas": torch.ones(size)}
    return call(patcher, torch.zeros(rows or size * len(parts), 1), torch.ones(1), None, None, None, options)


def test_on_both_branches_it_is_comfyuis_own_loader(patcher, saved):
    patched, lora = load(patcher, saved(), 0.5), lora_of(MINI)
    assert set(patched.patches) == set(lora) and not patcher.patches
    for path, [(strength, delta)] in patched.patches.items():
        assert strength == 0.5 and torch.allclose(delta, lora.delta(path), atol=1e-5)


@pytest.mark.parametrize(("adapter", "header", "scale"), [(".style", {}, 1), ("", {"r": 4, "lora_alpha": 2}, 0.5)])
def test_a_file_that_comfyui_misreads_is_given_to_it_in_keys_that_it_reads(patcher, loras, adapter, header, scale):
    """An adapter's name that it does not know, and a scale that stands in the header alone."""
    lora, tensors = lora_of(MINI), {}
    for path in lora:
        down, up = lora[path]
        tensors[f"transformer.{path}.lora_A{adapter}.weight"] = down
        tensors[f"transformer.{path}.lora_B{adapter}.weight"] = up
    told = {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in header.items()})}
    save_file(tensors, loras / "misread.safetensors", told if header else None)
    patched = load(patcher, "misread.safetensors")
    assert set(patched.patches) == set(lora)
    for path, [(_, delta)] in patched.patches.items():
        assert torch.allclose(delta, scale * lora.delta(path), atol=1e-5)


def test_strength_0_is_the_model_itself(patcher, saved):
    assert load(patcher, saved(), 0.0) is patcher


@pytest.mark.parametrize(("parts", "size"), [((1, 0), 1), ((0, 1), 2), ((1, 0, 0), 1), ((0,), 2), ((1,), 2)])
def test_on_the_positive_branch_alone(patcher, saved, parts, size):
    """Rows of the positive branch are those of a merged model, the others those of the model without."""
    lora, model = lora_of(MINI), patcher.model.diffusion_model
    inputs = qwen_inputs(size * len(parts))
    with_it, without = merged(model, (lora, 0.8))(**inputs)[0], model(**inputs)[0]
    got = predict(load(patcher, saved(), 0.8, "positive only"), parts, size)
    for row in range(len(got)):
        wanted = with_it if parts[row // size] == 0 else without
        assert torch.allclose(got[row], wanted[row], atol=1e-4)
    assert torch.equal(model(**inputs)[0], without), "nothing is left on the model"


def test_grey_on_the_negative_branch_and_loras_one_after_the_other(patcher, saved):
    one, grey = saved(seed=1), saved(seed=2)
    first, second, model = lora_of(MINI, seed=1), lora_of(MINI, seed=2), patcher.model.diffusion_model
    inputs = qwen_inputs(2)
    got = predict(load(patcher, one, 1.0, "positive, grey on the negative", grey_lora=grey))
    assert torch.allclose(got[1], merged(model, (first, 1.0))(**inputs)[0][1], atol=1e-4)
    assert torch.allclose(got[0], merged(model, (second, 1.0))(**inputs)[0][0], atol=1e-4)
    chain = load(load(patcher, one, 0.5, "positive only"), grey, -0.5, "positive only")
    assert torch.allclose(predict(chain)[1], merged(model, (first, 0.5), (second, -0.5))(**inputs)[0][1], atol=1e-4)
    with pytest.raises(UserError, match="made from a grey picture"):
        load(patcher, one, 1.0, "positive, grey on the negative")


@pytest.mark.parametrize("branch", ["both", "positive only"])
def test_a_lora_of_another_model_is_refused(patcher, loras, branch):
    other = lora_of(i2l_ext.converters.architectures.Z_IMAGE, rank=1, paths=["layers.0.attention.to_q"])
    other.save(loras / "z.safetensors", overwrite=True)
    with pytest.raises(UserError, match=r"z\.safetensors: a LoRA of Z-Image"):
        load(patcher, "z.safetensors", 1.0, branch)


def test_another_file_under_the_same_name_is_loaded_anew(patcher, saved, loras):
    name = saved(name="same.safetensors")
    before = load_node.LoadI2LLora.IS_CHANGED(lora_name=name, strength=1.0)
    time.sleep(0.02)
    saved(seed=3, name="same.safetensors")
    assert load_node.LoadI2LLora.IS_CHANGED(lora_name=name, strength=1.0) != before
    assert load_node.LoadI2LLora.IS_CHANGED(lora_name=None) == " "


# one engine on a machine


def test_two_programs_run_their_engines_one_after_the_other(comfy, tmp_path):
    """The second is another process: here its lock."""
    from i2l_ext.engine.locks import Lock
    from i2l_ext.engine.turns import lock_path

    other = Lock(lock_path())
    assert other.acquire()
    queue = host.comfy_service().queue
    job = ask("note")()
    time.sleep(1)
    assert job.state == "waiting" and host.progress_line(job) == "waiting for another job"
    quick = queue.submit("models", "", {})
    assert queue.wait(quick.id, 60).state == "done", "what takes a moment does not wait"
    other.release()
    assert queue.wait(job.id, 60).state == "done"


def test_a_job_that_waits_for_another_program_can_be_cancelled(comfy):
    from i2l_ext.engine.locks import Lock
    from i2l_ext.engine.turns import lock_path

    other, queue = Lock(lock_path()), host.comfy_service().queue
    end = time.monotonic() + 20
    while not other.acquire():  # the job of the test before is done a moment before its turn is over
        assert time.monotonic() < end
        time.sleep(0.05)
    try:
        job = ask("note")()
        time.sleep(0.3)
        assert queue.cancel(job.id) and queue.wait(job.id, 2).state == "cancelled"
    finally:
        other.release()
    assert queue.wait(ask("note")().id, 60).state == "done"


def test_where_the_disk_has_no_locks_nobody_waits(comfy, monkeypatch):
    from i2l_ext.engine import turns

    monkeypatch.setattr(turns.Lock, "acquire", lambda lock: False)
    start = time.monotonic()
    with turns.machines_turn(lambda: True):
        pass
    assert time.monotonic() - start < 1


@pytest.mark.skipif(os.name != "posix", reason="links and owners of POSIX")
def test_another_user_keeps_nobody_waiting(comfy, tmp_path, monkeypatch):
    """What he lays where our lock would be is not opened, and its folder is not used."""
    from i2l_ext.engine import turns

    monkeypatch.delenv(turns.VARIABLE, raising=False)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    (tmp_path / "his").mkdir()
    (tmp_path / f"i2l-{os.getuid()}").symlink_to(tmp_path / "his")
    (tmp_path / f"i2l-engine-{os.getuid()}.lock").mkdir()  # the lock lay there once, in a folder that is everybody's
    with turns.machines_turn(lambda: pytest.fail("waited")):
        pass
    assert list((tmp_path / "his").iterdir()) == []


def test_the_command_line_in_custom_nodes_finds_comfyuis_folders(tmp_path, monkeypatch):
    from i2l_ext.library.folder import find_lora_folder
    from i2l_ext.models import store

    checkout, models = tmp_path / "custom_nodes" / "image-to-lora", tmp_path / "models"
    models.mkdir()
    assert find_lora_folder(checkout) == models / "loras"
    monkeypatch.setattr(store, "PACKAGE", checkout / "i2l_ext")
    assert list(store._webui_models()) == [models / "i2l", models]
