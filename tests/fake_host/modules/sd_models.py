"""A1111: a checkpoint goes to the computer's memory and stays there until it is sent to the card. SD.Next and Forge Neo
drop it, and load it again by themselves."""

from types import SimpleNamespace

from modules import shared

KEEPS = shared.FLAVOUR == "a1111"
moves = []
"""What became of the checkpoint, in order."""


class ModelData:
    def __init__(self):
        self.sd_model = SimpleNamespace(device="cuda")
        if shared.FLAVOUR.startswith("forge"):
            self.sd_model.current_lora_hash = "stale"
        self.loaded_by_reading = 0

    def get_sd_model(self):
        self.loaded_by_reading += 1
        return self.sd_model


model_data = ModelData()


def unload_model_weights(sd_model=None, info=None, op=None):
    model = sd_model or (shared.sd_model if KEEPS else model_data.sd_model)
    model.device = "cpu" if KEEPS else None
    moves.append("unloaded")


def send_model_to_device(model):
    if KEEPS:
        model.device = "cuda"
    moves.append("sent")
