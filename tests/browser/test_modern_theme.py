"""Insert and Open where a theme has a navigation of its own: pages with the parts that they have, as their scripts lay
them: SD.Next's modern theme (8a78eed) and UI-UX (6f1cbfb)."""

import pytest

from conftest import ROOT, SHORT

PAGE = """
<style>.hidden, .option-hide-legacy .only-legacy {display: none}</style>
<div id="sdnext_app" class="HIDES">
  <button id="control_nav" data-shows="control">Images</button>
  <button id="txt2img_nav" data-shows="txt2img" class="only-legacy">T2I</button>
  <button id="img2img_nav" data-shows="img2img" class="only-legacy">I2I</button>
  <button id="btn_settings" data-aside="layout-settings">Settings</button>
  <button id="btn_extra_networks" data-aside="layout-extra-networks">Networks</button>
  PLACES
  <div id="layout-settings" class="aside">settings</div>
  <div id="layout-extra-networks" class="aside hidden">NETWORKS</div>
  <div id="i2l" class="place">our tab</div>
</div>
<script>
function show(all, one) {
    document.querySelectorAll(all).forEach((item) => item.classList.toggle("hidden", item !== one));
}
document.addEventListener("click", (event) => {
    const {shows, aside} = event.target.dataset, open = document.getElementById(aside);
    if (shows) show(".place", document.getElementById(shows + "_tabitem"));
    if (shows) show(".en", document.getElementById("en-layout-" + shows));
    if (aside) show(".aside", open.classList.contains("hidden") ? open : null);  // pressed again it closes
    event.target.dataset.pressed = "1";
});
</script>
"""
PLACE = '<div id="{0}_tabitem" class="place hidden"><div id="{0}_prompt"><textarea></textarea></div></div>'
NETWORKS = (
    '<div id="en-layout-{0}" class="en hidden"><div id="{0}_extra_tabs"><button>Model</button><button>Lora</button>'
    '<button id="{0}_extra_refresh">again</button></div></div>'
)
UI_UX = """
<div id="anapnoe_app">
  <button id="txt2img_nav" data-shows="txt2img">T2I</button><button id="img2img_nav" data-shows="img2img">I2I</button>
  <button id="checkpoints_nav">Checkpoints</button><button id="lora_nav">LORA</button>
  PLACES
</div>
"""
WHERE = ("txt2img", "img2img", "control")


@pytest.mark.short
@pytest.mark.parametrize(("hides", "where"), [("option-hide-legacy", "control"), ("", "txt2img")])
def test_insert_and_open_find_their_places(place, browser, hides, where):
    if place.version != SHORT:
        pytest.skip("it needs no host")
    page = browser.new_page()
    html = PAGE.replace("HIDES", hides).replace("PLACES", "".join(map(PLACE.format, WHERE)))
    page.set_content(html.replace("NETWORKS", "".join(map(NETWORKS.format, WHERE))))
    page.add_script_tag(path=ROOT / "javascript" / "webui_host.js")
    page.evaluate("imageToLoraHost.insert('<lora:a:1>', 'txt2img')")
    assert page.locator(f"#{where}_prompt textarea").input_value() == "<lora:a:1>"
    page.locator(f"#{where}_prompt").wait_for(timeout=5000)
    assert not page.locator("#i2l").is_visible()
    for _ in range(2):  # a second time it does not close what it has opened
        page.evaluate("imageToLoraHost.openLoras()")
        page.locator(f"#{where}_extra_refresh[data-pressed]").wait_for(timeout=5000)
        assert page.locator(f"#{where}_extra_tabs button", has_text="Lora").get_attribute("data-pressed")
        page.evaluate("document.querySelectorAll('[data-pressed]').forEach((item) => delete item.dataset.pressed)")
    page.close()


@pytest.mark.short
def test_ui_ux_has_its_loras_beside_the_page(place, browser):
    if place.version != SHORT:
        pytest.skip("it needs no host")
    page = browser.new_page()
    page.set_content(UI_UX.replace("PLACES", "".join(map(PLACE.format, WHERE[:2]))) + PAGE[PAGE.index("<script>") :])
    page.evaluate(
        "document.head.append(Object.assign(document.createElement('style'), {textContent: '.hidden{display:none}'}))"
    )
    page.add_script_tag(path=ROOT / "javascript" / "webui_host.js")
    for where in WHERE[:2]:
        page.evaluate(f"imageToLoraHost.insert('<lora:a:1>', '{where}')")
        page.locator(f"#{where}_prompt").wait_for(timeout=5000)
        assert page.locator(f"#{where}_prompt textarea").input_value() == "<lora:a:1>"
    page.evaluate("imageToLoraHost.openLoras()")
    assert page.locator("#lora_nav").get_attribute("data-pressed") and page.locator("#txt2img_prompt").is_visible()
    page.close()
