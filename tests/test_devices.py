"""In which dtype an encoder is computed: by the device, by what the encoder bears, and by what the user wishes."""

import json
from types import SimpleNamespace

import pytest
import torch

from i2l_ext.commands.main import main
from i2l_ext.converters.errors import UserError
from i2l_ext.encoders import dims, dinov3, qwen_vl, siglip2
from i2l_ext.operations import Context, perform
from i2l_ext.operations.compute import compute_options
from i2l_ext.requests import DoctorRequest, EngineOptions
from i2l_ext.weights import devices
from i2l_ext.weights.devices import Device, choose_dtype

CPU, OLD_CPU = Device("cpu", "cpu"), Device("cpu", "cpu", quick_bf16=False)
HOPPER, AMPERE, TURING, PASCAL = (
    Device("cuda", name, capability)
    for name, capability in (("H100", (9, 0)), ("A100", (8, 0)), ("RTX 2080", (7, 5)), ("GTX 1080", (6, 1)))
)
MAC, OLD_MAC = Device("mps", "mps"), Device("mps", "mps", bf16=False)
SIGLIP, DINOV3, QWEN = (one.safe_dtypes for one in (dims.SIGLIP2_G384, dims.DINOV3_7B, dims.QWEN25_VL_7B))
BF16, FP16, FP32 = "bfloat16", "float16", "float32"


@pytest.mark.parametrize(
    ("device", "safe", "wish", "dtype", "why"),
    [
        (CPU, SIGLIP, "auto", BF16, "as published"),
        (CPU, QWEN, "auto", BF16, "as published"),
        (CPU, QWEN, FP32, FP32, "as asked"),
        (CPU, SIGLIP, FP16, FP16, "as asked; slow, as the device has none of its own"),
        (OLD_CPU, SIGLIP, "auto", FP32, "the device has no bf16 of its own; the device has no fp16 of its own"),
        (OLD_CPU, QWEN, "auto", FP32, "the device has no bf16 of its own; fp16 is not safe for it"),
        (OLD_CPU, DINOV3, BF16, BF16, "as asked; slow, as the device has none of its own"),
        (CPU, (FP16, FP32), "auto", FP32, "bf16 is not safe for it; the device has no fp16 of its own"),
        (HOPPER, DINOV3, "auto", BF16, "as published"),
        (AMPERE, QWEN, "auto", BF16, "as published"),
        (AMPERE, SIGLIP, FP16, FP16, "as asked"),
        (AMPERE, QWEN, FP16, BF16, "fp16 was asked for, but is not safe for it"),
        (TURING, SIGLIP, "auto", FP16, "the device has no bf16 of its own"),
        (TURING, DINOV3, "auto", FP32, "the device has no bf16 of its own; fp16 is not safe for it"),
        (TURING, QWEN, "auto", FP32, "the device has no bf16 of its own; fp16 is not safe for it"),
        (TURING, QWEN, FP16, FP32, "fp16 was asked for, but is not safe for it"),
        (TURING, QWEN, BF16, BF16, "as asked; slow, as the device has none of its own"),
        (PASCAL, SIGLIP, FP32, FP32, "as asked"),
        (PASCAL, QWEN, "auto", FP32, "the device has no bf16 of its own; fp16 is not safe for it"),
        (MAC, QWEN, "auto", BF16, "as published"),
        (OLD_MAC, SIGLIP, "auto", FP16, "the device has no bf16 of its own"),
        (OLD_MAC, QWEN, "auto", FP32, "the device has no bf16 of its own; fp16 is not safe for it"),
        (OLD_MAC, QWEN, BF16, FP32, "bf16 was asked for, but the device has none"),
    ],
)
def test_the_choice(device, safe, wish, dtype, why):
    assert choose_dtype(device, safe, wish) == devices.DtypeChoice(dtype, why)


QUICK = devices._products_of_bf16_are_quick
"""As it is before the tests have their way (conftest.py)."""


def test_facts_of_devices(monkeypatch):
    card = SimpleNamespace(name="RTX 2080", total_memory=8_589_934_592, major=7, minor=5)
    monkeypatch.setattr(torch.cuda, "get_device_properties", {"cuda:1": card}.__getitem__)
    monkeypatch.setattr(devices, "_products_of_bf16_are_quick", QUICK)
    for quick, processor in ((True, CPU), (False, OLD_CPU)):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda quick=quick: quick)
        assert devices.device_facts("cpu") == processor
    monkeypatch.delattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported")
    monkeypatch.setattr(type(torch.ops.mkldnn), "__getattr__", _has_none)
    assert devices.device_facts("cpu") == CPU, "a build that cannot tell"
    found = devices.device_facts("cuda:1")
    assert (found.kind, found.capability) == ("cuda", (7, 5))
    assert str(found) == "cuda:1: RTX 2080, 8.6 GB (compute capability 7.5)"
    if not torch.backends.mps.is_available():
        assert not devices.device_facts("mps").bf16  # torch refuses


