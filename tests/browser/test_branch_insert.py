"""What a click with Shift puts into a prompt: javascript/image_to_lora_branch.js in a page of its own, whose cards and
buttons write as a WebUI's do."""

from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "javascript" / "image_to_lora_branch.js"
PAGE = """
<div id="txt2img_prompt"><textarea></textarea></div><div id="img2img_prompt"><textarea></textarea></div>
<div id="card">style</div><button id="late">another way</button><button id="style">a saved style</button>
<script>
  const area = (where) => document.querySelector("#" + where + "_prompt textarea");
  const write = (where, text) => {
    area(where).value = (area(where).value + " " + text).trim();
    area(where).dispatchEvent(new Event("input", {bubbles: true}));
  };
  window.heard = [];
  area("txt2img").addEventListener("input", () => window.heard.push(area("txt2img").value));
  document.getElementById("card").onclick = () => write("txt2img", "<lora:my style:0.8> <lora:more:1>");
  document.getElementById("late").onclick = () => write("img2img", "<lora:my style:1>");
  document.getElementById("style").onclick = () => { area("txt2img").value = "a dog <lora:other:1>"; };
</script>
"""


@pytest.fixture
def page(browser):
    context = browser.new_context()
    page = context.new_page()
    page.set_content(PAGE)
    page.add_script_tag(path=str(SCRIPT))
    yield page
    context.close()


def prompt(page, where="txt2img"):
    page.wait_for_timeout(50)
    return page.locator(f"#{where}_prompt textarea").input_value()


@pytest.mark.short
def test_shift_and_a_click_on_a_card_insert_the_tag_of_one_branch(page):
    page.locator("#txt2img_prompt textarea").fill("a cat <lora:kept:1> ")
    page.locator("#card").click()
    assert prompt(page) == "a cat <lora:kept:1>  <lora:my style:0.8> <lora:more:1>", "without Shift it is the WebUI's"
    page.locator("#txt2img_prompt textarea").fill("a cat <lora:kept:1> ")
    page.locator("#card").click(modifiers=["Shift"])
    assert prompt(page) == "a cat <lora:kept:1>  <i2l:my style:0.8> <i2l:more:1>"
    assert page.evaluate("window.heard.at(-1)") == prompt(page), "the WebUI is told"
    page.locator("#late").click(modifiers=["Shift"])
    assert prompt(page, "img2img") == "<i2l:my style:1>"


@pytest.mark.short
def test_a_click_that_writes_another_prompt_is_left_alone(page):
    page.locator("#txt2img_prompt textarea").fill("a cat")
    page.locator("#style").click(modifiers=["Shift"])
    assert prompt(page) == "a dog <lora:other:1>"
    page.keyboard.down("Shift")
    page.locator("#txt2img_prompt textarea").click()
    page.keyboard.up("Shift")
    assert prompt(page) == "a dog <lora:other:1>"
