"""The page as a person finds it: what it says and where, in one glance, with keyboard and reader, light and dark."""

import json
import re
import shutil

import pytest
from looks import NAMELESS
from steps import choose_model, dismiss_failures, drop, finish, job, look, name_it, pane, qwen_lora, start, stop

SIZES = [(1400, 900), (900, 900)]

BY_THE_BUTTON = """() => {
    const job = document.querySelector("#i2l_make_activity .i2l-job"), place = job && job.getBoundingClientRect();
    const below = document.querySelector("#i2l_make").getBoundingClientRect().bottom;
    return place && place.height && place.top >= below && place.top - below < 60 && place.bottom <= innerHeight;
}"""


def sized(page, width, height):
    page.set_viewport_size({"width": width, "height": height})
    page.wait_for_timeout(400)


def in_sight(page, selector):
    """Whether all of a place is in the window as it is, without scrolling."""
    box = page.locator(selector).first.bounding_box()
    size = page.viewport_size
    return box is not None and box["y"] >= 0 and box["y"] + box["height"] <= size["height"] + 1


@pytest.mark.short
def test_a_share_that_is_no_share_is_told_before_the_job(place, open_page, pictures):
    page = open_page()
    drop(page, pictures[:2])
    choose_model(page, "mini")
    name_it(page, "shares")
    field = page.locator("#i2l_tray input").nth(1)
    for wrong in ("0", "-2", ""):
        field.fill(wrong)
        page.locator("#i2l_share_wrong").wait_for()
        assert field.get_attribute("aria-invalid") == "true"
        page.locator("#i2l_make").click()
        page.locator("#i2l_make_error", has_text="share of picture 2").first.wait_for()
    assert job(page, "shares").count() == 0
    field.fill("2.5")
    page.locator("#i2l_share_wrong").wait_for(state="hidden")


@pytest.mark.short
def test_names_in_any_script(place, open_page, pictures):
    page = open_page()
    dismiss_failures(page)
    field = page.locator("#i2l_name textarea, #i2l_name input").first
    for name in ("水彩", "стиль", "ガラス絵"):
        field.fill(name)
        page.locator("#i2l_saved_as .i2l-value", has_text=f"{name}.safetensors").wait_for()
    field.fill("水:彩")
    told = page.locator("#i2l_saved_as .i2l-error")
    told.filter(has_text="A name cannot have this character: ':'").wait_for()
    drop(page, pictures[:1])
    choose_model(page, "mini")
    page.locator("#i2l_make").click()
    page.wait_for_timeout(1500)
    assert page.locator("#i2l .i2l-error:visible").count() == 1  # said once, beside the name
    told.locator("button", has_text="水-彩").click()
    page.locator("#i2l_saved_as .i2l-value", has_text="水-彩.safetensors").wait_for()
    page.locator("#i2l_make").click()
    finish(page, "水-彩")
    assert (place.lora / "水-彩.safetensors").is_file()
    assert "<lora:水-彩:1>" in page.locator("#i2l_make_result").first.inner_text()
    page.locator("#i2l_saved_as .i2l-value", has_text="水-彩-2.safetensors").wait_for()  # the name is taken now
    pane(page, "Train from it")
    held = page.locator("#i2l_train_file input").first
    page.wait_for_function("(held) => held.value === '水-彩.safetensors'", arg=held.element_handle())


