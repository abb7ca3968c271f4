"""`marval serve` as people meet it: a real server and a real headless Chromium."""

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import marval as package
from marval.io.images import to_pil
from marval.recipe import find_pipelines, read_recipe, redraw
from serving import finish, serving, shoot, slide
from uploads import BAD_FILES, content, photo

K = "Iterations K (each model's own until you move it)"
LOW_CONTRAST = (Path(__file__).parents[1] / "helpers" / "contrast.js").read_text()


def save(page, link, file):
    """Save a picture, and let what `marval sample --like` does draw it again: its recipe, and its pixels by token."""
    with page.expect_download() as download:
        link.click()
    download.value.save_as(file)
    recipe, given = read_recipe(file)
    assert to_pil(redraw(recipe, find_pipelines(None, "cpu"))).tobytes() == given.tobytes()
    return recipe, np.asarray(given).reshape(7, 4, 7, 4)


def shown_in(page, form):
    """What a form shows of its drawing."""
    return page.locator(f"#{form} .shown")


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_generate_shows_the_iterations_as_they_come(visitor, width, scheme, tmp_path):
    page = visitor(width, scheme)
    ground = page.evaluate("getComputedStyle(document.documentElement).backgroundColor.match(/\\d+/g).map(Number)")
    assert (max(ground[:3]) < 90) == (scheme == "dark")
    page.evaluate("""() => {
      window.seen = [];
      new MutationObserver(() => document.querySelectorAll('.growing figcaption').forEach((caption) => {
        window.seen.push(caption.textContent.match(/iteration \\d+/)?.[0]);
      })).observe(document.body, {childList: true, subtree: true});
    }""")
    slide(page, "generate", "Pictures of each model", 2)
    slide(page, "generate", K, 6)
    page.click("#generate .primary")
    finish(page, "generate", "Done. Time of a picture: fashion-teacher")
    assert {f"iteration {k}" for k in range(1, 6)} <= set(page.evaluate("window.seen"))
    shown = shown_in(page, "generate")
    assert shown.locator(".panel").count() == 3
    assert shown.locator(".pictures img").count() == 6
    assert shown.locator(".strip canvas").count() == 18
    names = shown.locator(".panel h3").all_inner_texts()
    own = [package.load(name).config.draw.guidance for name in names]  # the slider was not moved
    notes = zip(shown.locator(".panel header p").all_inner_texts(), own, strict=True)
    assert all(f" · w = {w:g} · " in note for note, w in notes)
    speeds = shown.locator(".speed").all_inner_texts()
    assert [int(told.split("×")[0]) > 2 for told in speeds] == [True, True]
    picture = shown.locator(".picture img").first
    assert picture.evaluate("image => getComputedStyle(image).imageRendering") == "pixelated"
    assert picture.bounding_box()["width"] >= 120
    shoot(page, f"generate-{width}-{scheme}")
    source = shown.locator(".picture img").nth(3).get_attribute("src")
    shown.get_by_role("button", name="Edit").nth(3).click()
    assert page.locator("#edit .painter img").get_attribute("src") == source
    chosen = [page.locator(f"#edit [name={name}]").input_value() for name in ("model", "class", "new_class")]
    assert chosen == ["fashion-student", "bag", "bag"]


