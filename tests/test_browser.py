"""`marval serve` as people meet it: a real server and a real headless Chromium."""

import numpy as np
import pytest
from PIL import Image

from marval.recipe import read_recipe
from serving import MODELS, needs_chromium, shoot, slide, tab
from test_cli import marval
from test_page import BAD_FILES, content, photo


@needs_chromium
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_generate_shows_the_iterations_as_they_come(visitor, width, scheme, tmp_path):
    page = visitor(width, scheme)
    dark = page.evaluate(
        "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).every(c => c < 90)"
    )
    assert dark == (scheme == "dark")
    page.evaluate("""() => {
      window.seen = [];
      new MutationObserver(() => document.querySelectorAll('.mv-growing figcaption').forEach((c) => {
        const told = c.textContent.match(/iteration \\d+/); if (told) window.seen.push(told[0]);
      })).observe(document.body, {childList: true, subtree: true});
    }""")
    slide(page, "Pictures of each model", 2)
    slide(page, "Iterations K", 6)
    page.click("#mv-draw")
    page.wait_for_selector(".mv-status:has-text('Done. Time of a picture')")
    seen = [int(told.split()[1]) for told in dict.fromkeys(page.evaluate("window.seen"))]
    assert len(seen) >= 3
    assert page.locator("#mv-generated .mv-panel").count() == 3
    assert page.locator("#mv-generated .mv-pictures img").count() == 6
    assert page.locator("#mv-generated .mv-strip img").count() == 18
    speeds = page.locator("#mv-generated .mv-speed").all_inner_texts()
    assert len(speeds) == 2
    assert all(int(told.split("×")[0]) > 2 for told in speeds)
    picture = page.locator("#mv-generated .mv-picture img").first
    assert picture.evaluate("image => getComputedStyle(image).imageRendering") == "pixelated"
    assert picture.bounding_box()["width"] >= 120
    shoot(page, f"generate-{width}-{scheme}")

    with page.expect_download() as download:
        page.locator("#mv-generated").get_by_role("link", name="Save").first.click()
    download.value.save_as(tmp_path / "a.png")
    recipe = read_recipe(tmp_path / "a.png")[0]
    assert (recipe.model, recipe.class_name, recipe.seed, recipe.iterations) == ("fashion-teacher", "sneaker", 0, 6)
    assert recipe.guidance == 3.0
    result = marval("sample", "--like", "a.png", "--out", "again", cwd=tmp_path)
    assert "the same, pixel for pixel" in result.stdout, result.stdout + result.stderr

    page.locator("#mv-generated").get_by_role("button", name="Edit").nth(3).click()
    page.wait_for_selector("#mv-painter [data-token]")
    assert page.locator("#mv-painter img").is_visible()


@needs_chromium
@pytest.mark.parametrize(("width", "scheme"), [(1280, "dark"), (390, "light")])
def test_edit_redraws_what_is_painted(visitor, width, scheme, tmp_path):
    page = visitor(width, scheme)
    tab(page, "Edit")
    page.click("#mv-start")
    page.wait_for_selector("#mv-painter [data-token]")
    page.wait_for_selector("text=Now paint")

    def save(name):
        with page.expect_download() as download:
            page.get_by_role("link", name="Save this picture").click()
        download.value.save_as(tmp_path / name)
        return np.asarray(Image.open(tmp_path / name)).reshape(7, 4, 7, 4)

    before = save("before.png")
    cells = page.locator("#mv-painter [data-token]")
    cells.nth(48).scroll_into_view_if_needed()
    start, end = cells.nth(14).bounding_box(), cells.nth(17).bounding_box()
    page.mouse.move(start["x"] + 5, start["y"] + 5)
    page.mouse.down()
    page.mouse.move(end["x"] + 5, end["y"] + 5, steps=12)
    page.mouse.up()
    assert page.inner_text("#mv-painter output") == "4 of 49 tokens painted"
    cells.nth(0).focus()  # and by the keyboard: down, right, press
    for key in ("ArrowDown", "ArrowRight", "Space"):
        page.keyboard.press(key)
    assert cells.nth(8).get_attribute("aria-pressed") == "true"
    shoot(page, f"edit-{width}-{scheme}")
    page.click("#mv-redraw")
    page.wait_for_selector("text=5 tokens redrawn, the other 44 bit-identical")
    after = save("after.png")
    changed = {row * 7 + column for row, _, column, _ in np.argwhere(before != after)}
    assert changed
    assert changed <= {8, 14, 15, 16, 17}
    result = marval("sample", "--like", "after.png", "--out", "again", cwd=tmp_path)
    assert "the same, pixel for pixel" in result.stdout, result.stdout + result.stderr

    page.click("#mv-vary")
    page.wait_for_selector("text=Done: 6 variations")
    assert page.locator("#mv-varied img").count() == 6
    shoot(page, f"vary-{width}-{scheme}")
    page.locator("#mv-varied").get_by_role("button", name="Edit").nth(1).click()
    page.wait_for_selector("text=This variation is the picture now")
    page.click("#mv-undo")
    page.wait_for_selector("text=Taken back")
    assert np.array_equal(save("undone.png"), after)


