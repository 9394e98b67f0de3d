"""A file in the LoRA folder, with its preview and its note, for tests."""

from pathlib import Path

from PIL import Image

from i2l_ext import library
from i2l_ext.library import metadata

PREVIEW = Image.new("RGB", (16, 16), "teal")
NOTE = metadata.sidecar(notes="Über Größe", sd_version="qwen")


def write(path, stem):
    path.write_bytes(b"lora " + stem.encode())


def save(folder, name="style", write=write, **options):
    return library.save_lora(folder, name, write, preview=PREVIEW, sidecar=NOTE, **options)


def listing(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def triple(stem):
    return sorted(f"{stem}{end}" for end in (".json", ".preview.png", ".safetensors"))
