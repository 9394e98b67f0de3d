"""A first LoRA from the open tab to the prompt, one picture a step: docs/film.md.

In Forge Neo's look where FAKE_CSS names its style sheet, which is not ours to ship:

    I2L_SCREENSHOTS=docs/images/film FAKE_CSS=FORGE_NEO/style.css python install.py browser tests/browser/test_film.py
"""

from pathlib import Path

import pytest
from PIL import Image
from steps import IMAGES, choose_model, drop, finish, job, made_button, name_it

from conftest import PLACES
from i2l_ext.mini.sampler import SAMPLES

SIZE = {"width": 1200, "height": 760}
PLAIN = """(root) => {
    for (const words of document.querySelectorAll("#txt2img_words, #img2img_words")) words.style.display = "none";
    const walker = document.createTreeWalker(document.querySelector("#i2l"), NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const node = walker.currentNode;
        if (node.data.includes(root)) node.data = node.data.replace(root + "/weights", "webui/models/i2l");
    }
}"""
"""Hides what only the stand-in has, and puts a WebUI's folder in the place of the test's."""


@pytest.fixture
def filmed(place):
    if PLACES[place.version][1] != "forge-neo":
        pytest.skip("the film is of Forge Neo")
    return place


class Film:
    """Takes a numbered picture of what stands on a page, where that is asked for."""

    def __init__(self, page, root):
        self.page, self.root, self.taken = page, root, 0

    def take(self, name, at=None, height=SIZE["height"]):
        """``at``: what is to be in the middle; the top of the page without it."""
        self.taken += 1
        if not IMAGES:
            return
        self.page.set_viewport_size({**SIZE, "height": height})
        self.page.evaluate(PLAIN, str(self.root))
        if at is None:
            self.page.evaluate("window.scrollTo(0, 0)")
        else:
            at.evaluate("(one) => one.scrollIntoView({block: 'center'})")
        self.page.wait_for_timeout(700)  # what gradio fades in
        path = Path(IMAGES) / f"{self.taken:02}-{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=path)
        Image.open(path).convert("RGB").quantize(128).save(path, optimize=True)


def test_a_first_lora_from_the_open_tab_to_the_prompt(filmed, open_page):
    page = open_page()
    page.set_viewport_size(SIZE)
    film = Film(page, filmed.root)
    film.take("open")
    drop(page, [str(path) for path in sorted(SAMPLES.glob("meadow*.png"))])
    film.take("drop")
    choose_model(page, "z-image-style")
    name_it(page, "meadow")
    film.take("model", page.locator('#i2l_models input[value="z-image-style"]'))
    page.locator("#i2l_make").click()
    offer = page.locator("#i2l_make_offer .i2l-offer")
    offer.locator(".i2l-primary").wait_for()
    film.take("licences", offer)
    offer.locator("input[name=agreed]").check()
    offer.locator(".i2l-primary").click()
    job(page, "z-image-style").locator(".i2l-step", has_text="19.0 GB").wait_for()
    film.take("download", job(page, "z-image-style"))
    job(page, "z-image-style").get_by_role("button", name="Pause").click()
    job(page, "z-image-style").locator("em", has_text="paused").wait_for()
    job(page, "z-image-style").get_by_role("button", name="Dismiss").click()
    job(page, "z-image-style").wait_for(state="detached")
    choose_model(page, "mini")
    film.take("mini", page.locator('#i2l_models input[value="mini"]'))
    page.locator("#i2l_make").click()
    job(page, "meadow").or_(page.locator("#i2l_make_result h3", has_text="meadow")).first.wait_for()
    film.take("making")
    finish(page, "meadow")
    film.take("made")
    made_button(page, "Open the Lora tab").click()
    page.locator('#txt2img_lora_cards [data-name="meadow"]').wait_for()
    film.take("card", height=300)
    page.set_viewport_size(SIZE)
    page.locator("button", has_text="Image to LoRA").first.click()
    made_button(page, "Insert into txt2img").click()
    prompt = page.locator("#txt2img_prompt textarea")
    prompt.wait_for()
    assert prompt.input_value() == "<lora:meadow:1>"
    film.take("prompt", height=300)
    assert film.taken == 10