@needs_chromium
def test_uploads_good_and_bad(visitor, tmp_path):
    page = visitor()
    tab(page, "Edit")

    def upload(name, file):
        (tmp_path / name).write_bytes(file)
        with page.expect_file_chooser() as chooser:
            page.click("#mv-upload")
        chooser.value.set_files(tmp_path / name)

    for name, (file, message) in zip(
        ("text.png", "still.gif", "bomb.png"), (BAD_FILES[0], BAD_FILES[5], BAD_FILES[8]), strict=True
    ):
        upload(name, file)
        page.wait_for_selector(f".toast-body:has-text('{message}')")
        page.locator(".toast-close").first.click()
    upload("large.png", bytes(5_500_000))
    page.wait_for_selector(".toast-body")
    page.locator(".toast-close").first.click()
    upload("good.jpg", content(photo((300, 200)), "JPEG"))
    page.wait_for_selector("text=encoded once")
    assert page.locator("#mv-painter [data-token]").count() == 49


@needs_chromium
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_compare_and_count(visitor, width, scheme):
    page = visitor(width, scheme)
    tab(page, "Compare")
    for k in ("16", "8"):
        page.get_by_label(k, exact=True).locator("visible=true").first.uncheck()
    page.click("#mv-compare")
    page.wait_for_selector("text=Done: 9 pictures of one seed")
    assert page.locator("#mv-compared img").count() == 9
    assert page.locator(".mv-plot circle").count() == 15
    assert page.locator(".mv-table tbody tr").count() >= 4
    shoot(page, f"compare-{width}-{scheme}")

    tab(page, "Why?")
    slide(page, "Iterations K", 3)
    page.click("#mv-race")
    page.wait_for_selector("text=fashion-teacher 300 calls of the head")
    counts = page.locator("#mv-loops .mv-count").all_text_contents()
    assert counts == ["6", "300", "3", "3", "3", "3"]
    shoot(page, f"why-{width}-{scheme}")


@needs_chromium
def test_a_seed_out_of_range_cannot_be_sent_and_keys_are_enough(visitor):
    page = visitor()
    slide(page, "Seed", 10**7)
    assert int(page.get_by_label("number input for Seed").locator("visible=true").first.input_value()) <= 999_999
    slide(page, "Seed", 5)
    slide(page, "Pictures of each model", 1)
    for name in MODELS[::2]:
        page.get_by_label(name).locator("visible=true").first.uncheck()
    page.locator("#mv-draw").focus()
    page.keyboard.press("Enter")
    page.wait_for_selector(".mv-status:has-text('Done. Time of a picture: fashion-student')")
    assert page.locator("#mv-generated .mv-pictures img").count() == 1
    assert "seed 5" in page.inner_text("#mv-generated figcaption")