def _has_none(namespace, name):
    raise AttributeError(name)


@pytest.fixture
def on(monkeypatch):
    """Have the processor taken for another device."""
    return lambda device: monkeypatch.setattr(devices, "device_facts", lambda name: device)


@pytest.fixture
def computed(monkeypatch):
    """In which dtype each encoder was computed."""
    seen = {}

    def spy(room):
        plain = room.encode

        def encode(paths, dims, batches, options, callbacks):
            seen[room.__name__.rpartition(".")[2]] = options.dtype
            return plain(paths, dims, batches, options, callbacks)

        return encode

    for room in (siglip2, dinov3, qwen_vl):
        monkeypatch.setattr(room, "encode", spy(room))
    return seen


def make(world, tmp_path, *arguments):
    pictures = [str(world.pictures[0]), "--lora-dir", str(tmp_path / "Lora"), "--name", "it", "--overwrite"]
    return main(["make", *pictures, "--model", "small-all", *arguments])


@pytest.mark.parametrize(
    ("device", "dtypes"), [(CPU, (BF16, BF16, BF16)), (AMPERE, (BF16, BF16, BF16)), (TURING, (FP16, FP32, FP32))]
)
def test_each_encoder_is_computed_in_what_suits_it(world, tmp_path, on, computed, device, dtypes):
    on(device)
    assert make(world, tmp_path) == 0
    assert computed == dict(zip(("siglip2", "dinov3", "qwen_vl"), dtypes, strict=True))


def test_an_embedding_is_kept_for_its_dtype_alone(world, tmp_path, on, computed):
    make(world, tmp_path)
    on(TURING)
    computed.clear()
    make(world, tmp_path)
    assert len(computed) == 3
    computed.clear()
    make(world, tmp_path)
    assert not computed


def test_a_wish_that_an_encoder_does_not_bear_is_told_and_not_fulfilled(world, tmp_path, computed, capsys):
    assert make(world, tmp_path, "--precision", "fp16") == 0
    assert computed == {"siglip2": FP16, "dinov3": BF16, "qwen_vl": BF16}
    said = [line for line in capsys.readouterr().err.splitlines() if "fp16" in line]
    assert said == [
        f"i2l: small-{name} is computed in bf16: fp16 was asked for, but is not safe for it."
        for name in ("dinov3", "qwen")
    ]
    assert make(world, tmp_path, "--precision", "fp32") == 0
    assert set(computed.values()) == {FP32} and "asked for" not in capsys.readouterr().err


@pytest.mark.parametrize(("precision", "mend"), [("bf16", "--precision fp32"), ("fp32", "i2l models verify")])
def test_an_embedding_that_is_not_finite_is_neither_used_nor_kept(
    world, tmp_path, monkeypatch, capsys, precision, mend
):
    plain = siglip2.encode
    monkeypatch.setattr(siglip2, "encode", lambda *given: [found * float("inf") for found in plain(*given)])
    assert make(world, tmp_path, "--precision", precision) == 1
    said = capsys.readouterr().err
    assert f"small-siglip2: in {precision} its embedding" in said and mend in said and said.count("\n") == 1
    assert not list(tmp_path.rglob("*.safetensors"))


def found_by_doctor(**options):
    return perform(DoctorRequest(), Context(EngineOptions(**options))).facts


def test_the_bug_report_tells_what_is_computed_how(on, capsys):
    on(TURING)
    facts = found_by_doctor()
    assert facts["computes on"] == "RTX 2080 (compute capability 7.5)"
    assert facts["computes siglip2-g384 in"].startswith("fp16: the device has no bf16")
    assert facts["computes dinov3-7b in"].startswith("fp32: ")
    assert facts["computes qwen2.5-vl-7b in"].endswith("fp16 is not safe for it")
    assert found_by_doctor(precision="bf16")["computes dinov3-7b in"].startswith("bf16: as asked")
    assert "There is no device" in found_by_doctor(device="toaster")["computes on"]
    assert main(["doctor", "--json"]) == 0
    assert "computes on" in json.loads(capsys.readouterr().out)


def test_the_settings_choose(tmp_path):
    pytest.importorskip("gradio")
    from i2l_ext.service.service import Service
    from i2l_ext.webui.hosts.standalone import StandaloneHost

    host = StandaloneHost(tmp_path / "state", lora_folder=tmp_path / "Lora")
    host.settings_file.write({"i2l_precision": "fp32"})
    service = Service(host, tmp_path / "state", ["true"])
    try:
        asked = service.doctor().message
    finally:
        service.queue.close()
    options = EngineOptions.from_json(asked["options"])
    assert compute_options(options).dtype == FP32
    assert compute_options(EngineOptions()).dtype == "auto"
    assert "fp32: as asked" in perform(DoctorRequest(), Context(options)).text
    with pytest.raises(UserError, match="no precision 'fp8'"):
        compute_options(EngineOptions(precision="fp8"))
