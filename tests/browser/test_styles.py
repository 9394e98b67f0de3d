"""Several styles at once: groups of dropped pictures become one LoRA each."""

import pytest
from steps import choose_model, images_of, pane


def dropped(page, zone, pictures, cards):
    page.locator(f'[data-i2l-drop="{zone}"] input[type="file"]').first.set_input_files(pictures)
    page.locator("#i2l_groups .i2l-card").nth(cards - 1).wait_for()


@pytest.mark.short
def test_groups_of_dropped_pictures(place, open_page, pictures):
    page = open_page()
    choose_model(page, "mini")
    pane(page, "Several styles")
    dropped(page, "batch_files", pictures[:2], 2)
    groups = page.locator("#i2l_groups .i2l-group")
    dropped(page, "batch_files", pictures[2:3], 3)
    assert groups.count() == 2
    names = groups.locator('input[type="text"]')
    assert [names.nth(at).input_value() for at in range(2)] == ["picture-0", "picture-2"]
    names.nth(0).fill("oil")
    names.nth(1).fill("ink")
    dropped(page, "group 2", pictures[:1], 4)  # more for one that is there
    assert [names.nth(at).input_value() for at in range(2)] == ["oil", "ink"]
    groups.nth(0).locator('[data-i2l="remove"]').nth(1).click()
    dropped(page, "batch_files", pictures[1:2], 4)
    groups.nth(2).locator('[data-i2l="remove_group"]').click()
    page.locator('[data-i2l-drop="batch_files"] input[type="file"]').first.set_input_files(pictures[3:])
    page.locator("#i2l_groups .i2l-error:visible").first.wait_for()  # no picture: told, and no group is left of it
    assert groups.count() == 2
    page.locator("#i2l_each_of_groups").click()
    result = page.locator("#i2l_batch_result article", has_text="oil")
    result.wait_for()
    assert "2 / 2" in result.inner_text() and result.locator("img").count() == 2
    assert [len(images_of(place.lora / f"{name}.safetensors")) for name in ("oil", "ink")] == [1, 2]
    names.nth(1).fill("../up")
    page.locator("#i2l_each_of_groups").click()
    page.locator("#i2l_batch_error .i2l-error").first.wait_for()
