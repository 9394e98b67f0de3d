"""How the tab looks when it is used: every pane with something in it, light and dark, wide and narrow."""

import shutil

import pytest
from looks import CONTRAST, NAMELESS, NARROW, OUTSIDE, UNFOCUSED
from steps import IMAGES, drop, finish, look, pane, qwen_lora, start, stop

from i2l_ext.mini.sampler import SAMPLES

SIZES = [(1400, 900), (900, 900)]
PANES = ("Make", "Several styles", "Library", "Train from it", "Inspect and convert", "Models", "Settings")


@pytest.fixture(scope="module")
def lived_in(place, pictures):
    """A place whose LoRA folder holds LoRAs of a known program, of a long name, and one that is none."""
    qwen_lora(place.lora / "ink.safetensors")
    below = place.lora / "watercolours"
    below.mkdir()
    qwen_lora(below / "a_rather_long_name_as_people_give_them_to_their_files_v2-final.safetensors")
    (place.lora / "broken.safetensors").write_bytes(b"no LoRA at all")
    styles = place.root / "slow styles"
    (styles / "two together").mkdir(parents=True, exist_ok=True)
    for target in (styles, styles / "two together"):
        shutil.copy(pictures[0], target)
        shutil.copy(pictures[1], target)
    yield place
    for path in (place.lora / "ink.safetensors", place.lora / "broken.safetensors"):
        path.unlink(missing_ok=True)
    shutil.rmtree(below)


def fill_make(page, pictures, name):
    """A result with all that can be unfolded."""
    start(page, pictures[:2], name)
    finish(page, name)
    for summary in ("Make variants", "Made before"):
        found = page.locator("#i2l_make_result summary", has_text=summary)
        if found.count():
            found.first.click()
    page.locator("#i2l_advanced .label-wrap").first.click()


def fill_batch(page, place, pictures):
    """LoRAs that were made of the pictures in Make; then, in the same pane, a folder at work."""
    pane(page, "Several styles")
    result = page.locator("#i2l_batch_result").first
    before = result.text_content()
    page.locator("#i2l_each_of_tray").click()
    page.wait_for_function("([one, before]) => one.textContent !== before", arg=[result.element_handle(), before])
    result.locator(".i2l-shelf li").nth(1).wait_for()
    page.locator("#i2l_batch_folder textarea, #i2l_batch_folder input").first.fill(str(place.root / "slow styles"))
    page.locator("#i2l_each_of_folder").click()
    page.locator("#i2l_batch_activity .i2l-job", has_text="slow styles").wait_for()


def fill_library(page, name):
    """The list, with one LoRA ticked."""
    pane(page, "Library")
    page.locator("#i2l_library_list button", has_text="Look again").click()
    page.locator(f'#i2l_library_list input[value="{name}.safetensors"]').check()


def fill_files(page, place):
    pane(page, "Inspect and convert")
    page.locator('#i2l_inspect_drop input[type="file"]').first.set_input_files(str(place.lora / "ink.safetensors"))
    page.locator("#i2l_inspect_drop .i2l-dropped", has_text="ink").first.wait_for()
    page.locator("#i2l_inspect").click()
    page.locator("#i2l_inspect_result h3", has_text="ink").wait_for()
    page.locator("#i2l_inspect_result figure img").wait_for()
    page.locator("#i2l_inspect_result .i2l-loaders summary").click()


def fill_models(page):
    pane(page, "Models")
    page.locator("#i2l_catalogue details").first.locator("summary").click()
    page.locator("#i2l_doctor").click()
    page.locator("#i2l_doctor_result pre").wait_for()


def spoil_make(page):
    """A wrong share, a wrong name, and the offer of a download."""
    pane(page, "Make")
    page.locator("#i2l_tray input").first.fill("0")
    page.locator("#i2l_name textarea, #i2l_name input").first.fill("a/b")
    page.locator("#i2l_saved_as .i2l-error").wait_for()
    page.locator("#i2l_models .i2l-model button").first.click()
    page.locator("#i2l_make_offer .i2l-offer").wait_for()
    page.locator("#i2l_make_offer summary").click()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_every_pane_with_something_in_it(lived_in, open_page, pictures, dark):
    page = open_page(dark)
    fill_make(page, pictures, "dusk_dark" if dark else "dusk")
    fill_batch(page, lived_in, pictures)
    fill_library(page, "ink")
    page.locator("#i2l_library_list li", has_text="broken").locator(".i2l-error").wait_for()
    lines = page.evaluate("[...document.querySelectorAll('#i2l .i2l-shelf p')].map((p) => getComputedStyle(p).display)")
    assert set(lines) == {"block"}, "two facts run into one another"
    fill_files(page, lived_in)
    fill_models(page)
    spoil_make(page)
    wrong = []
    for title in PANES:
        if title == "Settings" and lived_in.version != "6":
            continue  # they are on the host's own page
        pane(page, title)
        for width, height in SIZES:
            page.set_viewport_size({"width": width, "height": height})
            page.wait_for_timeout(600)  # what gradio fades in
            measured = page.evaluate(CONTRAST)
            assert measured["seen"] > 5, (title, measured)
            look(page, lived_in, f"pane-{title.split()[0].lower()}-{width}", dark)
            wrong += [(title, width, "contrast", one) for one in measured["found"]]
            for kind, script in {"nameless": NAMELESS, "outside": OUTSIDE, "narrow": NARROW}.items():
                wrong += [(title, width, kind, one) for one in page.evaluate(script)]
        page.keyboard.press("Tab")  # from here on the keyboard is in use
        wrong += [(title, "no focus ring", one) for one in page.evaluate(UNFOCUSED)]
    pane(page, "Several styles")
    stop(page, "slow styles")
    assert wrong == [], "\n".join(map(str, wrong))


