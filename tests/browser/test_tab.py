"""The real tab in a real browser: stand-alone with the current gradio, and in the stand-in host with 4.40 and 3.41."""

import json
import os
import re
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
from steps import (
    choose_model,
    drop,
    finish,
    images_of,
    job,
    look,
    made_button,
    name_it,
    no_leftovers,
    pane,
    qwen_lora,
    share,
    start,
    stop,
)

from i2l_ext.webui.languages import read_words

ROOT = Path(__file__).resolve().parents[2]
PANES = {
    "Make": "Make the LoRA", "Train from it": "Write the start folder", "Inspect and convert": "Convert",
    "Models": "Gather what a bug report needs", "Settings": "Default model",
}  # fmt: skip
"""A pane, and a text that stands in it."""


def test_pictures_to_a_lora(place, open_page, pictures):
    page = open_page()
    drop(page, pictures[:3])
    page.locator("#i2l_tray .i2l-card").nth(1).locator('[data-i2l="remove"]').click()
    assert page.locator("#i2l_tray .i2l-card").count() == 2
    page.locator("#i2l_tray input").nth(1).fill("3")
    choose_model(page, "mini")
    name_it(page, "my_style")
    page.locator("#i2l_make").click()
    finish(page, "my_style")
    look(page, place, "made")
    told = page.locator("#i2l_make_result").first.inner_text()
    assert "<lora:my_style:1>" in told and "no program loads it" in told  # it is of the miniature
    assert page.locator("#i2l_make_result figure img").count() == 1, "the miniature draws"
    assert (place.lora / "my_style.safetensors").is_file() and (place.lora / "my_style.preview.png").is_file()
    card = json.loads((place.lora / "my_style.json").read_text())
    assert card["preferred weight"] == 1.0 and card["sd version"] == "Unknown"
    assert [round(image["weight"], 3) for image in images_of(place.lora / "my_style.safetensors")] == [0.25, 0.75]
    page.locator("#i2l_make").click()
    page.locator("#i2l_make_result h3", has_text="my_style-2").wait_for()
    assert "taken from the cache" in page.locator("#i2l_make_result").first.inner_text()
    made_button(page, "Copy").click()
    made_button(page, "Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == "<lora:my_style-2:1>"
    if place.version != "6":
        for where in ("txt2img", "img2img"):
            made_button(page, f"Insert into {where}").click()
            prompt = page.locator(f"#{where}_prompt textarea")
            assert prompt.input_value() == "<lora:my_style-2:1>" and prompt.is_visible()
            page.locator("button", has_text="Image to LoRA").first.click()
        made_button(page, "Open the Lora tab").click()
        page.locator('#txt2img_lora_cards [data-name="my_style-2"]').wait_for()
        end = time.monotonic() + 60  # the second of its tabs may empty and fill the host's list once more
        facts = page.request.get(place.url + "fake/facts").json()
        while not {"my_style", "my_style-2"} <= set(facts["loras"]):
            assert time.monotonic() < end, facts
            page.wait_for_timeout(200)
            facts = page.request.get(place.url + "fake/facts").json()
        assert facts["hash"] is None
        assert facts["heavy"] == [] and facts["unloaded"] >= 1 and "i2l_device" in facts["options"]


def test_make_waits_for_pictures_on_their_way(place, open_page, pictures):
    page = open_page()
    name_it(page, "eager")
    choose_model(page, "mini")

    def later(route):
        page.wait_for_timeout(1500)
        route.continue_()

    page.route(re.compile("/upload$"), later)
    page.locator('#i2l_files input[type="file"]').first.set_input_files(pictures[:2])
    page.locator("#i2l_make").click()
    page.locator("#i2l_make").click()  # once more makes no second one
    finish(page, "eager")
    assert len(images_of(place.lora / "eager.safetensors")) == 2
    assert len(list(place.lora.glob("eager*.safetensors"))) == 1


PASTE = """async (bytes) => {
    const carrier = new DataTransfer();
    carrier.items.add(new File([new Uint8Array(bytes)], "pasted.png", {type: "image/png"}));
    document.body.dispatchEvent(new ClipboardEvent("paste", {clipboardData: carrier, bubbles: true, cancelable: true}));
}"""


def test_pictures_pasted_and_from_a_folder(place, open_page, pictures):
    page = open_page()
    page.evaluate(PASTE, list(Path(pictures[0]).read_bytes()))
    page.evaluate(PASTE, list(Path(pictures[1]).read_bytes()))  # the second waits for the first
    cards = page.locator("#i2l_tray .i2l-card")
    cards.nth(1).wait_for()
    folder = place.root / "some pictures"
    folder.mkdir()
    for path in (pictures[1], pictures[2]):
        shutil.copy(path, folder)
    page.locator("#i2l_from_folder .label-wrap").first.click()
    page.locator("#i2l_server_folder textarea, #i2l_server_folder input").first.fill("some pictures")
    page.locator("#i2l_add_folder").click()
    page.locator("#i2l_tray .i2l-error", has_text="whole path").first.wait_for()
    page.locator("#i2l_server_folder textarea, #i2l_server_folder input").first.fill(str(folder))
    page.locator("#i2l_add_folder").click()
    cards.nth(2).wait_for()  # one of the two was there already
    assert cards.count() == 3 and page.locator("#i2l_tray .i2l-error:visible").count() == 0


def test_models_and_the_bug_report(place, open_page):
    page = open_page()
    pane(page, "Models")
    page.locator("#i2l_catalogue details", has_text="z-image-style").first.locator("summary").click()
    assert "not downloaded" in page.locator("#i2l_catalogue").first.inner_text()
    page.locator("#i2l_catalogue .i2l-model-row", has_text="mini-coarse-fine-bias").locator("summary").click()
    page.locator("#i2l_catalogue .i2l-model-row", has_text="mini-coarse-fine-bias").get_by_text("Verify").click()
    page.locator("#i2l_models_result table").wait_for()
    assert "mini-coarse-fine-bias" in page.locator("#i2l_models_result h4").inner_text()
    page.locator("#i2l_catalogue .i2l-model-row", has_text="z-image-style").get_by_role("button").click()
    offer = page.locator("#i2l_models_offer .i2l-offer")
    offer.locator(".i2l-primary").wait_for()
    offer.locator("summary").click()
    for told in ("19.0 GB", "DiffSynth-Studio/Z-Image-i2L", "DINOv3 licence", str(place.root), "Free on the disk"):
        assert told in offer.inner_text(), told
    offer.locator(".i2l-primary").click()
    page.locator("#i2l_models_error", has_text="agree to the licences").first.wait_for()
    offer.locator("input[name=agreed]").check()
    offer.locator(".i2l-primary").click()
    job(page, "z-image-style").locator(".i2l-step", has_text="19.0 GB").wait_for()
    job(page, "z-image-style").get_by_role("button", name="Pause").click()
    job(page, "z-image-style").locator("em", has_text="paused").wait_for()
    job(page, "z-image-style").get_by_role("button", name="Dismiss").click()
    job(page, "z-image-style").wait_for(state="detached")
    page.locator("#i2l_doctor").click()
    report = page.locator("#i2l_doctor_result pre")
    report.wait_for()
    page.locator("#i2l_doctor_result button", has_text="Copy").click()
    page.locator("#i2l_doctor_result button", has_text="Copied").wait_for()
    text = page.evaluate("navigator.clipboard.readText()")
    assert text == report.inner_text() and "torch" in text and str(place.root) not in text


def test_settings_are_kept(place, open_page):
    if place.version != "6":
        return  # they are on the host's own page: test_pictures_to_a_lora sees them registered
    page = open_page()
    pane(page, "Settings")
    page.locator("#i2l_setting_subfolder").locator("textarea, input").first.fill("mine")
    page.locator("#i2l_settings_note", has_text="Saved.").first.wait_for()
    page = open_page()
    page.locator("#i2l_advanced .label-wrap").first.click()
    field = page.locator("#i2l_subfolder").locator("textarea, input").first
    assert field.input_value() == "mine"
    pane(page, "Settings")
    page.locator("#i2l_setting_subfolder").locator("textarea, input").first.fill("")
    page.locator("#i2l_settings_note", has_text="Saved.").first.wait_for()


def test_it_speaks_the_browsers_language(place, browser):
    if place.version != "6":
        return  # one place is enough: the words lie in the page, whatever the host is
    for locale, words in (("zh-CN", ("生成 LoRA", "模型", "就绪")), ("ru-RU", ("Создать LoRA", "Модели", "скачана"))):
        context = browser.new_context(locale=locale)
        page = context.new_page()
        page.goto(place.url, wait_until="domcontentloaded")
        page.locator("#i2l_models input").first.wait_for()
        for word in words:
            page.locator("#i2l", has_text=word).first.wait_for()
        page.locator("select[data-i2l-language]").select_option("en")
        page.locator("#i2l_make", has_text="Make the LoRA").wait_for()
        context.close()


@pytest.mark.short
@pytest.mark.parametrize(
    ("locale", "told"), [("zh-TW", "圖"), ("zh-CN", "图"), ("zh-HK", "图"), ("ru-RU", "картинка"), ("de-DE", "picture")]
)
def test_the_language_of_a_country_comes_before_another_of_that_language(place, browser, locale, told):
    """The page as it is laid, with words of our own: no host is asked."""
    if place.version != "6":
        return  # one place is enough: the words lie in the page, whatever the host is
    words = {"zh_CN": {"picture": "图"}, "zh_TW": {"picture": "圖"}, "ru_RU": {"picture": "картинка"}}
    context = browser.new_context(locale=locale)
    page = context.new_page()
    page.set_content(
        f'<p id="i2l">picture</p><script type="application/json" id="i2l_words">{json.dumps(words)}</script>'
    )
    page.add_script_tag(path=ROOT / "javascript/translation.js")
    page.wait_for_function("document.getElementById('i2l').lang")
    assert page.locator("#i2l").inner_text() == told
    context.close()


@pytest.mark.parametrize("language", ["en", "zh_CN", "ru_RU"])
def test_every_pane_in_every_language(place, browser, language):
    """A pane that opens is translated once; the page goes on answering."""
    if place.version != "6":
        return  # one place is enough: the words lie in the page, whatever the host is
    words = {} if language == "en" else read_words(language)
    context = browser.new_context(locale=language.replace("_", "-"))
    page = context.new_page()
    page.set_default_timeout(60_000)
    page.goto(place.url, wait_until="domcontentloaded")
    page.locator("#i2l_models input").first.wait_for()
    for title, control in PANES.items():
        pane(page, re.escape(words.get(title, title)))
        told = words.get(control, control)
        page.locator("#i2l_panes").get_by_text(told, exact=True).filter(visible=True).first.wait_for()
        page.wait_for_timeout(500)  # the script's own steps, twice
        page.wait_for_function("document.body.isConnected")
    changes = "new Promise(done => { let n = 0; const all = {subtree: true, childList: true, characterData: true};" \
        " new MutationObserver(() => n++).observe(document.body, all); setTimeout(() => done(n), 1000); })"  # fmt: skip
    assert page.evaluate(changes) < 100, "the page does not come to rest"
    context.close()


def test_an_upload_after_one_that_broke(place, open_page, pictures):
    page = open_page()
    page.evaluate("window.busy = document.querySelector('#i2l_files em')")
    page.evaluate("busy.replaceWith(window.mark = document.createElement('i'))")
    page.evaluate(PASTE, list(Path(pictures[0]).read_bytes()))
    page.wait_for_timeout(300)
    page.evaluate("mark.replaceWith(busy)")
    page.evaluate(PASTE, list(Path(pictures[1]).read_bytes()))
    page.locator("#i2l_tray .i2l-card").first.wait_for(timeout=60_000)


def test_without_storage_the_page_still_works(place, browser, open_page):
    """A browser that blocks a site's data throws where it is asked for."""
    context = browser.new_context()
    context.add_init_script("Object.defineProperty(window, 'localStorage', {get() { throw new DOMException('no'); }})")
    page = context.new_page()
    page.set_default_timeout(60_000)
    page.goto(place.url, wait_until="domcontentloaded")
    open_page.show(page)
    context.close()


def test_the_page_asks_for_little(place, open_page):
    """Whether the server is there is asked of a route that costs nothing, not of the page, which gradio draws anew."""
    page = open_page()
    asked = []
    page.on("request", lambda request: asked.append((request.method, request.url)))
    page.wait_for_event("request", lambda request: "/i2l/alive" in request.url, timeout=60_000)
    page.wait_for_timeout(1000)
    assert ("HEAD", page.url) not in asked
    answer = page.request.get(place.url + "i2l/alive")
    assert answer.status == 204 and answer.body() == b""


def test_refusals_are_one_line(place, open_page, pictures):
    page = open_page()
    page.locator("#i2l_make").click()
    page.locator("#i2l_make_error", has_text="no picture yet").first.wait_for()
    page.locator('#i2l_files input[type="file"]').first.set_input_files(pictures[3:])
    page.locator("#i2l_tray .i2l-error").wait_for()
    assert "Traceback" not in page.content()
    page.locator("#i2l_name textarea, #i2l_name input").first.fill("a/b")
    page.locator("#i2l_saved_as .i2l-error", has_text="A name cannot have this character: '/'").wait_for()
    page.locator("#i2l_saved_as button", has_text="a-b").click()
    page.locator("#i2l_saved_as .i2l-value", has_text="a-b.safetensors").wait_for()


def test_progress_cancel_two_windows_and_a_reload(place, open_page, pictures):
    page, other = open_page(), open_page()
    start(page, pictures[:1], "slow_one")
    job(page, "slow_one").wait_for()
    page.wait_for_function("parseFloat((document.querySelector('.i2l-bar')||{ariaValueNow:0}).ariaValueNow) > 1")
    first = share(page, "slow_one")
    page.wait_for_function(
        f"parseFloat((document.querySelector('.i2l-bar')||{{ariaValueNow:0}}).ariaValueNow) > {first}"
    )
    assert "20.6 GB" in job(page, "slow_one").inner_text() and "/ 40" in job(page, "slow_one").inner_text()
    job(other, "slow_one").wait_for()
    start(other, pictures[1:2], "slow_two")
    job(page, "slow_two").locator("em", has_text="waiting").wait_for()
    page.reload(wait_until="domcontentloaded")
    open_page.show(page)
    job(page, "slow_one").wait_for()
    stop(page, "slow_two")
    engine = place.engine()
    begun = time.monotonic()
    stop(page, "slow_one")
    assert time.monotonic() - begun < 20  # the page; the queue's own second is held in test_queue
    assert not Path(f"/proc/{engine}").exists()
    assert not list(place.lora.glob("slow*")) and no_leftovers(place)


def test_a_closed_page_does_not_stop_the_job(place, open_page, pictures):
    page = open_page()
    start(page, pictures[:1], "left_alone")
    job(page, "left_alone").or_(page.locator("h3", has_text="left_alone")).first.wait_for()
    page.close()
    finish(open_page(), "left_alone")
    assert (place.lora / "left_alone.safetensors").is_file()


def test_inspect_convert_and_train(place, open_page, pictures):
    page = open_page()
    qwen_lora(place.root / "looked_at.safetensors")
    pane(page, "Inspect and convert")
    page.locator('#i2l_inspect_drop input[type="file"]').first.set_input_files(
        str(place.root / "looked_at.safetensors")
    )
    page.locator("#i2l_inspect_drop .i2l-dropped", has_text="looked_at").first.wait_for()
    page.locator("#i2l_inspect").click()
    page.locator("#i2l_inspect_result h3", has_text="looked_at").wait_for()  # not what was looked at before
    page.locator("#i2l_inspect_result figure img").wait_for()
    result = page.locator("#i2l_inspect_result").first
    result.locator(".i2l-loaders summary", has_text="after conversion").click()
    assert "ComfyUI" in result.inner_text() and str(place.root) not in result.inner_html()
    result.get_by_role("button", name="Repair for musubi-tuner", exact=True).click()
    page.locator("#i2l_inspect_repaired b", has_text="looked_at-musubi-tuner.safetensors").first.wait_for()
    repaired = (place.lora / "looked_at-musubi-tuner.safetensors").read_bytes()
    assert b"lora_unet_" in repaired[:2000]
    page.locator("#i2l_convert").click()
    page.locator("#i2l_convert_result b", has_text="looked_at-webui").first.wait_for()
    assert (place.lora / "looked_at-webui.safetensors").is_file()
    look(page, place, "inspect")


def test_train_from_it(place, open_page, pictures):
    page = open_page()
    start(page, pictures[:1], "start_here")
    finish(page, "start_here")
    page.locator("#i2l_make_result button", has_text="Train from it").click()  # it is chosen there
    page.locator("#i2l_curve").click()
    page.locator("#i2l_train_curve svg polyline.i2l-line-all").wait_for()
    whole = page.locator("#i2l_train_curve dd").nth(1)
    first = float(whole.inner_text().rstrip("%"))
    rank = page.locator('#i2l_train_rank input[type="number"]')
    rank.fill("4")
    rank.press("Tab")
    page.locator("#i2l_train_curve dd .i2l-value", has_text=re.compile("^4$")).wait_for()
    assert 0 < float(whole.inner_text().rstrip("%")) < first <= 100
    page.locator("#i2l_export").click()
    command = page.locator("#i2l_train_result code.i2l-prompt", has_text="start_here")
    command.wait_for()
    page.locator("#i2l_train_result .i2l-command button", has_text="Copy").click()
    page.locator("#i2l_train_result button", has_text="Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == command.inner_text()
    script = Path(shlex.split(command.inner_text())[-1])
    folder = script.parent
    assert folder == place.lora.parent / "i2l-training" / "start_here-musubi-tuner-rank4"
    assert script.is_file() and list(folder.glob("*.safetensors"))
    look(page, place, "train")


def test_a_training_is_started_watched_cancelled_and_its_lora_taken(place, open_page, pictures):
    """With a stand-in of ai-toolkit: what a person presses and sees."""
    if place.version != "6":
        return  # the settings are on the host's own page
    from test_training_run import TRAINER, as_if_a_trainer_had_it

    home = place.root / "ai toolkit"
    (home / "toolkit").mkdir(parents=True)
    (home / "toolkit/config_modules.py").touch()
    (home / "run.py").write_text(TRAINER)
    (home / "mode").write_text("waits")
    page = open_page()
    pane(page, "Settings")
    for setting, text in (("trainer", home), ("trainer_python", sys.executable)):
        page.locator(f"#i2l_setting_{setting}").locator("textarea, input").first.fill(str(text))
        page.locator("#i2l_settings_note", has_text="Saved.").first.wait_for()
    pane(page, "Make")
    start(page, pictures[:1], "watched")
    finish(page, "watched")
    page.locator("#i2l_make_result button", has_text="Train from it").click()
    page.locator("#i2l_trainer input").first.click()
    page.locator('[role="option"], [data-testid="dropdown-option"]').filter(has_text="ai-toolkit").first.click()
    page.locator("#i2l_export").click()
    button = page.locator("#i2l_train_result button", has_text="Start the training")
    button.wait_for()
    [folder] = (place.lora.parent / "i2l-training").glob("watched-ai-toolkit*")
    as_if_a_trainer_had_it(folder)
    button.click()
    activity = page.locator("#i2l_train_activity")
    activity.locator("pre", has_text="Missing keys: []").wait_for()
    activity.locator('[data-i2l="cancel"]').click()
    activity.locator("em", has_text="cancelled").wait_for()
    assert not list(place.lora.glob("watched*trained*"))
    (home / "mode").write_text("trains")
    button.click()
    result = page.locator("#i2l_train_run .i2l-result")
    result.locator("svg polyline").wait_for()
    name = result.locator("b").first.inner_text()
    assert name.startswith("watched") and (place.lora / name).is_file()
    look(page, place, "trained")
    result.locator("button", has_text="Inspect").click()  # it is chosen there
    held = page.locator("#i2l_inspect_file input").first
    page.wait_for_function("([held, name]) => held.value === name", arg=[held.element_handle(), name])
    for setting in ("trainer", "trainer_python"):  # other tests share the page
        pane(page, "Settings")
        page.locator(f"#i2l_setting_{setting}").locator("textarea, input").first.fill("")
        page.locator("#i2l_settings_note", has_text="Saved.").first.wait_for()


def test_a_killed_engine_and_a_killed_webui(place, open_page, pictures):
    page = open_page()
    start(page, pictures[:1], "slow_kill")
    page.wait_for_function("parseFloat((document.querySelector('.i2l-bar')||{ariaValueNow:0}).ariaValueNow) > 1")
    engine = place.engine()
    os.kill(engine, signal.SIGKILL)
    job(page, "slow_kill").locator(".i2l-error", has_text="signal 9").wait_for()
    name_it(page, "slow_webui")
    page.locator("#i2l_make").click()
    page.wait_for_function("parseFloat((document.querySelector('.i2l-bar')||{ariaValueNow:0}).ariaValueNow) > 1")
    engine = place.engine()
    place.kill()
    page.locator("#i2l_lost").wait_for()
    end = time.monotonic() + 20
    while Path(f"/proc/{engine}").exists():
        assert time.monotonic() < end, "the engine outlived the WebUI"
        time.sleep(0.1)
    place.start()
    page = open_page()
    state = job(page, "slow_webui").locator("em")
    state.wait_for()
    assert state.inner_text() in ("cancelled", "failed")
    assert not list(place.lora.glob("slow*")) and no_leftovers(place)


def test_how_it_looks(place, open_page, pictures):
    for dark in (False, True):
        page = open_page(dark)
        drop(page, pictures[:2])
        page.wait_for_timeout(800)
        look(page, place, "tab", dark)
        background = page.evaluate("getComputedStyle(document.querySelector('.i2l-card')).backgroundColor")
        light = sum(map(float, re.findall(r"[\d.]+", background)[:3])) > 384
        assert light != dark, background
        named = page.locator("#i2l_make").get_attribute("title")
        assert named and named.startswith("Start.")
        pane(page, "Models")
        page.locator("#i2l_catalogue details").first.wait_for()
        look(page, place, "models", dark)
