"""Where a square of a picture is chosen: the dialog's markup. Its script (javascript/image_to_lora_crop.js) draws the
squares, of which the tray has one for each of its cards."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

from i2l_ext.converters.errors import UserError
from i2l_ext.service.service import Service
from i2l_ext.service.uploads import MAX_PICTURES, split_crops
from i2l_ext.webui.markup import Markup, element, word
from i2l_ext.webui.texts import WORDS


def open_crop(service: Service, said: Mapping[str, Any]) -> dict[str, Markup]:
    """The dialog for the picture of a card, which ``id`` names. Raises UserError for one that is not here."""
    id = said.get("id")
    if not isinstance(id, str):
        raise UserError("A picture is no longer here. Remove it and drop it again.")
    [[upload], _] = split_crops([id])
    return {"crop": crop_dialog(id, upload, service.whole_picture(upload))}


def crop_dialog(id: str, upload: str, whole: Mapping[str, Any]) -> Markup:
    """``whole``: the picture as a data URI, and its width and height in pixels."""
    title = element("h3", word("crop_title"), id="i2l_crop_title")
    stage = element("div", element("img", src=whole["picture"], alt="", draggable="false"), class_="i2l-stage")
    where = element(
        "p", word("crop_where"), " ", element("span", class_="i2l-value"), class_="i2l-quiet", role="status"
    )
    size = element(
        "label", word("crop_size"), element("input", type="range", min="0", max="1000", step="1"), class_="i2l-zoom"
    )
    keys = ("crop_add", "crop_remove", "crop_centre", "crop_cancel", "crop_take")
    buttons = [
        element("button", word(key), type="button", data_i2l_crop=key.removeprefix("crop_"),
                class_="i2l-button i2l-primary" if key == "crop_take" else "i2l-button")
        for key in keys
    ]  # fmt: skip
    return element(
        "dialog", title, element("p", word("crop_how"), class_="i2l-quiet"), stage, where, size,
        element("div", buttons, class_="i2l-buttons"), class_="i2l-crop", aria_labelledby="i2l_crop_title",
        data_i2l_id=secrets.token_hex(8), data_i2l_card=id, data_i2l_upload=upload, data_i2l_width=whole["width"],
        data_i2l_height=whole["height"], data_i2l_most=MAX_PICTURES, data_i2l_square=WORDS["crop_square"],
    )  # fmt: skip
