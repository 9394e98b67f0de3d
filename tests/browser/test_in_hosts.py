"""The tab inside a WebUI: its cards, its checkpoint, its tabs, its language. The stand-in does as the real ones do."""

import shutil

import pytest
from steps import choose_model, drop, finish, made_button, name_it, pane, qwen_lora, start

from conftest import PLACES, Place

HOSTS = [version for version, (kind, _) in PLACES.items() if kind == "fake_host"]
MANY = 40
"""LoRAs in the folder: to list them takes the stand-in most of a second."""


@pytest.fixture(scope="module")
def crowded(place):
    """A WebUI with many LoRAs."""
    if place.version not in HOSTS:
        pytest.skip("it is no WebUI")
    for number in range(MANY):
        (place.lora / f"old-{number:02}.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    yield place
    for path in place.lora.glob("old-*"):
        path.unlink()


def test_every_card_is_there_after_a_make(crowded, open_page, pictures):
    """In both tabs: two refreshes at once would empty the WebUI's dictionary for each other."""
    page = open_page()
    start(page, pictures[:1], "carded")
    finish(page, "carded")
    made_button(page, "Open the Lora tab").click()
    page.locator('#txt2img_lora_cards [data-name="carded"]').wait_for()
    tabs = (
        ("txt2img",) if PLACES[crowded.version][1] == "sdnext" else ("txt2img", "img2img")
    )  # where they are looked at
    for where in tabs:
        page.locator(f'#{where}_lora_cards [data-name="carded"]').wait_for(state="attached")
    page.wait_for_timeout(4000)
    for where in tabs:
        assert page.locator(f'#{where}_lora_cards [data-name^="old-"]').count() == MANY
    facts = page.request.get(crowded.url + "fake/facts").json()
    assert "carded" in facts["loras"] and len([name for name in facts["loras"] if name.startswith("old-")]) == MANY


def test_the_checkpoint_is_ready_for_the_next_picture(crowded, open_page, pictures):
    page = open_page()
    start(page, pictures[:1], "next_picture")
    finish(page, "next_picture")
    facts = page.request.get(crowded.url + "fake/facts").json()
    assert facts["device"] == ("cuda" if PLACES[crowded.version][1] == "a1111" else None)
    assert facts["loaded_by_reading"] == 0


def test_insert_and_open_find_their_tabs(crowded, open_page, pictures):
    page = open_page()
    start(page, pictures[:1], "inserted")
    finish(page, "inserted")
    for where in ("img2img", "txt2img"):
        made_button(page, f"Insert into {where}").click()
        prompt = page.locator(f"#{where}_prompt textarea")
        prompt.wait_for()
        assert prompt.input_value() == "<lora:inserted:1>"
        page.locator("button", has_text="Image to LoRA").first.click()
    made_button(page, "Open the Lora tab").click()
    page.locator('#txt2img_lora_cards [data-name="inserted"]').wait_for()
    told = page.locator("#i2l_heading").first.text_content()
    assert ("cannot apply" in told) is (PLACES[crowded.version][1] == "a1111")


TOLD = {
    "zh_CN": ("生成 LoRA", "还没有图片。请至少拖入一张。", "没有此模型", "图片的风格，适用于任何内容"),
    "ru_RU": ("Создать LoRA", "Картинок пока нет. Добавьте хотя бы одну.", "нет модели", "стиль картинок, для любого"),
}  # fmt: skip
"""Of each language: the button, a refusal, a verdict, a line about a model."""


@pytest.fixture(scope="module", params=list(TOLD))
def speaking(request, place, tmp_path_factory):
    """(A WebUI whose user has chosen a language, the language.)"""
    if place.version not in HOSTS:
        pytest.skip("it is no WebUI")
    root = tmp_path_factory.mktemp(f"speaking-{place.version}-{request.param}")
    (root / "models" / "Lora").mkdir(parents=True)
    shutil.copytree(place.root / "extensions", root / "extensions", symlinks=True)
    shutil.copy(place.root / "engine", root / "engine")
    other = Place(place.version, root, environment={"FAKE_LANGUAGE": request.param})
    other.start()
    yield other, request.param
    other.kill()


def test_a_language_is_that_of_the_tab_alone(speaking, browser, pictures):
    place, language = speaking
    make, refusal, verdict, line = TOLD[language]
    context = browser.new_context(locale="en-US", viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.set_default_timeout(120_000)
    page.goto(place.url, wait_until="domcontentloaded")
    page.locator("#i2l_panes").wait_for(state="attached")
    page.locator("button", has_text="Image to LoRA").first.click()
    page.locator("#i2l_make", has_text=make).wait_for()
    page.locator("#i2l_models", has_text=line).first.wait_for()
    assert page.locator("#i2l_make").get_attribute("title") and "Start." not in page.locator("#i2l_make").get_attribute(
        "title"
    )
    page.locator("#i2l_make").click()
    page.locator("#i2l_make_error", has_text=refusal).first.wait_for()
    drop(page, pictures[:1])
    choose_model(page, "mini")
    name_it(page, "spoken")
    page.locator("#i2l_make").click()
    finish(page, "spoken")
    qwen_lora(place.lora / "judged.safetensors")
    inspected = page.locator("#i2l_inspect_result td", has_text=verdict)
    page.locator("[data-i2l=act][data-i2l-target=inspect]").first.click()
    page.locator("#i2l_inspect_drop input[type=file]").first.set_input_files(str(place.lora / "judged.safetensors"))
    page.locator("#i2l_inspect_drop .i2l-dropped", has_text="judged").first.wait_for()
    page.locator("#i2l_inspect").click()
    inspected.first.wait_for(state="attached")
    for where in ("txt2img", "img2img"):
        assert page.locator(f"#{where}_words").first.text_content().split() == ["left", "Cancel", "File"]
    page.locator("select[data-i2l-language]").select_option("en")
    page.locator("#i2l_make", has_text="Make the LoRA").wait_for(state="attached")
    page.locator("#i2l_inspect_result td", has_text="no model").first.wait_for(state="attached")
    pane(page, "Models")
    context.close()