def test_a_name_is_refused_in_the_pages_language(place, browser):
    context = browser.new_context(locale="zh-CN", viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.set_default_timeout(60_000)
    page.goto(place.url, wait_until="domcontentloaded")
    page.locator("#i2l_panes").wait_for(state="attached")
    if place.version != "6":
        page.locator("#tabs button", has_text="Image to LoRA").first.click()
    page.locator("#i2l_name textarea, #i2l_name input").first.fill("水:彩")
    page.locator("#i2l_saved_as .i2l-error", has_text="名称不能包含此字符").wait_for()
    context.close()


@pytest.mark.short
def test_progress_and_failures_stand_by_their_button(place, open_page, pictures):
    page = open_page()
    sized(page, 1400, 900)
    start(page, pictures[:1], "slow_here")
    card = job(page, "slow_here")
    card.wait_for()
    page.wait_for_function(BY_THE_BUTTON)  # a poll draws it anew: both places at one moment
    pane(page, "Models")
    brief = page.locator("#i2l_jobs .i2l-brief", has_text="slow_here")
    brief.click()  # it leads back
    card.wait_for()
    card.locator("[data-i2l=cancel]").focus()
    page.wait_for_timeout(2500)
    assert page.evaluate("document.activeElement.dataset.i2l") == "cancel", "the keyboard lost its place"
    stop(page, "slow_here")
    card.get_by_role("button", name="Dismiss").click()
    card.wait_for(state="detached")
    page.wait_for_timeout(5000)
    assert card.count() == 0


@pytest.mark.short
def test_a_button_that_is_drawn_anew_at_once_keeps_the_keyboard(place, open_page):
    """A poll may come right after the keyboard has moved on."""
    page = open_page()
    page.locator("#i2l_models button").nth(1).focus()
    page.wait_for_timeout(500)
    redraw = """async (one) => {
        const fresh = one.cloneNode(true);
        one.focus();
        one.replaceWith(fresh);
        await new Promise((done) => setTimeout(done));
        return document.activeElement === fresh;
    }"""
    assert page.locator("#i2l_models button").nth(2).evaluate(redraw), "for a moment a key would have been lost"


@pytest.mark.short
def test_two_buttons_at_once_are_both_heard(place, open_page):
    page = open_page()
    pane(page, "Models")
    page.locator("#i2l_catalogue .i2l-model-row button").first.wait_for()
    pane(page, "Make")
    page.evaluate("""for (const place of ["#i2l_models .i2l-model", "#i2l_catalogue .i2l-model-row"])
        document.querySelector(place + " [data-i2l=act]").click()""")
    for offer in ("make", "models"):
        page.locator(f"#i2l_{offer}_offer .i2l-offer").wait_for(state="attached", timeout=30_000)


@pytest.mark.short
def test_a_model_that_is_absent_is_downloaded_where_make_is_pressed(place, open_page, pictures):
    page = open_page()
    drop(page, pictures[:1])
    name_it(page, "absent")
    first = page.locator("#i2l_models .i2l-model").first
    assert "qwen-image-style" in first.inner_text() and "20.6 GB" in first.inner_text()
    first.locator("input").check()
    page.locator("#i2l_make").click()
    offer = page.locator("#i2l_make_offer .i2l-offer")
    offer.wait_for()
    assert "Free on the disk" in offer.inner_text()
    offer.locator("input[name=agreed]").check()
    offer.get_by_role("button", name="Download, then make").click()
    job(page, "qwen-image-style").first.wait_for()
    job(page, "absent").locator("em", has_text="waiting").wait_for()
    page.locator("#i2l_models .i2l-missing", has_text="downloading").first.wait_for()
    job(page, "qwen-image-style").get_by_role("button", name="Pause").click()
    page.locator(".i2l-job em", has_text="paused").or_(
        page.locator(".i2l-job em", has_text="cancelled")
    ).first.wait_for()
    page.wait_for_timeout(1500)
    assert page.locator(".i2l-job [data-i2l=cancel]").count() == 0  # what waited for it has gone, too


@pytest.mark.short
def test_the_result_and_what_follows_from_it(place, open_page, pictures):
    page = open_page()
    dismiss_failures(page)
    start(page, pictures[:2], "shown")
    finish(page, "shown")
    result = page.locator("#i2l_make_result .i2l-result").first
    for width, height in SIZES:
        sized(page, width, height)
        heading = result.locator("h3").bounding_box()
        assert heading["height"] < 40 and result.locator("code").first.bounding_box()["height"] < 40, "it wraps"
        page.mouse.wheel(0, -5000)
        assert (
            in_sight(page, "#i2l_make")
            and in_sight(page, "#i2l_make_result h3")
            and in_sight(page, "#i2l_models .i2l-model")
        )
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "it is wider than the window"
        look(page, place, f"made-{width}")
    result.locator(".i2l-variants summary").click()
    result.locator(".i2l-variants label", has_text="1.5").first.click()
    result.locator(".i2l-variants fieldset", has_text="Rank").locator("label").first.click()
    result.get_by_role("button", name="Make them").click()
    finish(page, "shown-r4")
    result.locator("summary", has_text="Made before").click()
    result.locator(".i2l-earlier", has_text="shown-s1.5").wait_for()
    assert {"shown-s1.5.safetensors", "shown-r4.safetensors"} <= {path.name for path in place.lora.iterdir()}
    result.locator("button", has_text="Train from it").click()
    page.locator("#i2l_export").first.wait_for()
    held = page.locator("#i2l_train_file input").first
    page.wait_for_function("(held) => held.value === 'shown-r4.safetensors'", arg=held.element_handle())


def test_a_start_folder_for_a_trainer_without_a_command_of_its_own(place, open_page):
    qwen_lora(place.lora / "to_train.safetensors")
    page = open_page()
    pane(page, "Train from it")
    for control, choice in (("train_file", "to_train.safetensors"), ("trainer", "diffusers")):
        page.locator(f"#i2l_{control} input").first.click()
        page.locator('[role="option"], [data-testid="dropdown-option"]').filter(has_text=choice).first.click()
    page.locator("#i2l_export").click()
    result = page.locator("#i2l_train_result .i2l-result")
    folder = place.lora.parent / "i2l-training" / "to_train-diffusers-rank16"
    result.locator("code", has_text=f"python {folder}/train.py").first.wait_for()
    assert (folder / "train.py").is_file() and (folder / "start.py").is_file()
    assert "python start.py" not in result.inner_text()


def test_what_is_converted_keeps_its_preview(place, open_page):
    qwen_lora(place.lora / "seen.safetensors")
    shutil.copy(next(place.lora.glob("*.preview.png"), place.lora / "none"), place.lora / "seen.preview.png")
    (place.lora / "seen.json").write_text(json.dumps({"description": "mine", "sd version": "Unknown"}))
    page = open_page()
    pane(page, "Inspect and convert")
    page.locator("#i2l_inspect_file input").first.click()
    options = page.locator('[role="option"], [data-testid="dropdown-option"]')
    options.filter(has_text=re.compile("^\\W*seen.safe")).first.click()
    page.locator("#i2l_convert").click()
    page.locator("#i2l_convert_result b", has_text="seen-webui").first.wait_for()
    assert (place.lora / "seen-webui.preview.png").is_file()
    assert json.loads((place.lora / "seen-webui.json").read_text())["description"] == "mine"


JUMPS = """() => new Promise((done) => {
    const tops = new Set(), end = Date.now() + 4000;
    const look = () => {
        tops.add(Math.round(document.getElementById("i2l_panes").getBoundingClientRect().top));
        if (Date.now() < end) requestAnimationFrame(look);
        else done([...tops]);
    };
    look();
})"""


def test_the_page_lies_still_while_it_asks(place, open_page, pictures):
    """Gradio gives a block a height of its own as long as an answer for it is out."""
    page = open_page()
    start(page, pictures[:1], "slow_still")
    job(page, "slow_still").wait_for()
    page.locator("#i2l_jobs .i2l-brief").wait_for()
    tops = page.evaluate(JUMPS)
    stop(page, "slow_still")
    assert len(tops) == 1, tops


def test_the_keyboard_reaches_everything_and_it_has_names(place, open_page, pictures):
    page = open_page()
    drop(page, pictures[:1])
    assert page.evaluate(NAMELESS) == []
    reached = set()
    page.locator("#i2l_files input").first.focus()
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("(document.activeElement.closest('[id^=i2l_]') || {}).id || ''"))
    assert {"i2l_tray", "i2l_models", "i2l_name", "i2l_make"} <= reached, reached
    fold, folded = page.locator("#i2l_advanced .label-wrap").first, page.locator("#i2l_subfolder")
    assert not folded.first.is_visible()
    fold.focus()
    page.keyboard.press("Enter")
    folded.first.wait_for()
