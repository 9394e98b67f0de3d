"""Our decoder against the authors' classes, on random weights of the real widths with few blocks."""

import threading
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from i2l_ext.converters.architectures import QWEN_IMAGE, Z_IMAGE
from i2l_ext.converters.errors import UserError
from i2l_ext.converters.files import TensorFile
from i2l_ext.converters.lora import Lora, concatenate
from i2l_ext.decoder import DecoderSpec, ResidualSpec
from i2l_ext.decoder.decode import Decoder
from i2l_ext.decoder.spec import spec_of
from i2l_ext.models import catalogue
from peers import diffsynth

EMBED = 5632


def shallow(arch, depth=1):
    return replace(arch, stacks=tuple(replace(stack, depth=depth) for stack in arch.stacks))


def z_image_peer():
    """The Z-Image class with one block a stack; its depths are fixed in its constructor."""
    module = diffsynth("models.z_image_image2lora")
    component = module.ZImageImage2LoRAComponent

    class Shallow(component):
        def __init__(self, **config):
            super().__init__(**(config | {"num_blocks": 1}))

    module.ZImageImage2LoRAComponent = Shallow
    try:
        return module.ZImageImage2LoRAModel(compress_dim=128)
    finally:
        module.ZImageImage2LoRAComponent = component


def qwen_peer(**config):
    return diffsynth("models.qwen_image_image2lora").QwenImageImage2LoRAModel(num_blocks=1, **config)


def compressed_peer(embed=EMBED, rank=32):
    """Of the real class, the first block of each stack: it has no argument for its depths."""
    module = diffsynth("models.z_image_image2lora")
    peer, one = torch.nn.Module.__new__(module.ZImageImage2LoRAModelCompressed), module.ImageEmb2LoRAWeightCompressed
    torch.nn.Module.__init__(peer)
    spec = DecoderSpec(shallow(Z_IMAGE), embed, 0, rank, kind="compressed")
    made = {path.replace(".", "___"): one(*head.module.shape[::-1], embed, rank) for path, head in spec.heads.items()}
    peer.module_dict = torch.nn.ModuleDict(made)
    return peer


CASES = {
    "style": (
        DecoderSpec(shallow(QWEN_IMAGE), EMBED, 64),
        lambda: qwen_peer(use_residual=False, compress_dim=64),
    ),
    "coarse": (
        DecoderSpec(shallow(QWEN_IMAGE), EMBED, 128, residual=ResidualSpec(71, 3584, 1024)),
        lambda: qwen_peer(use_residual=True, compress_dim=128, residual_length=71, residual_mid_dim=1024),
    ),
    "fine": (
        DecoderSpec(shallow(QWEN_IMAGE), EMBED, 128, residual=ResidualSpec(1376, 3584, 64)),
        lambda: qwen_peer(use_residual=True, compress_dim=128, residual_length=37 * 37 + 7, residual_mid_dim=64),
    ),
    "z-image": (DecoderSpec(shallow(Z_IMAGE), EMBED, 128), z_image_peer),
    "compressed": (DecoderSpec(shallow(Z_IMAGE), EMBED, 0, 32, kind="compressed"), compressed_peer),
}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@pytest.fixture(scope="module", params=[(name, dtype) for name in CASES for dtype in TOLERANCE], ids=str)
def case(request, tmp_path_factory):
    name, dtype = request.param
    spec, build = CASES[name]
    torch.manual_seed(0)
    peer = build().to(dtype)
    path = tmp_path_factory.mktemp(name) / "heads.safetensors"
    save_file(peer.state_dict(), path)
    yield spec, peer, dtype, path
    path.unlink()  # half a gigabyte


def close(ours, theirs, tolerance):
    """Relative in the norm: single bf16 numbers may differ by their last digit where sums run in another order."""
    return (ours.float() - theirs.float()).norm() <= tolerance * theirs.float().norm()


@pytest.mark.parametrize("count", [1, 3])
def test_decoder_and_merge_agree_with_the_authors(case, count):
    spec, peer, dtype, path = case
    torch.manual_seed(count)
    x = torch.randn(count, 1, EMBED).to(dtype)
    residual = torch.randn(count, spec.residual.length, spec.residual.dim).to(dtype) if spec.residual else None
    with torch.no_grad():
        parts = [
            peer(x[i], residual=None if residual is None else residual[i : i + 1].flatten(1)) for i in range(count)
        ]
    theirs = diffsynth("utils.lora.merge").merge_lora(parts, alpha=1 / count)

    with Decoder(path, spec) as decoder:
        ours = decoder.lora(x.flatten(1), [1 / count] * count, residual)
        assert {f"{path}.lora_{ab}.default.weight" for path in ours for ab in "AB"} == set(theirs)
        for path in ours:
            down, up = ours[path]
            assert down.dtype == up.dtype == dtype
            assert close(down, theirs[f"{path}.lora_A.default.weight"], TOLERANCE[dtype])
            assert close(up, theirs[f"{path}.lora_B.default.weight"], TOLERANCE[dtype])


