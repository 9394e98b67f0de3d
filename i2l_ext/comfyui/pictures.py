"""ComfyUI's IMAGE, a float tensor [B, H, W, C] in 0..1, to files and back."""

from __future__ import annotations

import io
import secrets
from base64 import b64decode
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from i2l_ext.comfyui.host import comfy_service, temp_folder

if TYPE_CHECKING:
    import torch


def take_pictures(images: Sequence[torch.Tensor]) -> list[str]:
    """Keep every picture of batches [B, H, W, C], of any sizes, for the engine; their ids.

    Raises UserError where there are none, too many, or one with values that are no numbers.
    """
    from i2l_ext.converters.errors import UserError
    from i2l_ext.service.uploads import MAX_PICTURES

    count = sum(len(batch) for batch in images)
    if not 1 <= count <= MAX_PICTURES:
        raise UserError(f"{count} pictures: 1 to {MAX_PICTURES} make one LoRA. Connect others.")
    uploads = comfy_service().uploads
    return [uploads.take_stream(io.BytesIO(picture)) for picture in _pngs(images)]


def _pngs(images: Sequence[torch.Tensor]) -> Iterator[bytes]:
    import torch
    from PIL import Image

    from i2l_ext.converters.errors import UserError

    for number, pixels in enumerate((picture for batch in images for picture in batch), 1):
        if pixels.ndim != 3 or pixels.shape[-1] not in (1, 3, 4) or 0 in pixels.shape:
            raise UserError(
                f"Picture {number} has the shape {list(pixels.shape)}. Connect an image of 1 to 4 channels."
            )
        if not torch.isfinite(pixels).all():
            raise UserError(f"Picture {number} has values that are no numbers. Put right what makes it.")
        levels = (pixels.float().clamp(0, 1) * 255).round().byte().cpu().contiguous().numpy()
        stream = io.BytesIO()
        Image.fromarray(levels[..., 0] if levels.shape[-1] == 1 else levels).save(stream, "PNG", compress_level=1)
        yield stream.getvalue()


def read_picture(file: Path | io.BytesIO) -> torch.Tensor:
    """A picture as IMAGE, float32 [1, H, W, 3]."""
    import numpy as np
    import torch
    from PIL import Image

    with Image.open(file) as picture:
        levels = np.array(picture.convert("RGB"))
    return torch.from_numpy(levels).float().div(255)[None]


def read_data_uris(uris: Sequence[str]) -> torch.Tensor:
    """Pictures of one size in ``data:`` URIs as IMAGE, float32 [N, H, W, 3]."""
    import torch

    return torch.cat([read_picture(io.BytesIO(b64decode(uri.partition(",")[2]))) for uri in uris])


def show_on_node(images: torch.Tensor) -> list[dict[str, Any]]:
    """What a node's ``ui`` holds of IMAGE: each picture in a file of ComfyUI's temporary folder."""
    folder, shown = temp_folder(), []
    folder.mkdir(parents=True, exist_ok=True)
    for picture in _pngs([images]):
        path = folder / f"i2l_{secrets.token_hex(6)}.png"
        path.write_bytes(picture)
        shown.append({"filename": path.name, "subfolder": "", "type": "temp"})
    return shown
