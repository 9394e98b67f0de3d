"""Every word that the tab shows, in one table: what a control is called, and what its tooltip says.

English is the key under which a WebUI's localisation finds its own words (localizations/*.json), so each text stands
alone in its element: numbers and names are put beside it, never into it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Text:
    label: str
    tip: str = ""


CONTROLS = {
    "files": Text("Pictures", "Drop pictures here, click to choose them, or paste one. One to a handful work best."),
    "server_folder": Text("Folder on this machine", "All pictures in this folder, without uploading them."),
    "add_folder": Text("Add folder", "Add the pictures of that folder."),
    "name": Text("Name", "The LoRA's name, as it will stand in prompts: letters, digits, '.', '_' and '-'."),
    "strength": Text("Strength", "Scales the whole effect: 1 as the model meant it, 0.5 half of it."),
    "rank": Text("Rank", "As made keeps everything. A lower rank is a smaller file that keeps the strongest part."),
    "dialect": Text("Key names", "How keys are named in the file: webui suits the WebUIs and ComfyUI."),
    "dtype": Text("Number format", "Of the numbers in the file. bf16 is as made; fp32 is twice as large."),
    "subfolder": Text("Sub-folder", "Inside the LoRA folder. It is made if it is not there."),
    "description": Text("Description", "Shown on the LoRA's card."),
    "activation": Text("Activation text", "Put into the prompt together with the LoRA when its card is clicked."),
    "make": Text(
        "Make the LoRA", "Start. The pictures are looked at once; making it again with other weights is fast."
    ),
    "inspect_file": Text("LoRA", "A LoRA of your LoRA folder."),
    "inspect_drop": Text("or drop a LoRA", "A .safetensors file from anywhere."),
    "inspect": Text("Inspect", "What it is, what it changes most, and which programs load it."),
    "convert_to": Text("Convert to", "Key names of the new file. The file you inspect stays as it is."),
    "convert": Text("Convert", "Write it anew, under a fresh name in the LoRA folder."),
    "train_file": Text("LoRA to train from", "Training starts where this LoRA already is, not from nothing."),
    "trainer": Text("Trainer", "The program you train with."),
    "train_rank": Text(
        "Rank to train", "Of the network that is trained. The curve shows how much of the LoRA it keeps."
    ),
    "curve": Text("Show what the rank keeps", "Draw how much of the LoRA's energy each rank keeps."),
    "export": Text("Write the training folder", "The start file, the command or settings, and a read-me."),
    "reload_list": Text("Reload the list", "Look for LoRAs again."),
    "model_choice": Text("Model to download or check", "What it needs is listed above."),
    "source": Text("Download from", "The hub that the files come from. Both have the same."),
    "download": Text("Download", "Fetch what is missing; a broken download goes on where it stopped."),
    "verify": Text("Verify", "Compare every byte on the disk with the hub's checksums."),
    "doctor": Text("Gather what a bug report needs", "Versions, devices and models. Nothing of it is private."),
}
"""By the id of the control, which in the page is ``i2l_<id>``."""

WORDS = {
    "title": "Image to LoRA",
    "line": "Pictures in, a LoRA out. No training: a minute or two, most of it reading weights.",
    "not_applied": "This WebUI makes and lists these LoRAs but cannot apply them: Forge Neo and ComfyUI can.",
    "alone": "Stand-alone: the LoRA is written to your LoRA folder. Forge Neo and ComfyUI apply it.",
    "pane_make": "Make",
    "pane_train": "Train from it",
    "pane_inspect": "Inspect and convert",
    "pane_models": "Models",
    "pane_settings": "Settings",
    "advanced": "Advanced",
    "drop_pictures": "Drop pictures here, paste one, or click to choose",
    "drop_lora": "Drop a .safetensors file here, or click to choose",
    "uploading": "uploading",
    "not_uploaded": "The upload failed. Is the file too large, or the page out of date? Reload it and try again.",
    "language": "Language",
    "by_browser": "as the browser",
    "no_pictures": "No pictures yet. Each one shows the centre square that the model sees.",
    "weight": "Weight",
    "remove": "Remove",
    "model": "Model",
    "ready": "ready",
    "to_download": "download",
    "looking": "Looking which models are here …",
    "saved_as": "will be saved as",
    "as_made": "as made",
    "idle": "Nothing is at work.",
    "waiting": "waiting",
    "running": "at work",
    "stopping": "stopping",
    "done": "done",
    "failed": "failed",
    "cancelled": "cancelled",
    "cancel": "Cancel",
    "step": "step",
    "layers": "layers",
    "left": "left",
    "cached": "taken from the cache",
    "position": "place in the queue",
    "make": "Make",
    "inspect": "Inspect",
    "check": "Check",
    "convert": "Convert",
    "export": "Write training folder",
    "download": "Download",
    "verify": "Verify",
    "models": "Models",
    "curve": "What each rank keeps",
    "doctor": "Bug report",
    "mend": "Mend",
    "mend_for": "Mend for",
    "rank_keeps": "What the rank keeps of the energy",
    "all_layers": "all layers",
    "weakest": "the layers that lose most",
    "kept": "kept",
    "script": "What it runs",
    "last_words": "What the engine said last",
    "rank": "Rank",
    "size": "Size",
    "time": "Time",
    "modules": "Modules",
    "file": "File",
    "copy": "Copy",
    "copied": "Copied",
    "to_txt2img": "Insert into txt2img",
    "to_img2img": "Insert into img2img",
    "open_lora": "Open the Lora tab",
    "who_loads": "Who loads it",
    "program": "Program",
    "verdict": "Verdict",
    "mends": "What mends it",
    "architecture": "Made for",
    "dialect": "Key names",
    "dtype": "Number format",
    "finite": "Only finite numbers",
    "yes": "yes",
    "no": "no",
    "missing": "Missing modules",
    "foreign": "Foreign keys",
    "made_by": "Made by",
    "heat_map": "Where the change is, and how many ranks carry it",
    "folder": "Folder",
    "run_this": "To train, run",
    "licence": "Licence",
    "place": "Place",
    "not_here": "not here",
    "here": "here",
    "downloaded": "Downloaded",
    "goes_to": "Downloads go to",
    "origin": "From",
    "agree": "I agree to these licences",
    "all_here": "All its weights are here.",
    "verified": "Verified against",
    "part": "Part",
    "mini_note": "mini is a built-in miniature with a small world of its own: everything works at once, for a first try.",  # noqa: E501
    "drawn": "Drawn by the miniature with this LoRA, and without it",
    "unreachable": "The WebUI does not answer. It may have been closed, or restarts: this page goes on when it is back.",  # noqa: E501
    "start": "Start",
    "encode": "Look at the pictures",
    "decode": "Write the LoRA",
    "saved": "Saved.",
    "saved_as_file": "Saved as",
}

STEPS = {"start": "start", "encode": "encode", "decode": "decode"}
"""First word of a step's title in the engine -> its word here."""


def label(id: str) -> str:
    return CONTROLS[id].label


def everything() -> list[str]:
    """Every text that a localisation is to know."""
    from i2l_ext.webui.settings import OPTIONS

    texts = [text for control in CONTROLS.values() for text in (control.label, control.tip) if text]
    texts += WORDS.values()
    texts += [option.label for option in OPTIONS] + [option.tip for option in OPTIONS]
    return list(dict.fromkeys(texts))
