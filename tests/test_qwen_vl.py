"""Qwen2.5-VL: patches, order, places and prompt against transformers; the features against its whole-model forward."""

from __future__ import annotations

import base64
import copy
import inspect
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from i2l_ext.converters.errors import UserError
from i2l_ext.encoders import qwen_view, qwen_vl
from i2l_ext.encoders.dims import QWEN25_VL_7B, QWEN_IMAGE_EDIT
from i2l_ext.encoders.keys import file_key
from i2l_ext.weights.compute import ComputeOptions
from small_encoders import QWEN_VL, relative, save, weights

FP32 = ComputeOptions(dtype="float32")
BF16 = ComputeOptions(dtype="bfloat16")

SYSTEM = (
    "Describe the key features of the input image (color, shape, size, texture, objects, background), then explain "
    "how the user's text instruction should alter or modify the image. Generate a new image that meets the user's "
    "requirements while maintaining consistency with the original input where appropriate."
)
PROMPT = (
    f"<|im_start|>system\n{SYSTEM}<|im_end|>\n"
    "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|><|im_end|>\n<|im_start|>assistant\n"
)
SPECIAL = {
    "<|im_start|>": 151644,
    "<|im_end|>": 151645,
    "<|vision_start|>": 151652,
    "<|vision_end|>": 151653,
    "<|image_pad|>": 151655,
}


def noise(side, seed=0):
    """A picture with smooth parts and hard edges."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((side, side))
    return Image.fromarray((np.asarray(coarse) // 2 + random.integers(0, 128, (side, side, 3))).astype(np.uint8))


def pillow():
    """transformers' module of the image processor on Pillow, and that processor's class."""
    name = "transformers.models.qwen2_vl.image_processing_"
    if find_spec(f"{name}pil_qwen2_vl"):  # transformers 5
        module = import_module(f"{name}pil_qwen2_vl")
        return module, module.Qwen2VLImageProcessorPil
    module = import_module(f"{name}qwen2_vl")
    return module, module.Qwen2VLImageProcessor


@pytest.mark.parametrize(("side", "grid"), [(224, 8), (1024, 37), (150, 5), (56, 2), (1036, 37)])
def test_patches_are_those_of_the_pillow_processor(side, grid):
    image = noise(side)
    _, processor = pillow()
    theirs = processor(min_pixels=56 * 56, max_pixels=28 * 28 * 16384)(images=[image], return_tensors="np")
    ours = qwen_view.patches(image, QWEN25_VL_7B)
    assert theirs["image_grid_thw"].tolist() == [[1, 2 * grid, 2 * grid]]
    assert QWEN25_VL_7B.grid(side) == grid
    assert ours.dtype == np.float32 and ours.shape == theirs["pixel_values"].shape
    np.testing.assert_array_equal(ours, theirs["pixel_values"])


def test_grid_rounds_as_smart_resize():
    module, _ = pillow()
    for side in range(56, 3585, 7):
        size = module.smart_resize(side, side, factor=28, min_pixels=56 * 56, max_pixels=28 * 28 * 16384)
        assert size == (28 * QWEN25_VL_7B.grid(side),) * 2


def test_a_view_is_square():
    with pytest.raises(ValueError, match="square"):
        qwen_view.patches(Image.new("RGB", (56, 84)), QWEN25_VL_7B)


def test_tokens_kept_of_the_real_views():
    assert (QWEN25_VL_7B.tokens(224), QWEN25_VL_7B.tokens(1024)) == (71, 1376)


def byte_pairs(word, ranks):
    """The textbook byte-pair merge: the pair of lowest rank first."""
    parts = [word[i : i + 1] for i in range(len(word))]
    while True:
        pairs = [(ranks[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]
        if not pairs:
            return [ranks[part] for part in parts]
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def test_template_in_the_real_vocabulary():
    import regex

    spec = find_spec("qwen_agent")
    if spec is None:
        pytest.skip("qwen-agent, which carries the vocabulary, is not installed (requirements/peers.txt)")
    file = Path(spec.submodule_search_locations[0], "utils", "qwen.tiktoken")
    lines = (line.split() for line in file.read_bytes().splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    words = regex.compile(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    ids = []
    for part in regex.split(r"(<\|\w+\|>)", PROMPT):
        found = [SPECIAL[part]] if part in SPECIAL else [
            i for word in words.findall(part) for i in byte_pairs(word.encode(), ranks)
        ]  # fmt: skip
        ids += found
    assert tuple(ids) == QWEN_IMAGE_EDIT
    assert len(ids) == 72 and ids.index(151655) == 65
    kept = qwen_view.prompt(8, QWEN25_VL_7B)[QWEN25_VL_7B.drop :].tolist()
    assert len(kept) == 71
    assert kept == [151652, *[151655] * 64, 151653, 151645, 198, 151644, *byte_pairs(b"assistant", ranks), 198]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """transformers' own small model, and the same weights as two shards with the files' key names."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration(qwen_vl.config(QWEN_VL)).eval()
    tensors = weights({file_key("qwen_vl", key): tuple(t.shape) for key, t in model.state_dict().items()})
    model.load_state_dict({key: tensors[file_key("qwen_vl", key)] for key in model.state_dict()})
    folder, keys = tmp_path_factory.mktemp("qwen"), sorted(tensors)
    shards = [keys[::2], keys[1::2]]
    paths = [save(folder / f"{i}.safetensors", {k: tensors[k] for k in shard}) for i, shard in enumerate(shards)]
    return model, paths, tensors


