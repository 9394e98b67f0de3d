"""Every text of the tab, in one table: labels and tooltips of controls, and words.

The English text is the key in languages/*.json. So each text has an element of its own, and numbers and names have
elements beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

from i2l_ext.webui.settings import AS_MADE, SETTINGS


@dataclass(frozen=True)
class Text:
    label: str
    tip: str = ""


CONTROLS = {
    "files": Text("Pictures", "Drop pictures here, click to choose them, or paste one. 1 to 5 pictures work best."),
    "server_folder": Text("Folder on this machine", "All pictures in this folder, without uploading them."),
    "add_folder": Text("Add folder", "Add the pictures of that folder."),
    "name": Text("Name", "The LoRA's name, as it will stand in prompts: letters of any script, digits, . _ and -"),
    "strength": Text("Strength", "Scales the whole effect: 1 as the model made it, 0.5 half of it."),
    "rank": Text("Rank", "As made keeps everything. A lower rank is a smaller file that keeps the strongest part."),
    "dialect": Text("Key format", "How tensors are named in the file: webui suits the WebUIs and ComfyUI."),
    "dtype": Text("Number format", "Of the numbers in the file: bf16 as made, fp32 twice as large."),
    "subfolder": Text("Sub-folder", "Inside the LoRA folder. It is made if it is not there."),
    "description": Text("Description", "Shown on the LoRA's card."),
    "activation_text": Text("Activation text", "Put into the prompt together with the LoRA when its card is clicked."),
    "make": Text("Make the LoRA", "Start. The pictures are analysed once; making it again with other shares is fast."),
    "inspect_file": Text("LoRA", "A LoRA of your LoRA folder."),
    "inspect_drop": Text("or drop a LoRA", "A .safetensors file from anywhere."),
    "inspect": Text("Inspect", "What it is, what it changes most, and which programs load it."),
    "convert_to": Text("Convert to", "Key format of the new file. The file you inspect stays as it is."),
    "convert": Text("Convert", "Write a new file, under a new name in the LoRA folder."),
    "train_file": Text("LoRA to train from", "Training starts where this LoRA already is, not from nothing."),
    "trainer": Text("Trainer", "The program you train with."),
    "train_rank": Text(
        "Rank to train", "Of the network that is trained. The curve shows how much of the LoRA it keeps."
    ),
    "curve": Text("Show what the rank keeps", "Show how much of the LoRA's effect each rank keeps."),
    "export": Text("Write the start folder", "The start file, the command or settings, and a read-me."),
    "reload_list": Text("Reload the list", "Look for LoRAs again."),
    "doctor": Text("Gather what a bug report needs", "Versions, devices and models. Nothing of it is private."),
}
"""By the id of the control, which in the page is ``i2l_<id>``."""

WORDS = {
    "title": "Image to LoRA",
    "line": "Turns a few pictures of one style into a LoRA, without training. This usually takes minutes; "
    "the first use downloads 19 to 63 GB.",
    "not_applied": "This WebUI makes and lists these LoRAs but cannot apply them: Forge Neo, SD.Next and ComfyUI can.",
    "standalone": "Stand-alone: the LoRA is written to your LoRA folder. Forge Neo, SD.Next and ComfyUI apply it.",
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
    "share": "Share",
    "remove": "Remove",
    "model": "Model",
    "ready": "ready",
    "looking": "Looking for models …",
    "saved_as": "will be saved as",
    "as_made": AS_MADE,
    "waiting": "waiting",
    "running": "running",
    "stopping": "stopping",
    "done": "done",
    "failed": "failed",
    "cancelled": "cancelled",
    "cancel": "Cancel",
    "step": "step",
    "layers": "layers",
    "left": "left",
    "cached": "taken from the cache",
    "make": "Make",
    "inspect": "Inspect",
    "check": "Check",
    "convert": "Convert",
    "export": "Write start folder",
    "download": "Download",
    "verify": "Verify",
    "models": "Models",
    "curve": "What each rank keeps",
    "doctor": "Bug report",
    "mend": "Repair",
    "repair_for": "Repair for",
    "rank_keeps": "What the rank keeps of the effect",
    "all_layers": "all layers",
    "weakest": "the layers that lose most",
    "kept": "effect kept",
    "script": "What it runs",
    "last_output": "The end of the engine's output",
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
    "repairs": "How to repair it",
    "architecture": "Made for",
    "dialect": "Key format",
    "dtype": "Number format",
    "finite": "No NaN or infinite values",
    "yes": "yes",
    "no": "no",
    "missing": "Missing modules",
    "foreign": "Unknown keys",
    "made_by": "Made by",
    "heat_map": "Where the change is, and its effective rank",
    "folder": "Folder",
    "run_this": "To train, run",
    "licence": "Licence",
    "place": "Place",
    "not_here": "not downloaded",
    "here": "downloaded",
    "downloaded": "Downloaded",
    "goes_to": "Downloads go to",
    "origin": "From",
    "agree": "I agree to these licences",
    "all_here": "All its model files are downloaded.",
    "verified": "Verified against",
    "part": "Model file",
    "mini_note": "mini is the built-in test model. It knows simple shapes only and needs no download, for a first try.",
    "drawn": "Generated by mini: with this LoRA above, without it below",
    "unreachable": "The WebUI does not answer. It was closed or is restarting: this page continues when it is back.",
    "start": "Start",
    "encode": "Analyse the pictures",
    "decode": "Write the LoRA",
    "saved": "Saved.",
    "saved_as_file": "Saved as",
    "share_wrong": "A share is a number greater than 0. To leave a picture out, remove it.",
    "dismiss": "Dismiss",
    "pause": "Pause",
    "paused": "paused",
    "resume": "Resume",
    "fetching": "downloading",
    "free": "Free on the disk",
    "try_it": "Try it",
    "needs_download": "To be downloaded:",
    "download_and_make": "Download, then make",
    "not_now": "Not now",
    "files_and_licences": "Files and licences",
    "mini_loads": "A LoRA of the built-in test model: no program loads it.",
    "loads": "yes",
    "loads_converted": "after conversion",
    "loads_not": "no",
    "made_before": "Made before",
    "make_variants": "Make variants",
    "vary_strength": "Strength",
    "vary_rank": "Rank",
    "vary_twice": "Twice as much of picture",
    "make_them": "Make them",
    "by_hand_diffusers": "In your training script, with start.py beside it, in place of add_adapter(...)",
    "by_hand_flymyai": "In its train.py, with start.py beside it, in place of flux_transformer.add_adapter(...)",
    "beside_loras": "(beside the LoRA folder)",
    "name_empty": "Give the LoRA a name.",
    "name_long": "This name is too long.",
    "name_ends": "A name cannot begin with '.' or '-', or end with '.'.",
    "name_dots": "A name cannot have two dots in a row.",
    "name_none": "This name means 'no LoRA' to a WebUI.",
    "name_reserved": "This name is reserved by Windows.",
    "name_suffix": "A name cannot end like the name of a file.",
    "name_character": "A name cannot have this character:",
    "name_scripts": "One word cannot mix letters of two scripts:",
    "name_better": "Possible is",
}

STEPS = ("start", "encode", "decode")
"""First words of the ids of steps, which are keys of WORDS."""


def all_texts() -> list[str]:
    """Every text that a localisation has to know."""
    texts = [text for control in CONTROLS.values() for text in (control.label, control.tip) if text]
    texts += WORDS.values()
    texts += [text for setting in SETTINGS for text in (setting.label, setting.tip)]
    return list(dict.fromkeys(texts))