BARE = """(dark) => {
    const isOurs = (sheet) => {
        try { return [...sheet.cssRules].some((rule) => /^#i2l /.test(rule.selectorText)); }
        catch (error) { return false; }  // of another site
    };
    for (const sheet of document.styleSheets) if (!isOurs(sheet)) sheet.disabled = true;
    document.documentElement.style.colorScheme = dark ? "dark" : "light";
    document.body.style.background = "Canvas";
}"""
"""What SD.Next's modern theme does to the page: the style sheets of gradio are gone, and so are its variables."""

LOOKS_OF = """([selector, name]) => getComputedStyle(document.querySelector("#i2l " + selector))[name]"""


@pytest.mark.short
def test_a_theme_without_gradios_colours(place, open_page, pictures):
    page = open_page()
    drop(page, pictures[:1])
    for dark, shade in ((False, "rgb(255, 255, 255)"), (True, "rgb(18, 18, 18)")):
        page.evaluate(BARE, dark)
        page.locator("#i2l_tray .i2l-card").first.get_by_text("Crop").click()
        page.locator(".i2l-crop[open] .i2l-square").first.wait_for()
        assert page.evaluate(LOOKS_OF, [".i2l-crop", "backgroundColor"]) == shade, "the page shows through"
        for selector in (".i2l-crop", ".i2l-crop .i2l-button", ".i2l-model"):
            assert page.evaluate(LOOKS_OF, [selector, "borderTopStyle"]) == "solid", selector
        page.keyboard.press("Escape")
        assert page.evaluate(CONTRAST)["found"] == []


POINTED = """button:hover {background-color: #1f7a7a}
    button:hover span {color: #fff}
    .tab-nav button:is(.selected, :hover), [role=tab]:is([aria-selected=true], :hover) {
        background-color: #1f7a7a; color: #fff}
    * {transition: none !important}"""
"""What that theme says of buttons under the pointer and of a chosen pane: a ground of its own, and a text for it."""


@pytest.mark.short
def test_what_is_pointed_at_can_be_read(place, open_page, pictures):
    page = open_page()
    drop(page, pictures[:1])
    wrong = []
    for bare in (False, True):
        if bare:
            page.evaluate(BARE, False)
        page.add_style_tag(content=POINTED)
        for title in ("Several styles", "Make"):
            pane(page, title)
            buttons = page.locator("#i2l button:visible:enabled").all()
            for button in {button.get_attribute("class"): button for button in buttons}.values():  # one of each kind
                button.hover(force=True)
                wrong += [(bare, *one) for one in page.evaluate(CONTRAST)["found"]]
    assert wrong == [], "\n".join(map(str, wrong))


@pytest.mark.skipif(not IMAGES, reason="it takes pictures, where I2L_SCREENSHOTS names a folder for them")
def test_pictures_for_the_documentation(place, open_page, pictures):
    """I2L_SCREENSHOTS=docs/images python install.py browser tests/browser -k documentation"""
    if place.version != "6":
        pytest.skip("the documentation shows the tab stand-alone")
    meadow = [str(path) for path in sorted(SAMPLES.glob("meadow*.png"))]
    styles = place.root / "styles"
    (styles / "meadow").mkdir(parents=True)
    for sample in SAMPLES.glob("*.png"):
        shutil.copy(sample, styles / "meadow" if str(sample) in meadow else styles)
    page = open_page(dark=True)
    drop(page, meadow)
    look(page, place, "tab", dark=True)
    page = open_page()
    start(page, meadow, "meadow")
    finish(page, "meadow")
    qwen_lora(place.lora / "ink.safetensors")
    look(page, place, "made")
    pane(page, "Several styles")
    page.locator("#i2l_batch_folder textarea, #i2l_batch_folder input").first.fill(str(styles))
    page.locator("#i2l_each_of_folder").click()
    page.locator("#i2l_batch_result .i2l-shelf li").nth(4).wait_for()
    look(page, place, "styles")
    fill_library(page, "ink")
    look(page, place, "library")
    pane(page, "Train from it")
    page.locator("#i2l_curve").click()
    page.locator("#i2l_train_curve svg").wait_for()
    page.locator("#i2l_export").click()
    page.locator("#i2l_train_result code.i2l-prompt").wait_for()
    look(page, place, "train")
