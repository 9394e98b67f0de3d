"""The nodes on LoRA files: merge, resize, convert, check, export for training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from i2l_ext.comfyui import widgets
from i2l_ext.comfyui.host import comfy_service, finished, lora_path, shown_name
from i2l_ext.comfyui.load_node import file_time

if TYPE_CHECKING:
    from i2l_ext.engine.job import Job

FRESH = "the new LoRA's name; empty: after the old one. A name that is taken is never overwritten"
MERGED = 4
"""LoRAs that one node merges."""


class LoraFileNode:
    """Base of those that write a LoRA."""

    CATEGORY = "Image to LoRA/files"
    FUNCTION = "run"
    OUTPUT_NODE = True
    RETURN_TYPES: tuple[str, ...] = (widgets.LORA_NAME,)
    RETURN_NAMES: tuple[str, ...] = ("lora_name",)

    def written(self, job: Job) -> dict[str, Any]:
        """What ComfyUI is given of a job that wrote a LoRA."""
        name = shown_name(job.result["file"])
        return {"ui": {"i2l_lora": [name]}, "result": (name,)}


class MergeLoras(LoraFileNode):
    """One LoRA from several."""

    DESCRIPTION = "Writes one LoRA that acts as several together, each with its strength."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        parts: dict[str, Any] = {}
        for number in range(1, MERGED + 1):
            parts[f"lora_{number}"] = widgets.lora("a LoRA", optional=number > 2)
            parts[f"strength_{number}"] = widgets.strength()
        from i2l_ext.requests import MergeRequest

        fields = MergeRequest.fields()
        return {
            "required": {
                **parts,
                "rank": widgets.number(fields["rank"], default=0, low=0),
                "name": widgets.text(FRESH),
            },
            "hidden": {"node": "UNIQUE_ID"},
        }

    def run(self, rank: int, name: str, node: str | None = None, **parts: Any) -> dict[str, Any]:
        """Raises UserError, and ComfyUI's exception for an interrupt."""
        chosen = [
            (lora_path(parts[f"lora_{number}"]), float(parts[f"strength_{number}"]))
            for number in range(1, MERGED + 1)
            if parts.get(f"lora_{number}", widgets.NONE) != widgets.NONE
        ]
        return self.written(
            finished(lambda: comfy_service().merge(chosen, name, rank=rank or None), node, computes=False)
        )


class ResizeLora(LoraFileNode):
    """A LoRA at another rank."""

    DESCRIPTION = "Writes the nearest LoRA of another rank, or of the smallest rank that keeps a share of the effect."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        from i2l_ext.requests import RankRequest

        fields = RankRequest.fields()
        share = {
            "default": 0.0,
            "min": 0.0,
            "max": 1.0,
            "step": 0.01,
            "tooltip": f"instead: {fields['effect_kept'].info.help}",
        }
        return {
            "required": {
                "lora_name": widgets.lora("the LoRA"),
                "rank": widgets.number(fields["rank"], default=8, low=0),
                "effect_kept": ("FLOAT", share),
                "name": widgets.text(FRESH),
            },
            "hidden": {"node": "UNIQUE_ID"},
        }

    def run(self, lora_name: str, rank: int, effect_kept: float, name: str, node: str | None = None) -> dict[str, Any]:
        """``effect_kept`` above 0 counts instead of ``rank``. Raises as the others."""
        path, wanted = lora_path(lora_name), {"effect_kept": effect_kept} if effect_kept else {"rank": rank or None}
        return self.written(
            finished(lambda: comfy_service().resize(path, lora_name, name, **wanted), node, computes=False)
        )


class ConvertLora(LoraFileNode):
    """A LoRA in another key format."""

    DESCRIPTION = (
        "Writes a LoRA with the keys that another program reads; LoKr, LoHa and others become a LoRA of a rank."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        from i2l_ext.requests import ConvertRequest

        fields = ConvertRequest.fields()
        return {
            "required": {
                "lora_name": widgets.lora("the LoRA"),
                "key_format": widgets.choice(fields["key_format"].info.choices, "how tensors are named in the file"),
                "dtype": widgets.choice((widgets.AS_MADE, *fields["dtype"].info.choices), fields["dtype"].info.help),
                "rank": widgets.number(fields["rank"], default=0, low=0),
                "name": widgets.text(FRESH),
            },
            "hidden": {"node": "UNIQUE_ID"},
        }

    def run(
        self, lora_name: str, key_format: str, dtype: str, rank: int, name: str, node: str | None = None
    ) -> dict[str, Any]:
        """Raises as the others."""
        path = lora_path(lora_name)
        values = {"dtype": None if dtype == widgets.AS_MADE else dtype, "rank": rank or None}
        return self.written(
            finished(lambda: comfy_service().convert(path, lora_name, key_format, name, **values), node, computes=False)
        )


class CheckLora:
    """Who loads a LoRA."""

    DESCRIPTION = "Tells which programs load a LoRA, which do not, and what repairs it."
    CATEGORY = "Image to LoRA/files"
    FUNCTION = "run"
    OUTPUT_NODE = True
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("text",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"lora_name": widgets.lora("the LoRA")}, "hidden": {"node": "UNIQUE_ID"}}

    @classmethod
    def IS_CHANGED(cls, lora_name: str | None = None, **_: Any) -> str:
        """Another file under the same name is another answer."""
        return file_time(lora_name)

    def run(self, lora_name: str, node: str | None = None) -> dict[str, Any]:
        """Raises as the others."""
        path = lora_path(lora_name)
        found = finished(lambda: comfy_service().check(path, lora_name), node, computes=False).result
        lines = [line for line in (lora_name, found["caution"]) if line]
        for one in found["consumers"]:
            told = f"{one['status']}" + (f", {one['loads']} modules" if one["loads"] else "")
            lines.append(f"{one['title']}: {told}" + (f" ({one['detail']})" if one["detail"] else ""))
        return {"ui": {"text": ["\n".join(lines)]}, "result": ("\n".join(lines),)}


class ExportLora:
    """The start of a training run."""

    DESCRIPTION = "Writes the folder from which a trainer starts: the LoRA as the trainer wants it, and how to run it."
    CATEGORY = "Image to LoRA/files"
    FUNCTION = "run"
    OUTPUT_NODE = True
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("folder",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        from i2l_ext.requests import ExportRequest

        fields = ExportRequest.fields()
        return {
            "required": {
                "lora_name": widgets.lora("the LoRA"),
                "trainer": widgets.choice(fields["trainer"].info.choices, fields["trainer"].info.help),
                "rank": widgets.number(fields["rank"], default=0, low=0),
            },
            "hidden": {"node": "UNIQUE_ID"},
        }

    def run(self, lora_name: str, trainer: str, rank: int, node: str | None = None) -> dict[str, Any]:
        """Raises as the others."""
        path = lora_path(lora_name)
        job = finished(lambda: comfy_service().export(path, lora_name, trainer, rank or None), node, computes=False)
        folder = str(job.request["output"])
        return {"ui": {"text": [folder]}, "result": (folder,)}


NODES: Mapping[str, tuple[type, str]] = {
    "I2LMerge": (MergeLoras, "Merge LoRAs"),
    "I2LResize": (ResizeLora, "Resize LoRA"),
    "I2LConvert": (ConvertLora, "Convert LoRA"),
    "I2LCheck": (CheckLora, "Check LoRA"),
    "I2LExport": (ExportLora, "Export LoRA for training"),
}
"""ComfyUI's name -> the class, and its title."""
