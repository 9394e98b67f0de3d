"""The base model of a training: found by its files' headers, in a hub's cache and in a WebUI's models folder."""

import json
import struct

import pytest

from i2l_ext.converters.architectures import HIDREAM_O1, KLEIN_4B, MINI, QWEN_IMAGE, Z_IMAGE
from i2l_ext.models import base_files
from i2l_ext.models.base_files import find_base
from i2l_ext.models.store import Folders


@pytest.fixture(autouse=True)
def no_smallest(monkeypatch):
    monkeypatch.setattr(base_files, "SMALLEST", 0)


def write(path, shapes, dtype="BF16"):
    """A safetensors file of zeros that takes no room on the disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2
        for one in shape:
            size *= one
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return path


def weights(arch):
    return {f"{path}.weight": module.shape for path, module in arch.modules.items()}


def test_single_files_of_a_webui(tmp_path):
    models = tmp_path / "models"
    write(models / "Lora/style.safetensors", {"a.lora_A.weight": (4, 8), "a.lora_B.weight": (8, 4)})
    write(models / "diffusion_models/qwen_image_edit_2509.safetensors", weights(QWEN_IMAGE))
    write(models / "VAE/wan_2.1_vae.safetensors", {"decoder.conv1.weight": (384, 16, 3, 3, 3)})
    (models / "VAE/damaged_qwen.safetensors").write_bytes(b"\xff" * 100)
    folders = Folders(tmp_path / "own", (models,))
    assert find_base(QWEN_IMAGE, folders=folders) == {}  # an editing model, and a VAE of the same structure
    expected = {
        "transformer": write(models / "diffusion_models/qwen_image_bf16.safetensors", weights(QWEN_IMAGE)),
        "vae": write(models / "VAE/qwen_image_vae.safetensors", {"decoder.conv1.weight": (384, 16, 3, 3, 3)}),
        "text_encoder": write(
            models / "text_encoders/qwen_2.5_vl_7b-00001-of-00002.safetensors",
            {"model.embed_tokens.weight": (152064, 3584)},
        ),
    }
    write(models / "text_encoders/qwen_2.5_vl_7b-00002-of-00002.safetensors", {"visual.x.weight": (8, 8)})
    assert find_base(QWEN_IMAGE, folders=Folders(tmp_path / "own", (models,))) == expected
    assert find_base(Z_IMAGE, folders=Folders(tmp_path / "own", (models,))) == {}
    assert find_base(MINI, [models]) == {} and find_base(HIDREAM_O1, [models], Folders(tmp_path / "own")) == {}


def test_a_distilled_klein_is_no_base(tmp_path):
    folders = Folders(tmp_path / "own", (tmp_path / "models",))
    write(tmp_path / "models/unet/flux-2-klein-4b.safetensors", weights(KLEIN_4B))
    assert find_base(KLEIN_4B, folders=folders) == {}
    file = write(tmp_path / "models/unet/flux-2-klein-base-4b.safetensors", weights(KLEIN_4B))
    assert find_base(KLEIN_4B, [tmp_path / "models/unet"], Folders(tmp_path / "own")) == {"transformer": file}


def test_a_hubs_cache_counts_where_it_is_whole(tmp_path):
    home = tmp_path / "hub/models--Tongyi-MAI--Z-Image/snapshots/abc"
    for part in ("transformer", "vae", "text_encoder"):
        write(home / part / "model-00001-of-00002.safetensors", {"x.weight": (2, 2)})
    names = {f"k{n}": f"model-0000{n}-of-00002.safetensors" for n in (1, 2)}
    (home / "transformer/model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    (home / "model_index.json").write_text("{}")
    folders = Folders(tmp_path / "own", hugging_face=tmp_path / "hub")
    assert find_base(Z_IMAGE, folders=folders) == {}  # its second shard is not there
    write(home / "transformer/model-00002-of-00002.safetensors", {"y.weight": (2, 2)})
    found = find_base(Z_IMAGE, folders=folders)
    assert found["folder"] == home and found["transformer"] == home / "transformer/model-00001-of-00002.safetensors"


@pytest.mark.parametrize(
    ("arch", "other", "own"),
    [(Z_IMAGE, "Z-Image-Turbo", "Z-Image"), (QWEN_IMAGE, "Qwen-Image-Edit", "Qwen-Image")],
    ids=["turbo", "edit"],
)
def test_a_folder_of_a_distilled_or_an_editing_model_is_no_base(tmp_path, arch, other, own):
    """Its transformer has the same layers. A folder of another name counts: its owner has named it."""
    for name, expected in ((other, False), (own, True), ("mine", True)):
        home = tmp_path / name
        write(home / "transformer/model.safetensors", weights(arch))
        for part in ("vae", "text_encoder"):
            write(home / part / "model.safetensors", {"x.weight": (2, 2)})
        (home / "model_index.json").write_text("{}")
        found = find_base(arch, [home], Folders(tmp_path / "own"))
        assert (found.get("folder") == home) is expected, name
        assert ("transformer" in found) is expected, name