def save_aligned(tensors, path):
    for padding in range(0, 64, 8):  # a header's length is a multiple of 8
        save_file(tensors, path, {"padding": " " * padding})
        if (8 + int.from_bytes(path.read_bytes()[:8], "little")) % 64 == 0:
            return
    raise AssertionError("no header of the right length")


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_compressed_heads_are_the_authors_bit_for_bit(tmp_path, dtype):
    """Some processors add in another order where a matrix lies at an odd place in memory. So the file's data begin at a
    multiple of 64 bytes, as the authors' own tensors do."""
    torch.manual_seed(0)
    peer = compressed_peer(embed=48, rank=8).to(dtype)
    save_aligned(peer.state_dict(), tmp_path / "heads.safetensors")
    x = torch.randn(1, 48).to(dtype)
    with (
        torch.no_grad(),
        Decoder(tmp_path / "heads.safetensors", DecoderSpec(shallow(Z_IMAGE), 48, 0, 8, kind="compressed")) as decoder,
    ):
        theirs, ours = peer(x), decoder.lora(x, [1])
        assert len(theirs) == 2 * len(ours)
        for path in ours:
            for factor, side in zip(ours[path], "AB", strict=True):
                assert torch.equal(factor, theirs[f"{path}.lora_{side}.default.weight"])


def test_the_compressed_class_has_our_structure():
    with torch.device("meta"):
        peer = diffsynth("models.z_image_image2lora").ZImageImage2LoRAModelCompressed()
    shapes = {key: tuple(tensor.shape) for key, tensor in peer.state_dict().items()}
    assert spec_of(shapes) == DecoderSpec(Z_IMAGE, EMBED, 0, 32, kind="compressed")


@pytest.mark.parametrize("part", [p for m in catalogue.MODELS.values() for p in m.parts if p.kind == "heads"])
def test_heads_are_recognised_by_their_keys(part):
    assert spec_of(part.spec.shapes) == part.spec
    first = next(iter(part.spec.shapes))
    assert spec_of({key: shape for key, shape in part.spec.shapes.items() if key != first}) is None
    assert spec_of(part.spec.shapes | {"more": (1,)}) is None


def test_modules_may_be_asked_for_in_any_order(tmp_path):
    spec = DecoderSpec(shallow(QWEN_IMAGE, depth=3), 8, 2)
    save_file({key: torch.randn(shape) for key, shape in spec.shapes.items()}, tmp_path / "heads.safetensors")
    with Decoder(tmp_path / "heads.safetensors", spec) as decoder:
        x = torch.randn(2, 8)
        one, other = decoder.lora(x, [0.5, 0.5]), decoder.lora(x, [0.5, 0.5])
        straight = {path: one[path] for path in one}
        for path in [*reversed(list(other)), *other]:
            for ours, theirs in zip(other[path], straight[path], strict=True):
                assert torch.equal(ours, theirs)


