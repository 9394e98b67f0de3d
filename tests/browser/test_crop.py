"""Which part of a picture, in a real browser: dragged, zoomed, with the keyboard and with fingers; several squares."""

import re

import pytest
from PIL import Image
from steps import choose_model, drop, finish, images_of, look, name_it

FINGERS = """([from, to]) => {
    const stage = document.querySelector(".i2l-stage"), seen = stage.getBoundingClientRect();
    const at = (x) => ({clientX: seen.left + x * seen.width, clientY: seen.top + seen.height / 2});
    const tell = (kind, id, x) => stage.querySelector(".i2l-square").dispatchEvent(new PointerEvent(kind,
        {pointerId: id, pointerType: "touch", bubbles: true, cancelable: true, button: 0, ...at(x)}));
    stage.setPointerCapture = () => {};  // these pointers are made up
    from.forEach((x, id) => tell("pointerdown", 70 + id, x));
    to.forEach((x, id) => tell("pointermove", 70 + id, x));
    to.forEach((x, id) => tell("pointerup", 70 + id, x));
}"""


@pytest.fixture(scope="session")
def wide(tmp_path_factory):
    path = tmp_path_factory.mktemp("wide") / "wide.png"
    parts = [Image.effect_mandelbrot((900, 300), (-2, -1, 1, 1), quality) for quality in (20, 50, 90)]
    Image.merge("RGB", parts).save(path)
    return str(path)


def where(page):
    """Left, top and side of the chosen square, as the dialog tells them."""
    return [int(one) for one in re.findall(r"\d+", page.locator('.i2l-crop [role="status"] .i2l-value').inner_text())][
        :3
    ]


def ids(page):
    cards = page.locator("#i2l_tray .i2l-card")
    return [card.get_attribute("data-i2l-id").partition("@")[2] for card in cards.all()]


def open_crop(page, number=0):
    page.locator("#i2l_tray .i2l-card").nth(number).get_by_text("Crop").click()
    page.locator(".i2l-crop[open] .i2l-square").first.wait_for()


def take(page):
    before = page.locator("#i2l_tray [data-i2l-turn]").get_attribute("data-i2l-turn")
    page.locator('.i2l-crop [data-i2l-crop="take"]').click()
    page.locator(f'#i2l_tray [data-i2l-turn="{int(before) + 1}"]').wait_for()


def drag(page, start, end):
    """Over the stage, in shares of it."""
    seen = page.locator(".i2l-stage").bounding_box()
    place = lambda share: (seen["x"] + share[0] * seen["width"], seen["y"] + share[1] * seen["height"])  # noqa: E731
    page.mouse.move(*place(start))
    page.mouse.down()
    page.mouse.move(*place(end), steps=5)
    page.mouse.up()


