"""The example workflows for ComfyUI: both forms ask for the same, and for what our nodes take."""

import json
from pathlib import Path

import pytest

from i2l_ext.comfyui import extension, widgets
from i2l_ext.requests import MakeRequest

FOLDER = Path(__file__).resolve().parent.parent / "example_workflows"
NAMES = sorted(path.stem for path in (FOLDER / "api").glob("*.json"))
NODES = extension.NODE_CLASS_MAPPINGS


def read(name):
    """The prompt that is sent to the API, and the graph that the page opens."""
    return [json.loads((FOLDER / f"{part}{name}.json").read_text(encoding="utf-8")) for part in ("api/", "")]


def test_there_is_one_for_each_base():
    assert NAMES == ["image-to-lora-miniature", "image-to-lora-qwen-image", "image-to-lora-z-image"]
    assert sorted(path.stem for path in FOLDER.glob("*.json")) == NAMES, "the template browser shows these"


@pytest.mark.parametrize("name", NAMES)
def test_both_forms_ask_for_the_same(name):
    prompt, graph = read(name)
    nodes = {str(node["id"]): node for node in graph["nodes"]}
    assert {id: node["type"] for id, node in nodes.items()} == {id: one["class_type"] for id, one in prompt.items()}
    links = {link[0]: link for link in graph["links"]}
    for id, asked in prompt.items():
        linked = {socket["name"]: socket["link"] for socket in nodes[id].get("inputs", []) if socket.get("link")}
        wanted = {key: value for key, value in asked["inputs"].items() if isinstance(value, list)}
        assert {key: [str(links[link][1]), links[link][2]] for key, link in linked.items()} == wanted
        shown = nodes[id].get("widgets_values", [])
        for key, value in asked["inputs"].items():
            assert key in wanted or value in shown, f"{asked['class_type']}: {key}"


@pytest.mark.parametrize("name", NAMES)
def test_our_nodes_are_asked_for_what_they_take(name, monkeypatch):
    for module in (widgets,):
        monkeypatch.setattr(module, "lora_names", list)
    prompt, _ = read(name)
    ours = [one for one in prompt.values() if one["class_type"] in NODES]
    assert {one["class_type"] for one in ours} > {"I2LMake"}
    for one in ours:
        takes = NODES[one["class_type"]].INPUT_TYPES()
        assert set(takes["required"]) <= set(one["inputs"]) <= {*takes["required"], *takes.get("optional", {})}
        for key, value in one["inputs"].items():
            kind, told = {**takes["required"], **takes.get("optional", {})}[key]
            if isinstance(kind, list) and not isinstance(value, list):
                assert value in kind
            if kind in ("INT", "FLOAT"):
                assert told["min"] <= value <= told["max"]
    [make] = [one["inputs"] for one in ours if one["class_type"] == "I2LMake"]
    MakeRequest((), make["name"], model=make["model"], strength=make["strength"]).validate()
