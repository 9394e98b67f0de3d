"""AUTOMATIC1111, and what is told apart from it by nothing that matters here."""

from __future__ import annotations

from typing import Any

from i2l_ext.webui.hosts.webui import WebUIHost


class A1111Host(WebUIHost):
    """It lists the LoRAs, and has no model that they are for."""

    name = "a1111"
    title = "AUTOMATIC1111"

    @classmethod
    def is_running(cls) -> bool:
        return True  # asked last

    def _unload(self) -> Any:
        from modules import sd_models

        model = self._model()
        if model is not None:  # without one it raises, or loads one to unload it
            sd_models.unload_model_weights(model)
        return model

    def _bring_back(self, model: Any) -> None:
        """It would use the model for the next picture where it lies: in the computer's memory."""
        from modules import sd_models

        if self._model() is model:  # it may have been exchanged for another, on a page of settings
            sd_models.send_model_to_device(model)