@pytest.mark.parametrize(("width", "scheme"), [(1280, "dark"), (390, "light")])
def test_edit_redraws_what_is_painted(visitor, width, scheme, tmp_path):
    page = visitor(width, scheme)
    page.click("#tab-edit")
    page.click("#edit [value=start]")
    finish(page, "edit", "Drawn. Now paint.")
    saving = page.get_by_role("link", name="Save this picture")
    _, before = save(page, saving, tmp_path / "before.png")
    cells = page.locator("#edit [data-token]")
    cells.nth(48).scroll_into_view_if_needed()
    start, end = cells.nth(14).bounding_box(), cells.nth(17).bounding_box()
    page.mouse.move(start["x"] + 5, start["y"] + 5)
    page.mouse.down()
    page.mouse.move(end["x"] + 5, end["y"] + 5, steps=12)
    page.mouse.up()
    assert page.inner_text("#edit output") == "4 of 49 tokens painted"
    cells.nth(0).focus()  # and by the keyboard: down, right, press
    for key in ("ArrowDown", "ArrowRight", "Space"):
        page.keyboard.press(key)
    assert cells.nth(8).get_attribute("aria-pressed") == "true"
    shoot(page, f"edit-{width}-{scheme}")
    page.click("#edit [value=redraw]")
    finish(page, "edit", "5 tokens redrawn, the other 44 are the same")
    _, after = save(page, saving, tmp_path / "after.png")
    changed = {row * 7 + column for row, _, column, _ in np.argwhere(before != after)}
    assert changed
    assert changed <= {8, 14, 15, 16, 17}

    page.click("#edit [value=vary]")
    finish(page, "edit", "Done: 6 variations")
    shown = shown_in(page, "edit")
    assert shown.locator("img").count() == 6
    shoot(page, f"vary-{width}-{scheme}")
    recipe, _ = save(page, shown.get_by_role("link", name="Save").nth(2), tmp_path / "varied.png")
    assert (recipe.seed, len(recipe.redrawn), len(recipe.history)) == (3, 24, 3)
    shown.get_by_role("button", name="Edit").nth(1).click()
    finish(page, "edit", "This picture is on the desk")
    page.click("#edit [data-undo]")
    finish(page, "edit", "Taken back")
    assert np.array_equal(save(page, saving, tmp_path / "undone.png")[1], after)


def test_uploads_good_and_bad_and_a_saved_picture_again(visitor, tmp_path):
    page = visitor()
    page.click("#tab-edit")

    def upload(name, file):
        (tmp_path / name).write_bytes(file)
        with page.expect_file_chooser() as chooser:
            page.click("#edit [data-upload]")
        chooser.value.set_files(tmp_path / name)

    for name in ("text", "wide"):
        file, message = BAD_FILES[name]
        upload(f"{name}.png", file)
        finish(page, "edit", message)
    upload("good.jpg", content(photo((300, 200)), "JPEG"))
    finish(page, "edit", "encoded once")
    assert "an upload has no recipe" in page.inner_text("#edit .canvas")
    page.locator("#edit [data-token]").nth(24).click()
    page.click("#edit [value=redraw]")
    finish(page, "edit", "1 tokens redrawn")
    saving = page.get_by_role("link", name="Save this picture")
    recipe, first = save(page, saving, tmp_path / "first.png")
    assert recipe.upload
    upload("again.png", (tmp_path / "first.png").read_bytes())
    page.get_by_role("button", name="all").click()
    page.get_by_role("button", name="none").click()
    page.locator("#edit [data-token]").nth(0).click()
    page.click("#edit [value=redraw]")
    finish(page, "edit", "1 tokens redrawn")
    _, second = save(page, saving, tmp_path / "second.png")
    assert np.array_equal(first[1:], second[1:])


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_compare_and_count(visitor, width, scheme, tmp_path):
    page = visitor(width, scheme)
    page.click("#tab-compare")
    for k in ("16", "8"):
        page.locator("#compare").get_by_label(k, exact=True).uncheck()
    page.click("#compare .primary")
    finish(page, "compare", "Done: 9 pictures of one seed")
    shown = shown_in(page, "compare")
    assert shown.locator("img").count() == 9
    shoot(page, f"compare-{width}-{scheme}")
    recipe, _ = save(page, shown.get_by_role("link", name="Save").nth(4), tmp_path / "compared.png")
    assert (recipe.model, recipe.iterations) == ("fashion-student", 2)

    page.click("#tab-why")
    slide(page, "why", K, 3)
    page.click("#why .primary")
    finish(page, "why", "fashion-teacher 300 calls of the head")
    assert shown_in(page, "why").locator(".count").all_text_contents() == ["6", "300", "3", "3", "3", "3"]
    shoot(page, f"why-{width}-{scheme}")


