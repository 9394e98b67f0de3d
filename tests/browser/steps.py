"""What a person does in the tab, and what is looked at then."""

import json
import os
import re
from pathlib import Path

from PIL import Image

IMAGES = os.environ.get("I2L_SCREENSHOTS")
"""A folder to keep pictures of the page in."""

HOME = """root => {
    const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (texts.nextNode()) texts.currentNode.data = texts.currentNode.data.replaceAll(root, "/home/me");
}"""
"""Writes a folder of the test as one that a reader could have."""


def drop(page, pictures):
    before = page.locator("#i2l_tray .i2l-card").count()
    page.locator('#i2l_files input[type="file"]').first.set_input_files(pictures)
    page.locator("#i2l_tray .i2l-card").nth(before + len(pictures) - 1).wait_for()


def name_it(page, name):
    page.locator("#i2l_name textarea, #i2l_name input").first.fill(name)
    page.locator("#i2l_saved_as .i2l-value", has_text=name).wait_for()


def start(page, pictures, name):
    drop(page, pictures)
    choose_model(page, "mini")
    name_it(page, name)
    page.locator("#i2l_make").click()


def job(page, title):
    return page.locator(".i2l-job", has_text=title)


def share(page, title):
    return float(job(page, title).locator('[role="progressbar"]').get_attribute("aria-valuenow"))


def finish(page, name):
    page.locator("#i2l_make_result h3", has_text=re.compile(f"^{name}$")).wait_for()


def made_button(page, title):
    """A button of the LoRA that was made last; those made before have the same ones, folded away."""
    return page.locator("#i2l_make_result .i2l-made button", has_text=title)


def stop(page, title):
    job(page, title).locator('[data-i2l="cancel"]').click()
    job(page, title).locator("em", has_text="cancelled").wait_for()


def dismiss_failures(page):
    """Those that earlier tests have left: they are told in each browser until they are dismissed there."""
    page.locator("#i2l_jobs").wait_for(state="attached")
    page.evaluate("document.querySelectorAll('#i2l [data-i2l=dismiss]').forEach((one) => one.click())")
    page.locator("#i2l .i2l-failed").first.wait_for(state="detached")


def pane(page, title):
    """gradio 3.41 gives its tabs no role; later ones keep hidden twins of them to measure."""
    tabs = page.locator('#i2l_panes button[role="tab"], #i2l_panes > .tab-nav > button')
    tabs.filter(has_text=re.compile(f"^\\s*{title}\\s*$")).first.click()


def look(page, place, name, dark=False):
    """Keep a picture of the page, where that is asked for."""
    if IMAGES:
        Path(IMAGES).mkdir(parents=True, exist_ok=True)
        parts = (name, *([] if place.version == "6" else [place.version]), "dark" if dark else "light")
        path = Path(IMAGES) / f"{'-'.join(parts)}.png"
        page.evaluate(HOME, str(place.root))
        page.screenshot(path=path, full_page=True)
        Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)  # a third of the bytes


def no_leftovers(place):
    return not list(place.root.rglob("*.part"))


def images_of(file):
    """What the LoRA's metadata tells of the pictures it came from."""
    header, _ = json.JSONDecoder().raw_decode(file.read_bytes()[8:].decode(errors="replace"))
    return json.loads(header["__metadata__"]["i2l.images"])


def choose_model(page, name):
    """Models that need a download stand first; the miniatures may be folded away."""
    radio = page.locator(f'#i2l_models input[value="{name}"]')
    if not radio.is_visible():
        page.locator("#i2l_models .i2l-try > summary").click()
    radio.check()


def qwen_lora(path, rank=2):
    """A LoRA of some of Qwen-Image's layers, as the tab makes them."""
    import torch
    from safetensors.torch import save_file

    tensors = {}
    for block in range(2):
        for layer in ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"):
            name = f"diffusion_model.transformer_blocks.{block}.{layer}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(rank, 3072) / 50
            tensors[f"{name}.lora_B.weight"] = torch.randn(3072, rank) / 50
    save_file(tensors, str(path))
