"""Linear layers that multiply by what their file has: the same results, and no wide matrix."""

from __future__ import annotations

from contextlib import closing

import pytest
import torch
from torch import nn

from i2l_ext.weights import stored
from i2l_ext.weights.compute import ComputeOptions
from i2l_ext.weights.files import TensorFiles
from i2l_ext.weights.packing import PACK_FORMATS
from i2l_ext.weights.stored import StoredTensor, StoredWeights
from i2l_ext.weights.stream import stream, stream_stored
from small_encoders import relative, save, weights
from test_packing import packed_file

WIDTH, HEIGHT, PIECE = 64, 21, 5 * 64
SHAPES = {
    "first.weight": (HEIGHT, WIDTH),
    "first.bias": (HEIGHT,),
    "norm.weight": (HEIGHT,),
    "last.weight": (64, HEIGHT),
}
NAMES = {name: name for name in SHAPES}


class Part(nn.Module):
    """A layer with and one without a bias, and a vector between them."""

    def __init__(self):
        super().__init__()
        with torch.device("meta"):
            self.first = nn.Linear(WIDTH, HEIGHT)
            self.norm = nn.RMSNorm(HEIGHT)
            self.last = nn.Linear(HEIGHT, 64, bias=False)
        self.requires_grad_(False)

    def forward(self, x):
        return self.last(self.norm(self.first(x)))


@pytest.fixture(params=["float16", "bfloat16", "float8_e4m3fn", "float32", *PACK_FORMATS])
def path(request, tmp_path):
    """A file in each dtype, and packed ones."""
    kind = request.param
    dtype = torch.bfloat16 if kind in PACK_FORMATS else getattr(torch, kind)
    plain = save(tmp_path / "model.safetensors", weights(SHAPES), dtype)
    return packed_file(plain, kind) if kind in PACK_FORMATS else plain


def run(path, x, dtype, asked):
    """The part, what it makes of x, and the names of the weights that it has in memory."""
    part = Part()
    with TensorFiles([path]) as files, closing(asked(files, dtype)) as groups, torch.no_grad():
        for group in groups:
            if asked is as_stored:
                with closing(StoredWeights(dtype)) as given, given.given_to(part, group):
                    found = part(x), {name for name, weight in part.named_parameters() if not weight.is_meta}
            else:
                part.load_state_dict(group, assign=True)
                found = part(x), set(NAMES)
    return part, *found


def as_stored(files, dtype):
    return stream_stored(files, [NAMES])


def wide(files, dtype):
    return stream(files, [NAMES], ComputeOptions(dtype=str(dtype).removeprefix("torch.")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_result_is_that_of_wide_matrices(path, dtype, monkeypatch):
    """Of several pieces, the last one smaller; for one token and for batches of them."""
    monkeypatch.setattr(stored, "PIECE", PIECE)
    for shape in ((WIDTH,), (3, 5, WIDTH)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        part, found, _ = run(path, x, dtype, as_stored)
        _, expected, _ = run(path, x, dtype, wide)
        assert found.shape == expected.shape and found.dtype == dtype
        assert relative(found.float(), expected.float()) < (1e-6 if dtype == torch.float32 else 1e-2)
        assert all(weight.is_meta for weight in part.parameters()), "its memory is used again"
        assert "forward" not in vars(part.first) and "forward" not in vars(part.last)


def test_a_matrix_is_never_wide(path, monkeypatch):
    monkeypatch.setattr(stored, "PIECE", PIECE)
    filled, plain = [], StoredTensor.fill
    monkeypatch.setattr(
        StoredTensor, "fill", lambda self, out, first=0: (filled.append(len(out)), plain(self, out, first))
    )
    _, _, held = run(path, torch.randn(2, WIDTH), torch.float32, as_stored)
    if path.name == "model.safetensors" and not filled:  # float32: the bytes are the numbers
        assert held == set(NAMES)
        return
    assert held == {"first.bias", "norm.weight"}
    assert sum(filled) == WIDTH * HEIGHT + 64 * HEIGHT + 2 * HEIGHT
    assert max(filled) <= PIECE


def test_bytes_at_odd_places(tmp_path):
    """A header of an odd length, as other programs write."""
    tensors = weights(SHAPES)
    path = save(tmp_path / "model.safetensors", tensors, torch.bfloat16)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    path.write_bytes((length + 1).to_bytes(8, "little") + data[8 : 8 + length] + b" " + data[8 + length :])
    x = torch.randn(2, WIDTH)
    for dtype in (torch.float32, torch.bfloat16):
        _, found, _ = run(path, x.to(dtype), dtype, as_stored)
        first = (x.to(dtype) @ tensors["first.weight"].bfloat16().to(dtype).T) + tensors["first.bias"].bfloat16().to(
            dtype
        )
        normed = nn.functional.rms_norm(first, (HEIGHT,), tensors["norm.weight"].bfloat16().to(dtype))
        assert relative(found.float(), (normed @ tensors["last.weight"].bfloat16().to(dtype).T).float()) < 1e-2
