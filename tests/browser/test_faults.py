"""Faults that were seen in real WebUIs and have no place in the other files: what a stop, a kill and a refusal tell."""

import os
import re
import signal
import time

from engine import LATE
from steps import (
    choose_model,
    dismiss_failures,
    drop,
    finish,
    job,
    made_button,
    name_it,
    no_leftovers,
    pane,
    qwen_lora,
    start,
)

WATCH = """() => {
    window.told = new Set();
    setInterval(() => document.querySelectorAll("#i2l .i2l-step").forEach((one) => told.add(one.textContent)), 50);
}"""


def test_a_stop_that_comes_too_late(place, open_page, pictures):
    """The files have their names: it says done, not cancelled, and tells the whole time that it took."""
    page = open_page()
    page.evaluate(WATCH)
    start(page, pictures[:1], "late_stop")
    card, file = job(page, "late_stop"), place.lora / "late_stop.safetensors"
    card.wait_for()
    end = time.monotonic() + 240
    while not file.is_file():
        assert time.monotonic() < end, "nothing was saved"
        time.sleep(0.1)
    card.locator("[data-i2l=cancel]").click()
    finish(page, "late_stop")
    assert file.is_file() and card.count() == 0
    took = page.locator("#i2l_make_result .i2l-made dd", has_text=re.compile("^[0-9.:]+ ?s?$")).last.inner_text()
    assert ":" in took or float(took.split()[0]) > LATE, took
    told = page.evaluate("[...told]")
    assert told and not [one for one in told if re.search(r"\b0:00 left", one)], told


def test_a_kill_is_told_and_what_waited_is_made(place, open_page, pictures):
    page = open_page()
    start(page, pictures[:1], "slow_killed")
    job(page, "slow_killed").wait_for()
    name_it(page, "waited")
    page.locator("#i2l_make").click()
    job(page, "waited").locator("em", has_text="waiting").wait_for()
    place.kill()
    place.start()
    page = open_page()
    finish(page, "waited")
    failed = job(page, "slow_killed")
    failed.locator(".i2l-error", has_text="The WebUI was closed or stopped while this was at work").wait_for()
    assert failed.locator("em").inner_text() == "failed", "nobody cancelled it"
    failed.get_by_role("button", name="Dismiss").click()
    failed.wait_for(state="detached")
    assert (place.lora / "waited.safetensors").is_file()
    assert not list(place.lora.glob("slow*")) and no_leftovers(place)


def test_what_was_made_is_chosen_everywhere_and_looked_at_where_it_belongs(place, open_page, pictures):
    page = open_page()
    start(page, pictures[:1], "held")
    finish(page, "held")
    page.locator("#i2l_make_result [data-i2l=act][data-i2l-target=inspect]").click()
    page.locator("#i2l_inspect").click()
    page.locator("#i2l_inspect_result h3", has_text="held").wait_for()
    assert page.locator("#i2l_inspect_result").first.is_visible() and not page.locator("#i2l_make").first.is_visible()
    assert page.locator("#i2l_make_result figure").count() <= 1  # what it draws: the plot stands in the other pane
    for control, title in (("inspect_file", "Inspect and convert"), ("train_file", "Train from it")):
        pane(page, title)
        held = page.locator(f"#i2l_{control} input").first
        page.wait_for_function("(held) => held.value === 'held.safetensors'", arg=held.element_handle())


def test_where_it_will_be_saved(place, open_page, pictures):
    page = open_page()
    drop(page, pictures[:1])
    choose_model(page, "mini")
    page.locator("#i2l_advanced .label-wrap").first.click()
    page.locator("#i2l_subfolder textarea, #i2l_subfolder input").first.fill("evening")
    name_it(page, "below")
    page.locator("#i2l_saved_as .i2l-value", has_text="evening/below.safetensors").wait_for()
    page.locator("#i2l_make").click()
    finish(page, "below")
    assert (place.lora / "evening" / "below.safetensors").is_file()
    page.locator("#i2l_saved_as .i2l-value", has_text="evening/below-2.safetensors").wait_for()


def test_a_refusal_names_the_picture(place, open_page, pictures):
    """By the number on its card, not the file that an upload is kept in, whose name is a number of 64 letters."""
    page = open_page()
    dismiss_failures(page)
    drop(page, pictures[:1])
    choose_model(page, "mini")
    name_it(page, "unreadable")
    kept = page.locator("#i2l_tray .i2l-card").first.get_attribute("data-i2l-id").split("@")[0]
    file = place.root / "state" / "uploads" / kept
    assert file.is_file()
    file.write_bytes(b"no picture any more")
    page.locator("#i2l_make").click()
    told = page.locator("#i2l .i2l-error:visible").first
    told.wait_for()
    assert "picture 1" in told.inner_text(), told.inner_text()
    assert kept not in page.locator("#i2l").inner_text()
    file.unlink()


def test_a_mended_lora_keeps_its_preview(place, open_page):
    page = open_page()
    qwen_lora(place.lora / "repair_me.safetensors")
    (place.lora / "repair_me.preview.png").write_bytes(next(place.lora.glob("*.preview.png")).read_bytes())
    pane(page, "Library")
    page.locator("#i2l_library_list button", has_text="Look again").click()
    page.locator('#i2l_library_list input[value="repair_me.safetensors"]').check()
    page.locator('#i2l_library_list select[name="consumer"]').select_option("musubi-tuner")
    page.locator("#i2l_library_list [data-i2l=act]", has_text="Repair").click()
    page.locator("#i2l_library_repaired b", has_text="repair_me-musubi-tuner").first.wait_for()
    assert (place.lora / "repair_me-musubi-tuner.preview.png").is_file()


def test_the_built_in_models_offer_no_download(place, open_page):
    page = open_page()
    places = {"Make": "#i2l_models .i2l-try .i2l-model", "Models": "#i2l_catalogue .i2l-model-row"}
    for title, where in places.items():
        pane(page, title)  # gradio 6 draws a pane when it is opened
        rows = page.locator(where).filter(has_text="mini")
        rows.first.wait_for(state="attached")
        assert rows.filter(has_text="Download").count() == 0
        assert rows.filter(has_text="ready").count() == rows.count()


def test_the_hosts_style_does_not_colour_our_words(place, open_page):
    page = open_page()
    colours = page.evaluate("""() => [...document.querySelectorAll("#i2l span.i2l-word, #i2l .i2l-value")]
        .map((one) => getComputedStyle(one).color)""")
    assert colours and "rgb(1, 2, 3)" not in colours


def test_an_engine_that_dies_leaves_the_next_job_alone(place, open_page, pictures):
    page = open_page()
    start(page, pictures[:1], "slow_dies")
    name_it(page, "next_one")
    page.locator("#i2l_make").click()
    job(page, "next_one").wait_for()
    page.wait_for_function("parseFloat((document.querySelector('.i2l-bar')||{ariaValueNow:0}).ariaValueNow) > 1")
    os.kill(place.engine(), signal.SIGKILL)
    finish(page, "next_one")
    job(page, "slow_dies").locator(".i2l-error", has_text="signal 9").wait_for()
    assert made_button(page, "Copy").count() == 1