@pytest.mark.short
def test_squares_of_a_wide_picture(place, open_page, pictures, wide):
    page = open_page()
    drop(page, [pictures[0], wide])
    page.locator("#i2l_tray input").nth(1).fill("3")
    open_crop(page, 1)
    assert where(page) == [300, 0, 300] and page.locator(".i2l-square:focus").count() == 1
    drag(page, (0.5, 0.5), (0.2, 0.5))  # with the mouse, further than there is picture
    assert where(page)[1:] == [0, 300] and abs(where(page)[0] - 30) <= 3
    drag(page, (0.1, 0.5), (-0.3, 0.5))
    assert where(page) == [0, 0, 300]
    for key, expected in (
        ("ArrowRight", [3, 0, 300]), ("Shift+ArrowRight", [33, 0, 300]), ("ArrowLeft", [30, 0, 300]),
        ("ArrowDown", [30, 0, 300]), ("-", [38, 8, 283]), ("ArrowUp", [38, 5, 283]), ("+", [30, 0, 300]),
    ):  # fmt: skip
        page.keyboard.press(key)
        assert all(abs(a - b) <= 1 for a, b in zip(where(page), expected, strict=True)), (key, where(page))
    corner = page.locator('.i2l-square [data-i2l-corner="se"]').bounding_box()
    page.mouse.move(corner["x"] + corner["width"] / 2, corner["y"] + corner["height"] / 2)
    page.mouse.down()
    page.mouse.move(corner["x"] - 60, corner["y"] - 60, steps=3)
    page.mouse.up()
    left, top, side = where(page)
    assert abs(left - 30) <= 1 and top <= 1 and side < 280, "the opposite corner stays"
    page.locator(".i2l-zoom input").fill("1000")
    assert where(page)[1:] == [0, 300]
    page.mouse.wheel(0, 200)
    assert where(page)[2] < 300
    page.locator('[data-i2l-crop="centre"]').click()
    assert where(page) == [300, 0, 300]
    page.evaluate(FINGERS, [[0.4, 0.6], [0.45, 0.55]])
    assert abs(where(page)[2] - 150) <= 5 and abs(where(page)[0] - 375) <= 5
    page.locator('[data-i2l-crop="centre"]').click()
    page.locator('[data-i2l-crop="add"]').click()
    assert where(page) == [0, 0, 300] and page.locator(".i2l-square").count() == 2
    page.locator('[data-i2l-crop="add"]').click()
    page.locator('[data-i2l-crop="add"]').click()
    page.keyboard.press("Delete")
    assert where(page) == [600, 0, 300] and page.locator(".i2l-square").count() == 3
    look(page, place, "crop")
    take(page)
    assert ids(page) == ["", "", "0,0,300", "600,0,300"]
    shares = [one.input_value() for one in page.locator("#i2l_tray input").all()]
    assert shares == ["1", "3", "1", "1"], "a square that was there keeps its share"
    shown = [one.get_attribute("src") for one in page.locator("#i2l_tray img").all()]
    assert len(set(shown)) == 4, "each card shows its own square"
    choose_model(page, "mini")
    name_it(page, "squares")
    page.locator("#i2l_make").click()
    finish(page, "squares")
    made = images_of(place.lora / "squares.safetensors")
    assert [one.get("crop") for one in made] == [None, None, "0,0,300", "600,0,300"]
    assert [round(one["weight"], 3) for one in made] == [0.167, 0.5, 0.167, 0.167]
    assert made[1]["sha256"] == made[2]["sha256"] == made[3]["sha256"] != made[0]["sha256"]


def test_a_dialog_that_is_left_changes_nothing(place, open_page, wide):
    page = open_page()
    drop(page, [wide])
    for leave in (lambda: page.keyboard.press("Escape"), lambda: page.locator('[data-i2l-crop="cancel"]').click()):
        open_crop(page)
        page.keyboard.press("Shift+ArrowLeft")
        leave()
        page.locator(".i2l-crop[open]").wait_for(state="detached")
        assert ids(page) == [""]
    open_crop(page)
    assert where(page) == [300, 0, 300]
    page.locator('[data-i2l-crop="add"]').click()
    take(page)
    assert len(ids(page)) == 2
    open_crop(page, 1)  # its card's square is the chosen one
    assert where(page) == [0, 0, 300]
    page.locator('[data-i2l-crop="remove"]').click()
    assert page.locator('[data-i2l-crop="remove"]').is_disabled(), "one square there always is"
    take(page)
    assert ids(page) == [""]


def test_the_dialog_for_those_who_do_not_see_it(place, browser, open_page, wide):
    page = open_page()
    drop(page, [wide])
    open_crop(page)
    dialog = page.get_by_role("dialog", name="Which part of the picture")
    square = dialog.get_by_role("button", name="Square 1", exact=True)
    assert square.get_attribute("aria-pressed") == "true" and square.get_attribute("tabindex") == "0"
    assert dialog.get_by_role("slider", name="Size of the square").count() == 1
    assert dialog.get_by_role("status").count() == 1
    names = [
        dialog.get_by_role("button").nth(n).inner_text().strip() for n in range(dialog.get_by_role("button").count())
    ]
    assert all(names), names
    page.locator('[data-i2l-crop="add"]').focus()
    page.keyboard.press("Enter")
    assert dialog.get_by_role("button", name="Square 2", exact=True).evaluate("one => one === document.activeElement")
    for language, word in (("zh-CN", "方块 1"), ("ru-RU", "Квадрат 1")):
        context = browser.new_context(locale=language, viewport={"width": 400, "height": 700})
        other = context.new_page()
        other.set_default_timeout(240_000)
        other.goto(place.url, wait_until="domcontentloaded")
        open_page.show(other)
        drop(other, [wide])
        other.locator('#i2l_tray .i2l-card [data-i2l="act"]').click()
        other.locator(f'.i2l-square[aria-label="{word}"]').wait_for()
        box = other.locator(".i2l-crop").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 400, "it fits a telephone"
        context.close()