@pytest.mark.parametrize("fp8", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize(("kind", "residual"), [("direct", ResidualSpec(3, 5, 2)), ("direct", None), ("core", None)])
def test_fp8_heads_are_computed_in_bf16(tmp_path, fp8, kind, residual):
    spec = DecoderSpec(shallow(QWEN_IMAGE), 8, 2, residual=residual, kind=kind)
    stored = {key: torch.randn(shape).to(fp8) for key, shape in spec.shapes.items()}
    x, tokens = torch.randn(2, 8), torch.randn(2, 3, 5)

    def made(tensors):
        path = tmp_path / "heads.safetensors"
        save_file(tensors, path)
        with Decoder(path, spec) as decoder:
            lora = decoder.lora(x, [0.5, 0.5], tokens if residual else None)
            assert {spec.dtype for spec in lora.specs.values()} == {"BF16"}
            return [factor for path in lora for factor in lora[path]]

    widened = made({key: tensor.bfloat16() for key, tensor in stored.items()})
    for ours, theirs in zip(made(stored), widened, strict=True):
        assert ours.dtype == torch.bfloat16 and torch.equal(ours, theirs)


@pytest.mark.parametrize("at", [0, -1])
def test_heads_of_whole_numbers_are_refused(tmp_path, monkeypatch, at):
    spec, closed, close = DecoderSpec(shallow(Z_IMAGE), 8, 2), [], TensorFile.close
    monkeypatch.setattr(TensorFile, "close", lambda self: (closed.append(self.path), close(self)))
    tensors = {key: torch.zeros(shape) for key, shape in spec.shapes.items()}
    key = list(tensors)[at]
    save_file(tensors | {key: tensors[key].to(torch.int8)}, tmp_path / "heads.safetensors")
    with pytest.raises(UserError, match=f"{key}' holds I8, not floats"):
        Decoder(tmp_path / "heads.safetensors", spec)
    assert closed == [tmp_path / "heads.safetensors"]


def test_heads_are_used_on_the_processor_whatever_torchs_own_device_is(tmp_path):
    spec = DecoderSpec(shallow(QWEN_IMAGE), 8, 2, residual=ResidualSpec(3, 5, 2))
    save_file({key: torch.randn(shape) for key, shape in spec.shapes.items()}, tmp_path / "heads.safetensors")
    x, residual = torch.randn(2, 8), torch.randn(2, 3, 5)

    def made(device):
        torch.set_default_device(device)
        try:
            with Decoder(tmp_path / "heads.safetensors", spec) as decoder:
                lora = decoder.lora(x, [0.5, 0.5], residual)
                return [factor for path in lora for factor in lora[path]]
        finally:
            torch.set_default_device(None)

    for ours, plain in zip(made("meta"), made("cpu"), strict=True):
        assert ours.device.type == "cpu" and torch.equal(ours, plain)


def test_the_decoder_leaves_torchs_threads_alone(tmp_path):
    spec = DecoderSpec(shallow(QWEN_IMAGE, depth=1), 8, 2)
    save_file({key: torch.randn(shape) for key, shape in spec.shapes.items()}, tmp_path / "heads.safetensors")
    counts, before = [], torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with Decoder(tmp_path / "heads.safetensors", spec) as decoder:
            lora = decoder.lora(torch.randn(2, 8), [0.5, 0.5])
            assert len([lora[path] for path in lora]) == 12
            decoder.workers.pool.submit(lambda: counts.append(torch.get_num_threads())).result()
        thread = threading.Thread(target=lambda: counts.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert counts == [1, 3] and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("i2l-decode")]


def test_experts_and_bias_are_joined_as_the_authors_do(tmp_path):
    """Coarse and Fine side by side at 1/N, the bias behind them at weight 1."""
    merge = diffsynth("utils.lora.merge").merge_lora
    arch = shallow(QWEN_IMAGE)

    def part(rank, seed):
        generator = torch.Generator().manual_seed(seed)
        return {
            path: (
                torch.randn(rank, m.shape[1], generator=generator),
                torch.randn(m.shape[0], rank, generator=generator),
            )
            for path, m in arch.i2l_modules.items()
        }

    def named(modules):
        return {
            f"{path}.lora_{ab}.default.weight": tensor
            for path, pair in modules.items()
            for ab, tensor in zip("AB", pair, strict=True)
        }

    experts, bias = [part(4, seed) for seed in range(4)], part(2, 9)
    theirs = merge([merge([named(e) for e in experts], alpha=1 / 2), named(bias)])
    ours = concatenate([Lora.of(arch, m) for m in (*experts, bias)], [1 / 2] * 4 + [1])
    for path in ours:
        assert torch.equal(ours[path][0], theirs[f"{path}.lora_A.default.weight"])
        assert torch.equal(ours[path][1], theirs[f"{path}.lora_B.default.weight"])


@pytest.mark.parametrize(
    "part", [p for m in catalogue.MODELS.values() for p in m.parts if p.kind == "heads" and p.repo]
)
def test_the_published_structure(part):
    from math import prod

    from i2l_ext.weights.structure import structure_md5

    assert structure_md5(part.shapes) == part.structure_md5
    assert sum(map(prod, part.shapes.values())) == part.parameters


def test_a_missing_or_misshapen_tensor_is_named(tmp_path):
    spec = DecoderSpec(shallow(Z_IMAGE), 8, 2)
    tensors = {key: torch.zeros(shape) for key, shape in spec.shapes.items()}
    key = "layers_lora.blocks.1.layers.2.proj_b.proj_out.weight"

    def found(changed):
        save_file(changed, tmp_path / "heads.safetensors")
        Decoder(tmp_path / "heads.safetensors", spec).close()

    found(tensors)
    with pytest.raises(UserError, match=f"{key}.*missing"):
        found({name: tensor for name, tensor in tensors.items() if name != key})
    with pytest.raises(UserError, match=rf"{key}.*shape \[3, 2\]"):
        found(tensors | {key: torch.zeros(3, 2)})
    with pytest.raises(UserError, match="unknown tensor 'more'"):
        found(tensors | {"more": torch.zeros(1)})
