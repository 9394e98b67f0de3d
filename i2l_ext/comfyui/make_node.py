"""The node that makes a LoRA from pictures."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from i2l_ext.comfyui import widgets
from i2l_ext.comfyui.host import comfy_service, finished, shown_name
from i2l_ext.comfyui.model_nodes import model_rows
from i2l_ext.comfyui.pictures import read_picture, show_on_node, take_pictures

AUTO = "auto"
"""The first model that is downloaded, else the miniature."""


PREVIEW = ".preview.png"
"""Instead of a LoRA's suffix."""


class Remembered:
    """What was made in this process: {what was asked for: (file, its size, its time)}. ComfyUI forgets results when its
    memory is short; the same LoRA would then get a second name."""

    def __init__(self) -> None:
        self._made: dict[str, tuple[Path, int, int]] = {}

    def put(self, asked: str, file: Path) -> None:
        status = file.stat()
        self._made[asked] = file, status.st_size, status.st_mtime_ns

    def get(self, asked: str) -> Path | None:
        """The file, where it is there and unchanged."""
        return self._made[asked][0] if asked in self._made and self._is_there(asked) else None

    def gone(self) -> list[str]:
        """Names of files that are no longer as they were made."""
        return sorted(self._made[asked][0].name for asked in self._made if not self._is_there(asked))

    def _is_there(self, asked: str) -> bool:
        file, size, time_ns = self._made[asked]
        with suppress(OSError):
            status = file.stat()
            return (status.st_size, status.st_mtime_ns) == (size, time_ns) and file.with_suffix(PREVIEW).is_file()
        return False


MADE = Remembered()


class ImageToLora:
    """Pictures in, a LoRA out."""

    DESCRIPTION = (
        "Makes a LoRA from one or several pictures, in one pass and without training. It lands in the first loras "
        "folder with a preview; a name that is taken is never overwritten. Only the centre square of a picture is seen."
    )
    CATEGORY = "Image to LoRA"
    FUNCTION = "make"
    INPUT_IS_LIST = True
    OUTPUT_NODE = True
    RETURN_TYPES = (widgets.LORA_NAME, "STRING", "IMAGE")
    RETURN_NAMES = ("lora_name", "file", "preview")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        from i2l_ext.models.catalogue import MODELS
        from i2l_ext.requests import MakeRequest

        fields = MakeRequest.fields()
        return {
            "required": {
                "images": ("IMAGE", {"tooltip": "a batch, or a list of pictures of any sizes"}),
                "name": widgets.text(fields["name"].info.help, "my_style"),
                "model": widgets.choice((AUTO, *MODELS), "what to make it with; auto: the first that is downloaded"),
                "strength": widgets.number(fields["strength"], step=0.05),
                "weights": widgets.text("how much each picture counts, such as 1 0.5; empty: all the same"),
                "rank": widgets.number(fields["rank"], default=0, low=0),
            },
            "optional": {"more_images": ("IMAGE", {"tooltip": "further pictures, beside the others"})},
            "hidden": {"node": "UNIQUE_ID"},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, name: Sequence[str | None]) -> bool | str:
        """A wrong name is told before anything is computed. None stands for a link. ComfyUI repeats the line for each
        input that is named here, so there is one."""
        from i2l_ext.library.names import check_name

        return widgets.refusal(lambda: [check_name(text.strip()) for text in name if text is not None]) or True

    @classmethod
    def IS_CHANGED(cls, **inputs: Any) -> str:
        """The inputs tell whether there is something to do, unless a LoRA that was made is gone."""
        return ", ".join(MADE.gone())

    def make(self, images: Sequence[Any], more_images: Sequence[Any] = (), **inputs: Sequence[Any]) -> dict[str, Any]:
        """Raises UserError, and ComfyUI's exception for an interrupt."""
        from i2l_ext.service.settings import AUTOMATIC

        given = {name: values[0] for name, values in inputs.items()}
        node = given.pop("node", None)
        weights = parse_weights(given["weights"])
        model = given["model"]
        if model == AUTO:
            model_rows()
            model = comfy_service().models.choose()
        pictures = take_pictures([*images, *more_images])
        values = {
            "name": given["name"], "model": model, "strength": given["strength"], "weights": weights,
            "rank": given["rank"] or None,
        }  # fmt: skip
        asked = json.dumps([pictures, values])
        file = MADE.get(asked)
        if file is None:
            job = finished(lambda: comfy_service().make(pictures, draw=False, key_format=AUTOMATIC, **values), node)
            file = comfy_service().host.lora_folder() / job.result["file"]
            MADE.put(asked, file)
        name = shown_name(str(file.relative_to(comfy_service().host.lora_folder())))
        preview = read_picture(file.with_suffix(PREVIEW))
        return {
            "ui": {"images": show_on_node(preview), "i2l_lora": [name]},
            "result": (name, str(file), preview),
        }


def parse_weights(text: str) -> tuple[float, ...] | None:
    """Numbers with blanks or commas between them; None of an empty text. Raises UserError."""
    from i2l_ext.converters.errors import UserError

    words = [word for word in re.split(r"[\s,;]+", text) if word]
    try:
        return tuple(map(float, words)) or None
    except ValueError:
        raise UserError(f"weights: write numbers such as 1 0.5, not {text[:80]!r}.") from None


NODES: Mapping[str, tuple[type, str]] = {"I2LMake": (ImageToLora, "Image to LoRA")}
"""ComfyUI's name -> the class, and its title."""