def test_what_is_drawn_is_what_the_visitor_chose_and_keys_are_enough(visitor, tmp_path):
    page = visitor()
    slide(page, "generate", "Seed", 10**7)
    assert page.locator("#generate").get_by_label("Seed, as a number").input_value() == "999999"
    slide(page, "generate", "Seed", 5)
    slide(page, "generate", "Pictures of each model", 1)
    slide(page, "generate", K, 7)
    page.locator("#generate").get_by_label("fashion-tuned").uncheck()
    page.locator("#generate").get_by_label("sneaker").uncheck()
    page.get_by_text("Guidance, temperature and order").click()
    slide(page, "generate", "Guidance w (each model's own until you move it)", 2)
    slide(page, "generate", "Temperature (lower: more typical pictures)", 0.5)
    page.get_by_label("Unmasking order").select_option("raster")
    page.locator("#generate .primary").focus()
    page.keyboard.press("Enter")
    finish(page, "generate", "Done. Time of a picture")
    shown = shown_in(page, "generate")
    notes = shown.locator(".panel header p").all_inner_texts()
    inner = ("100 steps", "one call per iteration")
    assert notes == [f"K = 7 · {calls} · w = 2 · temperature 0.5 · raster" for calls in inner]
    assert shown.locator(".picture figcaption span").first.inner_text() == "bag · seed 5"
    for i, name in enumerate(("fashion-teacher", "fashion-student")):
        strip = shown.locator(".strip").nth(i).locator("canvas").all()
        moments = [canvas.evaluate("canvas => canvas.toDataURL()").split(",")[1] for canvas in strip]
        pixels = [np.asarray(Image.open(io.BytesIO(base64.b64decode(moment)))) for moment in moments]
        drawn = [(moment[::4, ::4, -1] > 0).flatten() for moment in pixels]
        assert [int(tokens.sum()) for tokens in drawn] == sorted({int(tokens.sum()) for tokens in drawn})
        assert all(tokens[: tokens.sum()].all() for tokens in drawn)  # row by row from the first token
        recipe, _ = save(page, shown.get_by_role("link", name="Save").nth(i), tmp_path / f"{name}.png")
        assert (recipe.model, recipe.class_name, recipe.seed, recipe.iterations) == (name, "bag", 5, 7)
        assert (recipe.order, recipe.guidance, recipe.temperature) == ("raster", 2.0, 0.5)
    given = package.load("fashion-teacher").with_draw(guidance=2.0, temperature=0.5)
    expected = to_pil(given.sample(["bag"], seed=5, iterations=7, order="raster")[0])
    assert Image.open(tmp_path / "fashion-teacher.png").tobytes() == expected.tobytes()


def test_a_drawing_can_be_stopped(visitor):
    """A drawing by the teacher ends at once and what was shown stays; the line says so, and another may follow."""
    page = visitor()
    for name in ("generate", "edit"):
        page.click(f"#tab-{name}")
        start = {"edit": "#edit [value=start]", "generate": "#generate .primary"}[name]
        if name == "edit":
            page.locator("#edit [name=model]").select_option("fashion-teacher")
        slide(page, name, K, 49)
        page.click(start)
        finish(page, name, "fashion-teacher · ")
        page.click(f"#{name} [data-stop]")
        finish(page, name, "Stopped.")
        page.wait_for_timeout(500)  # what comes late must not unsay it
        assert page.inner_text(f"#{name} .status") == "Stopped."
        slide(page, name, K, 1)
        page.click(start)
        finish(page, name, "Drawn." if name == "edit" else "Done")


def test_what_is_stopped_or_taken_back_leaves_the_picture_that_is_edited(visitor):
    page = visitor()
    page.click("#tab-edit")
    picture = "#edit .canvas img"

    def start(model, iterations, words):
        page.locator("#edit [name=model]").select_option(model)
        slide(page, "edit", K, iterations)
        page.click("#edit [value=start]")
        finish(page, "edit", words)

    start("fashion-student", 1, "Drawn.")
    first = page.get_attribute(picture, "src")
    start("fashion-teacher", 49, "fashion-teacher · ")
    page.click("#edit [data-stop]")
    finish(page, "edit", "Stopped.")
    assert page.get_attribute(picture, "src") == first
    start("fashion-teacher", 1, "Drawn.")
    page.click("#edit [data-undo]")
    finish(page, "edit", "Taken back.")
    assert page.get_attribute(picture, "src") == first
    assert page.input_value("#edit [name=model]") == "fashion-student"


