"""The real tab in a real browser: stand-alone with the current gradio, and in the stand-in host with 4.40 and 3.41."""

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

IMAGES = os.environ.get("I2L_SCREENSHOTS")
"""A folder to keep the pictures in; docs/images holds some of them."""


def drop(page, pictures):
    before = page.locator("#i2l_tray .i2l-card").count()
    page.locator('#i2l_files input[type="file"]').first.set_input_files(pictures)
    page.locator("#i2l_tray .i2l-card").nth(before + len(pictures) - 1).wait_for()


def name_it(page, name):
    page.locator("#i2l_name textarea, #i2l_name input").first.fill(name)
    page.locator("#i2l_saved_as .i2l-value", has_text=name).wait_for()


def start(page, pictures, name):
    drop(page, pictures)
    page.locator('#i2l_models input[value="mini"]').check()
    name_it(page, name)
    page.locator("#i2l_make").click()


def job(page, title):
    return page.locator(".i2l-job", has_text=title)


def share(page, title):
    return float(job(page, title).locator('[role="progressbar"]').get_attribute("aria-valuenow"))


def finish(page, name):
    page.locator("#i2l_make_result h3", has_text=re.compile(f"^{name}$")).wait_for()


def stop(page, title):
    job(page, title).locator('[data-i2l="cancel"]').click()
    job(page, title).locator("em", has_text="cancelled").wait_for()


def pane(page, title):
    """gradio 3.41 gives its tabs no role; later ones keep hidden twins of them to measure."""
    page.locator("#i2l_panes button:visible", has_text=re.compile(f"^\\s*{title}\\s*$")).first.click()


def no_leftovers(place):
    return not list(place.root.rglob("*.part"))


def test_pictures_to_a_lora(place, open_page, pictures):
    page = open_page()
    drop(page, pictures[:3])
    page.locator("#i2l_tray .i2l-card").nth(1).locator('[data-i2l="remove"]').click()
    assert page.locator("#i2l_tray .i2l-card").count() == 2
    page.locator("#i2l_tray input").nth(1).fill("3")
    page.locator('#i2l_models input[value="mini"]').check()
    name_it(page, "my_style")
    page.locator("#i2l_make").click()
    finish(page, "my_style")
    told = page.locator("#i2l_make_result").first.inner_text()
    assert "<lora:my_style:1>" in told and "Who loads it" in told
    assert page.locator("#i2l_make_result figure img").count() == 1, "the miniature draws"
    assert (place.lora / "my_style.safetensors").is_file() and (place.lora / "my_style.preview.png").is_file()
    card = json.loads((place.lora / "my_style.json").read_text())
    assert card["preferred weight"] == 1.0 and card["sd version"] == "Unknown"
    header = (place.lora / "my_style.safetensors").read_bytes()[8:]
    note = json.loads(json.JSONDecoder().raw_decode(header.decode(errors="replace"))[0]["__metadata__"]["i2l.images"])
    assert [round(image["weight"], 3) for image in note] == [0.25, 0.75]
    page.locator("#i2l_make").click()
    page.locator("#i2l_make_result h3", has_text="my_style-2").wait_for()
    assert "taken from the cache" in page.locator("#i2l_make_result").first.inner_text()
    if place.version != "6":
        page.locator("#i2l_make_result button", has_text="Insert into txt2img").click()
        assert page.locator("#txt2img_prompt textarea").input_value() == "<lora:my_style-2:1>"
        facts = page.request.get(place.url + "fake/facts").json()
        assert {"my_style", "my_style-2"} <= set(facts["loras"]) and facts["hash"] is None
        assert facts["heavy"] == [] and facts["unloaded"] >= 1 and "i2l_device" in facts["options"]
        page.locator('#txt2img_lora_cards [data-name="my_style-2"]').wait_for(state="attached")


def test_refusals_are_one_line(place, open_page, pictures):
    page = open_page()
    page.locator("#i2l_make").click()
    page.locator("#i2l_make_error", has_text="no picture yet").first.wait_for()
    page.locator('#i2l_files input[type="file"]').first.set_input_files(pictures[3:])
    page.locator("#i2l_tray .i2l-error").wait_for()
    assert "Traceback" not in page.content()
    page.locator("#i2l_name textarea, #i2l_name input").first.fill("a/b")
    page.locator("#i2l_saved_as .i2l-error", has_text="contains '/'").wait_for()


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
    [engine, *_] = place.engines()
    begun = time.monotonic()
    stop(page, "slow_one")
    assert time.monotonic() - begun < 20  # the page; the queue's own second is held in test_jobs
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
    start(page, pictures[:1], "looked_at")
    finish(page, "looked_at")
    pane(page, "Inspect and convert")
    page.locator('#i2l_inspect_drop input[type="file"]').first.set_input_files(
        str(place.lora / "looked_at.safetensors")
    )
    page.locator("#i2l_inspect_drop", has_text="looked_at").wait_for()
    page.locator("#i2l_inspect").click()
    page.locator("#i2l_inspect_result figure img").wait_for()
    assert "ComfyUI" in page.locator("#i2l_inspect_result").first.inner_text()
    page.locator("#i2l_convert").click()
    page.locator("#i2l_convert_result .i2l-result").wait_for()
    assert list(place.lora.glob("looked_at-*.safetensors"))
    pane(page, "Train from it")
    page.locator("#i2l_export").click()
    page.locator("#i2l_train_result .i2l-prompt, #i2l_activity .i2l-failed").first.wait_for()
    told = page.locator("#i2l_train_result, #i2l_activity .i2l-failed").all_inner_texts()
    [folder] = list((place.lora.parent / "i2l-training").iterdir())
    assert list(folder.glob("*.safetensors")), told


def test_a_killed_engine_and_a_killed_webui(place, open_page, pictures):
    page = open_page()
    start(page, pictures[:1], "slow_kill")
    page.wait_for_function("parseFloat((document.querySelector('.i2l-bar')||{ariaValueNow:0}).ariaValueNow) > 1")
    [engine] = place.engines()
    os.kill(engine, signal.SIGKILL)
    job(page, "slow_kill").locator(".i2l-error", has_text="signal 9").wait_for()
    name_it(page, "slow_webui")
    page.locator("#i2l_make").click()
    page.wait_for_function("parseFloat((document.querySelector('.i2l-bar')||{ariaValueNow:0}).ariaValueNow) > 1")
    [engine] = place.engines()
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


def test_how_it_looks(place, open_page, pictures, tmp_path):
    for dark in (False, True):
        page = open_page(dark)
        drop(page, pictures[:2])
        page.wait_for_timeout(800)
        shot = tmp_path / f"make-{'dark' if dark else 'light'}.png"
        page.screenshot(path=shot, full_page=True)
        background = page.evaluate("getComputedStyle(document.querySelector('.i2l-card')).backgroundColor")
        light = sum(map(float, re.findall(r"[\d.]+", background)[:3])) > 384
        assert light != dark, background
        named = page.locator("#i2l_make").get_attribute("title")
        assert named and named.startswith("Start.")
        if IMAGES:
            Path(IMAGES).mkdir(parents=True, exist_ok=True)
            shutil.copy(shot, Path(IMAGES) / f"tab-{place.version}-{'dark' if dark else 'light'}.png")
