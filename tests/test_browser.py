"""`marval serve` as people meet it: a real server and a real headless Chromium."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

import marval as package
from marval.io.images import to_pil
from marval.recipe import find_pipelines, read_recipe, redraw
from processes import marval
from serving import MODELS, needs_chromium, shoot, slide, tab
from test_page import BAD_FILES, content, photo


def save(page, link, file):
    """Save a picture, and let what `marval sample --like` does draw it again: its recipe."""
    with page.expect_download() as download:
        link.click()
    download.value.save_as(file)
    recipe, given = read_recipe(file)
    assert to_pil(redraw(recipe, find_pipelines(None, "cpu"))).tobytes() == given.tobytes()
    return recipe


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

    def saved(name):
        with page.expect_download() as download:
            page.get_by_role("link", name="Save this picture").click()
        download.value.save_as(tmp_path / name)
        return np.asarray(Image.open(tmp_path / name)).reshape(7, 4, 7, 4)

    before = saved("before.png")
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
    after = saved("after.png")
    changed = {row * 7 + column for row, _, column, _ in np.argwhere(before != after)}
    assert changed
    assert changed <= {8, 14, 15, 16, 17}
    result = marval("sample", "--like", "after.png", "--out", "again", cwd=tmp_path)
    assert "the same, pixel for pixel" in result.stdout, result.stdout + result.stderr

    page.click("#mv-vary")
    page.wait_for_selector("text=Done: 6 variations")
    assert page.locator("#mv-varied img").count() == 6
    shoot(page, f"vary-{width}-{scheme}")
    link = page.locator("#mv-varied").get_by_role("link", name="Save").nth(2)
    recipe = save(page, link, tmp_path / "varied.png")
    assert (recipe.seed, len(recipe.redrawn), len(recipe.history)) == (3, 24, 3)
    page.locator("#mv-varied").get_by_role("button", name="Edit").nth(1).click()
    page.wait_for_selector("text=This variation is the picture now")
    page.click("#mv-undo")
    page.wait_for_selector("text=Taken back")
    assert np.array_equal(saved("undone.png"), after)


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
    page.wait_for_selector(".toast-body:has-text('File(s) exceed the maximum allowed size of 5.0 Mb: \"large.png\"')")
    page.locator(".toast-close").first.click()
    upload("good.jpg", content(photo((300, 200)), "JPEG"))
    page.wait_for_selector("text=encoded once")
    assert page.locator("#mv-painter [data-token]").count() == 49


@needs_chromium
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_compare_and_count(visitor, width, scheme, tmp_path):
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
    recipe = save(page, page.locator("#mv-compared").get_by_role("link", name="Save").nth(4), tmp_path / "compared.png")
    assert (recipe.model, recipe.iterations) == ("fashion-student", 2)

    tab(page, "Why?")
    slide(page, "Iterations K", 3)
    page.click("#mv-race")
    page.wait_for_selector("text=fashion-teacher 300 calls of the head")
    counts = page.locator("#mv-loops .mv-count").all_text_contents()
    assert counts == ["6", "300", "3", "3", "3", "3"]
    shoot(page, f"why-{width}-{scheme}")
    recipe = save(page, page.locator("#mv-loops").get_by_role("link", name="Save").first, tmp_path / "counted.png")
    assert (recipe.model, recipe.iterations, recipe.steps) == ("fashion-teacher", 3, 100)


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


@needs_chromium
def test_order_and_guidance_are_what_the_visitor_chose(visitor, tmp_path):
    page = visitor()
    slide(page, "Pictures of each model", 1)
    slide(page, "Iterations K", 7)
    page.get_by_label("fashion-tuned").locator("visible=true").first.uncheck()
    page.get_by_role("button", name="Guidance and order").click()
    slide(page, "Guidance w of a teacher", 2)
    order = page.get_by_label("Unmasking order").locator("visible=true").first
    order.click()
    page.get_by_role("option", name="raster").click()
    page.click("#mv-draw")
    page.wait_for_selector(".mv-status:has-text('Done. Time of a picture')")
    notes = page.locator("#mv-generated .mv-panel header p").all_inner_texts()
    assert notes == ["K = 7 · 100 steps · w = 2 · raster", "K = 7 · one call per iteration · raster"]
    for name in MODELS[:2]:
        panel = page.locator(f"#mv-generated article[aria-label={name}]")
        moments = [image.get_attribute("src") for image in panel.locator(".mv-strip img").all()]
        shown = [Image.open(io.BytesIO(base64.b64decode(moment.split(",")[1]))) for moment in moments]
        drawn = [(np.asarray(moment)[::4, ::4, -1] > 0).flatten() for moment in shown]
        assert [int(tokens.sum()) for tokens in drawn] == sorted({int(tokens.sum()) for tokens in drawn})
        for tokens in drawn:  # row by row from the first token, nothing beyond
            assert tokens[: tokens.sum()].all()
        recipe = save(page, panel.get_by_role("link", name="Save"), tmp_path / f"{name}.png")
        assert (recipe.order, recipe.guidance) == ("raster", 2.0 if name == "fashion-teacher" else None)
    given = package.load("fashion-teacher").with_chain(guidance=2.0)
    expected = to_pil(given.sample(["sneaker"], seed=0, iterations=7, order="raster")[0])
    assert Image.open(tmp_path / "fashion-teacher.png").tobytes() == expected.tobytes()


@needs_chromium
def test_pictures_are_there_to_edit_after_stop(visitor):
    """What is shown is what Edit takes, also where the drawing was stopped half-way."""
    page = visitor()
    page.click("#mv-draw")
    page.wait_for_selector(".mv-status:has-text('Done. Time of a picture')")
    slide(page, "Seed", 50)
    slide(page, "Iterations K", 49)
    page.click("#mv-draw")
    page.wait_for_selector("#mv-generated article[aria-label=fashion-teacher] .mv-growing")
    page.click("#mv-stop")
    page.wait_for_selector(".mv-status:has-text('Stopped.')")
    page.wait_for_timeout(2000)  # what comes late must not unsay it
    assert page.locator(".mv-status").first.inner_text() == "Stopped."
    student = page.locator("#mv-generated article[aria-label=fashion-student]")
    shown = student.locator(".mv-picture img").nth(1).get_attribute("src")
    student.get_by_role("button", name="Edit").nth(1).click()
    page.wait_for_selector("text=From Generate. Now paint.")
    assert page.locator("#mv-painter img").get_attribute("src") == shown


@needs_chromium
@pytest.mark.parametrize(
    ("name", "button", "stop"),
    [
        ("Edit", "mv-start", "mv-stop-edit"),
        ("Compare", "mv-compare", "mv-stop-compare"),
        ("Why?", "mv-race", "mv-stop-why"),
    ],
)
def test_stop_is_on_every_tab(visitor, name, button, stop):
    """A drawing by the teacher ends at once; the line says so, and another drawing may follow."""
    page = visitor()
    tab(page, name)
    if name == "Edit":
        page.get_by_label("Model").locator("visible=true").first.click()
        page.get_by_role("option", name="fashion-teacher").click()
    if name != "Compare":
        slide(page, "Iterations K", 49)
    page.click(f"#{button}")
    page.wait_for_selector(".mv-growing >> visible=true" if name != "Edit" else ".mv-status:has-text('iteration')")
    page.click(f"#{stop}")
    line = page.locator(".mv-status").locator("visible=true").first
    page.wait_for_selector(".mv-status:has-text('Stopped.') >> visible=true")
    page.wait_for_timeout(1500)  # what comes late must not unsay it
    assert line.inner_text() == "Stopped."
    if name == "Why?":
        slide(page, "Iterations K", 1)
        page.click(f"#{button}")
        page.wait_for_selector("text=Done: ")


TABS = ("Generate", "Edit", "Compare", "Why?")
LOW_CONTRAST = """() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data; return [r, g, b, a / 255];
  };
  const over = (top, below) => [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
  const light = ([r, g, b]) => [r, g, b].map((c) => c / 255)
    .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (element) => {
    if (!element) return [255, 255, 255, 1];
    const own = rgba(getComputedStyle(element).backgroundColor);
    return own[3] === 1 ? own : over(own, ground(element.parentElement));
  };
  const low = [];
  let seen = 0;
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    const visible = element.checkVisibility({opacityProperty: true, visibilityProperty: true});
    if (!visible || !walker.currentNode.data.trim()) continue;
    if (!element.getClientRects().length || element.closest('script, style, [disabled]')) continue;
    const style = getComputedStyle(element), below = ground(element);
    const colour = over(rgba(element.closest('svg') ? style.fill : style.color), below);
    const [a, b] = [light(colour), light(below)].sort((x, y) => y - x), size = parseFloat(style.fontSize);
    const needed = size >= 24 || (size >= 18.66 && style.fontWeight >= 700) ? 3 : 4.5;
    seen += 1;
    if ((a + 0.05) / (b + 0.05) < needed)
      low.push(`${walker.currentNode.data.trim().slice(0, 40)}: ${((a + 0.05) / (b + 0.05)).toFixed(2)}`);
  }
  return [seen, low];
}"""
UNDESCRIBED = """[...document.querySelectorAll('img, [class^=mv-] svg')]
  .filter((picture) => !(picture.alt || picture.ariaLabel || picture.ariaHidden)).map((picture) => picture.outerHTML)"""
CONTROLS = {
    "button", "checkbox", "combobox", "link", "listbox", "option", "progressbar", "radio", "searchbox", "slider",
    "spinbutton", "switch", "tab", "textbox",
}  # fmt: skip


def nameless(page):
    """The controls that a screen reader would meet without a name, and how many it meets."""
    nodes = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
    found = [node for node in nodes if not node["ignored"] and node.get("role", {}).get("value") in CONTROLS]
    return len(found), [node["role"]["value"] for node in found if not node.get("name", {}).get("value")]


@needs_chromium
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_tab_can_be_read_and_named(visitor, width, scheme):
    """Text contrasts with its ground (WCAG 2 AA), every control has a name, and nothing is wider than the window."""
    page = visitor(width, scheme)
    slide(page, "Pictures of each model", 1)
    slide(page, "Iterations K", 2)
    page.get_by_role("button", name="Guidance and order").click()
    page.click("#mv-draw")
    page.wait_for_selector(".mv-status:has-text('Done. Time of a picture')")
    page.locator("#mv-generated").get_by_role("button", name="Edit").nth(1).click()
    page.wait_for_selector("text=From Generate. Now paint.")
    for name in TABS:
        tab(page, name)
        page.wait_for_timeout(300)  # colours fade in
        seen, low = page.evaluate(LOW_CONTRAST)
        assert seen > 15
        assert low == [], (name, low)
        count, bare = nameless(page)
        assert count > 10
        assert bare == [], (name, bare)
        assert page.evaluate(UNDESCRIBED) == []
        shoot(page, f"tab-{name.strip('?').lower()}-{width}-{scheme}")


@needs_chromium
def test_the_keyboard_reaches_everything_and_shows_where_it_is(visitor):
    page = visitor()
    page.get_by_role("tab", name="Generate").first.focus()
    page.keyboard.press("ArrowRight")
    reached = []
    for name in ("Edit", "Compare"):
        control = page.get_by_role("tab", name=name).first
        control.focus()
        page.keyboard.press("Enter")
        wanted = {"Edit": {"mv-start", "mv-redraw", "mv-undo", "mv-vary"}, "Compare": {"mv-compare"}}[name]
        for _ in range(40):
            page.keyboard.press("Tab")
            found = page.evaluate(
                "() => { const at = document.activeElement, style = getComputedStyle(at);"
                " return [at.id, style.outlineStyle !== 'none' || style.boxShadow !== 'none']; }"
            )
            if found[0] in wanted:
                assert found[1], f"nothing shows that {found[0]} has the focus"
                reached.append(found[0])
            if wanted <= set(reached):
                break
        assert wanted <= set(reached)


@needs_chromium
def test_the_api_page_opens_and_asks_no_other_host(visitor):
    page = visitor(
        expected=("Failed to load resource",)
    )  # gradio looks for an MCP server and monitoring: there is none
    page.get_by_role("button", name="Use via API").click()
    for name in ("/models", "/draw", "/edit", "/vary"):
        page.wait_for_selector(f"text={name}")
    assert "Redraw some tokens" in page.inner_text("body")