def test_a_page_of_any_model_draws_with_what_its_sliders_say(chromium, tmp_path):
    with serving("fashion-student", cwd=tmp_path) as (address, _):
        page = chromium.new_page()
        page.goto(address)
        page.wait_for_selector("[data-ready]")
        page.click("#generate .primary")
        finish(page, "generate", "Done")
        page.close()


def test_a_refusal_is_a_line_on_the_page(visitor):
    page = visitor()
    for name in ("fashion-teacher", "fashion-student", "fashion-tuned"):
        page.locator("#generate").get_by_label(name).uncheck()
    page.click("#generate .primary")
    finish(page, "generate", "Not possible: choose at least one of every list")
    page.click("#tab-edit")
    page.click("#edit [value=redraw]")
    finish(page, "edit", "Not possible: draw or upload a picture first")
    page.evaluate("document.querySelector('#edit [name=seed]').setAttribute('max', 10000000)")
    page.evaluate("document.querySelector('#edit [name=seed]').value = 2000000")
    page.click("#edit [value=start]")
    finish(page, "edit", "seed 2000000: expected a whole number from 0 to 999999")


UNDESCRIBED = """[...document.querySelectorAll('main img, canvas, svg')]
  .filter((picture) => !(picture.alt || picture.ariaLabel)).map((picture) => picture.outerHTML)"""
CONTROLS = {
    "button", "checkbox", "combobox", "link", "listbox", "option", "progressbar", "radio", "searchbox", "slider",
    "spinbutton", "switch", "tab", "textbox",
}  # fmt: skip


def nameless(page):
    """The controls that a screen reader would meet without a name, and how many it meets."""
    nodes = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
    found = [node for node in nodes if not node["ignored"] and node.get("role", {}).get("value") in CONTROLS]
    return len(found), [node["role"]["value"] for node in found if not node.get("name", {}).get("value")]


@pytest.mark.parametrize(("width", "scheme"), [(1280, "dark"), (390, "light")])
def test_every_tab_can_be_read_and_named(visitor, width, scheme):
    """Text contrasts with its ground (WCAG 2 AA), every control has a name, and nothing is wider than the window."""
    page = visitor(width, scheme)
    slide(page, "generate", "Pictures of each model", 1)
    slide(page, "generate", K, 2)
    page.get_by_text("Guidance, temperature and order").click()
    page.click("#generate .primary")
    finish(page, "generate", "Done. Time of a picture")
    shown_in(page, "generate").get_by_role("button", name="Edit").nth(1).click()
    for name in ("generate", "edit", "compare", "why"):
        page.click(f"#tab-{name}")
        seen, low = page.evaluate(LOW_CONTRAST)
        assert seen > 15
        assert low == [], (name, low)
        count, bare = nameless(page)
        assert count > 10
        assert bare == [], (name, bare)
        assert page.evaluate(UNDESCRIBED) == []
        shoot(page, f"tab-{name}-{width}-{scheme}")


def test_the_keyboard_reaches_everything_and_shows_where_it_is(visitor):
    page = visitor()
    page.get_by_role("tab", name="Generate").focus()
    for name, wanted in (("edit", 6), ("compare", 2), ("why", 2)):
        page.keyboard.press("ArrowRight")
        assert page.locator(f"#{name}").is_visible()
        reached = set()
        for _ in range(60):
            page.keyboard.press("Tab")
            at = page.evaluate("""() => {
              const at = document.activeElement, style = getComputedStyle(at);
              return [at.closest('form') && at.tagName === 'BUTTON' ? at.textContent : null, style.outlineStyle];
            }""")
            assert at[1] != "none", f"nothing shows that {at[0]} has the focus"
            reached |= {at[0]} - {None}
            if len(reached) == wanted:
                break
        assert len(reached) == wanted, reached
        page.locator(f"#tab-{name}").focus()