def views(side, count=3):
    return torch.stack([torch.from_numpy(qwen_view.patches(noise(side, seed), QWEN_VL)) for seed in range(count)])


def prompted(model, view):
    """What the authors' wrapper takes: the last of ``hidden_states``, the prompt's first tokens dropped."""
    grid = qwen_vl._grid(view.shape[1], QWEN_VL)
    ids = qwen_view.prompt(grid, QWEN_VL)[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "output_hidden_states": True}
    if "mm_token_type_ids" in inspect.signature(model.model.forward).parameters:  # the processor of transformers 5
        inputs["mm_token_type_ids"] = (ids == QWEN_VL.image_token).int()
    inputs["image_grid_thw"] = torch.tensor([[1, 2 * grid, 2 * grid]])
    with torch.no_grad():
        last = [model.model(pixel_values=one, **inputs).hidden_states[-1] for one in view]
    return torch.cat(last)[:, QWEN_VL.drop :]


@pytest.mark.parametrize("side", [QWEN_VL.lowres, QWEN_VL.highres])
def test_features_as_the_whole_model_in_fp32(world, side):
    model, paths, _ = world
    (ours,) = qwen_vl.encode(paths, QWEN_VL, [views(side)], FP32)
    assert ours.shape == (3, QWEN_VL.tokens(side), QWEN_VL.hidden)
    assert relative(ours, prompted(model, views(side))) < 1e-5


def test_features_as_the_whole_model_in_bf16(world):
    model, paths, _ = world
    (ours,) = qwen_vl.encode(paths, QWEN_VL, [views(QWEN_VL.lowres)], BF16)
    theirs = prompted(copy.deepcopy(model).to(torch.bfloat16), views(QWEN_VL.lowres).bfloat16())
    assert relative(ours, theirs) < 3e-2


@pytest.mark.parametrize(("run", "bound"), [(FP32, 1e-5), (BF16, 1e-2)], ids=["fp32", "bf16"])
def test_both_views_in_one_walk_and_a_picture_alone(world, run, bound):
    _, paths, _ = world
    both = [views(QWEN_VL.lowres), views(QWEN_VL.highres)]
    together = qwen_vl.encode(paths, QWEN_VL, both, run)
    for view, result in zip(both, together, strict=True):
        alone = torch.cat([qwen_vl.encode(paths, QWEN_VL, [one[None]], run)[0] for one in view])
        assert relative(alone, result) < bound
        assert relative(result[0], result[1]) > 1e-2


def test_rotary_sections_reach_the_installed_version(world):
    _, paths, _ = world
    view = [views(QWEN_VL.highres, 1)]
    (right,) = qwen_vl.encode(paths, QWEN_VL, view, FP32)
    (other,) = qwen_vl.encode(paths, replace(QWEN_VL, mrope=(8, 0, 0)), view, FP32)
    assert relative(right, other) > 1e-3
    real = qwen_vl.config(QWEN25_VL_7B).text_config
    rope = getattr(real, "rope_parameters", None) or real.rope_scaling
    assert list(rope["mrope_section"]) == [16, 24, 24]
    assert (rope.get("rope_theta") or real.rope_theta) == 1e6


def test_order_and_places_by_hand():
    order, ends = qwen_view.window_order(5, QWEN25_VL_7B)
    assert order[:5].tolist() == [0, 1, 2, 3, 5] and order[16:20].tolist() == [4, 9, 14, 19]
    assert ends.tolist() == [0, 64, 80, 96, 100]
    places = qwen_view.prompt_positions(2, QWEN_VL)[:, 0]
    assert places[0].tolist() == [0, 1, 2, 3, 4, 4, 4, 4, 6, 7, 8]
    assert places[1].tolist() == [0, 1, 2, 3, 4, 4, 5, 5, 6, 7, 8]
    assert places[2].tolist() == [0, 1, 2, 3, 4, 5, 4, 5, 6, 7, 8]


def test_vocabulary_is_not_read_whole_and_the_head_not_at_all(world, tmp_path):
    _, paths, tensors = world
    without = save(tmp_path / "headless.safetensors", {k: t for k, t in tensors.items() if k != "lm_head.weight"})
    view = [views(QWEN_VL.lowres, 1)]
    (right,) = qwen_vl.encode(paths, QWEN_VL, view, FP32)
    assert torch.equal(qwen_vl.encode([without], QWEN_VL, view, FP32)[0], right)
    words = tensors["model.embed_tokens.weight"].clone()
    unused = [i for i in range(QWEN_VL.vocab) if i not in QWEN_VL.template]
    words[unused] = torch.nan
    poisoned = save(tmp_path / "poisoned.safetensors", {**tensors, "model.embed_tokens.weight": words})
    assert torch.equal(qwen_vl.encode([poisoned], QWEN_VL, view, FP32)[0], right)


def test_a_shard_that_is_not_there(world):
    _, paths, _ = world
    with pytest.raises(UserError, match=r"0\.safetensors: the tensor '.*' is missing"):
        qwen_vl.encode(paths[:1], QWEN_VL, [views(QWEN_VL.lowres, 1)], FP32)
