"""The nodes on models: which are here and how they come, and drawing with the miniature."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

from i2l_ext.comfyui import widgets
from i2l_ext.comfyui.host import comfy_service, finished, interruptible_sleep, lora_path
from i2l_ext.comfyui.pictures import read_data_uris, show_on_node

LIST = "list only"


class I2LModels:
    """The models, and their downloads."""

    DESCRIPTION = (
        "Lists the models and which are here. To download one: choose it, agree to its licences, and run the node."
    )
    CATEGORY = "Image to LoRA"
    FUNCTION = "run"
    OUTPUT_NODE = True
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("text",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        from i2l_ext.models.catalogue import MODELS
        from i2l_ext.requests import DownloadRequest

        fields = DownloadRequest.fields()
        consent = {"default": False, "tooltip": "I agree to the licences that the list shows for this model"}
        return {
            "required": {
                "download": widgets.choice((LIST, *MODELS), "a model to download"),
                "source": widgets.choice(fields["source"].info.choices, fields["source"].info.help),
                "agree": ("BOOLEAN", consent),
            },
            "hidden": {"node": "UNIQUE_ID"},
        }

    @classmethod
    def IS_CHANGED(cls, **inputs: Any) -> float:
        """What is here may change at any time."""
        return float("nan")

    def run(self, download: str, source: str, agree: bool, node: str | None = None) -> dict[str, Any]:
        """Raises UserError, and ComfyUI's exception for an interrupt; what was fetched by then is kept."""
        model_rows()
        if download != LIST:
            finished(lambda: comfy_service().download(download, source, agreed=agree), node, computes=False)
        text = "\n".join(model_lines())
        return {"ui": {"text": [text]}, "result": (text,)}


def model_rows() -> list[dict[str, Any]]:
    """The models as ``i2l models --json`` lists them; [] where the engine cannot tell."""
    models, end = comfy_service().models, time.monotonic() + 60
    while (rows := models.rows()) is None and models.failed is None and time.monotonic() < end:
        interruptible_sleep()
    return rows or []


def model_lines() -> Iterator[str]:
    """The models, and what of each is missing."""
    for row in model_rows():
        missing = [part for part in row["parts"] if part["repo"] and not part["present"]]
        size = f"{row['download_bytes'] / 1e9:.1f} GB" if row["download_bytes"] else "unknown size"
        state = "ready" if row["ready"] else f"{size} to download"
        yield f"{row['name']}: {row['line']} ({state})"
        yield from (f"    {part['id']} from {part['repo']}, licence: {part['licence']}" for part in missing)
    if rows := model_rows():
        yield f"Downloads go to {rows[0]['download_folder']}"


class DrawWithMiniature:
    """Pictures of the built-in miniature."""

    DESCRIPTION = (
        "Draws with the base model of the miniature, with a LoRA that the model mini made or without: it needs no "
        "download. A line of the prompt is a picture, such as: a star left"
    )
    CATEGORY = "Image to LoRA"
    FUNCTION = "run"
    OUTPUT_NODE = True
    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("images",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        from i2l_ext.requests import DrawRequest

        fields = DrawRequest.fields()
        return {
            "required": {
                "lora_name": widgets.lora("a LoRA of the miniature, or none", optional=True),
                "strength": widgets.strength(),
                "prompt": widgets.text("a line for each picture", "a circle\na star left\na square right", lines=True),
                "seed": widgets.number(fields["seed"]),
                "size": widgets.number(fields["size"], step=32),
            },
            "hidden": {"node": "UNIQUE_ID"},
        }

    def run(
        self, lora_name: str, strength: float, prompt: str, seed: int, size: int, node: str | None = None
    ) -> dict[str, Any]:
        """Raises UserError, and ComfyUI's exception for an interrupt."""
        loras = [] if lora_name == widgets.NONE else [(lora_path(lora_name), strength)]
        prompts = [line.strip() for line in prompt.splitlines() if line.strip()]
        job = finished(lambda: comfy_service().draw(prompts, loras, seed, size), node)
        images = read_data_uris(job.result["pictures"])
        return {"ui": {"images": show_on_node(images)}, "result": (images,)}


NODES: Mapping[str, tuple[type, str]] = {
    "I2LModels": (I2LModels, "i2L models"),
    "I2LDraw": (DrawWithMiniature, "Draw with the miniature"),
}
"""ComfyUI's name -> the class, and its title."""
