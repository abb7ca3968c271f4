"""The page with models of text: a box for a prompt, suggestions, styles, and the nearest known prompts."""

import dataclasses

import pytest

from marval.config import OneStep
from marval.io.checkpoint import save_model
from marval.page.studio import Studio, Wanted
from marval.recipe import find_pipelines, read_recipe, redraw
from serving import finish, in_thread, serving, shoot, slide
from texts import text_config, text_model
from tiny import tiny_config, tiny_model


@pytest.fixture
def studio(tmp_path, monkeypatch, encoder):
    """A student and a teacher of text, and a teacher of classes."""
    monkeypatch.chdir(tmp_path)
    save_model("words", text_model(), dataclasses.replace(text_config(), draw=OneStep(clip=True)))
    save_model("slow-words", text_model(), text_config())
    save_model("classes", tiny_model(), tiny_config())
    return Studio(["words", "slow-words", "classes"], "cpu")


def test_a_prompt_is_drawn_with_its_style_and_a_new_one_names_the_nearest(studio):
    def draw(**given):
        return studio.draw(studio.job(Wanted.from_json({"model": "words", "iterations": 2, **given})))

    known, new = draw(**{"class": "a taxi", "style": "flat"}), draw(**{"class": "a rotten apple, 3-D style"})
    assert (known["picture"]["recipe"]["class"], known["nearest"]) == ("taxi, flat style", None)
    assert (new["picture"]["recipe"]["class"], new["nearest"][0]) == ("a rotten apple, 3d style", "apple")
    for wanted, message in (
        ({"class": "taxi", "style": "oil"}, "style 'oil': expected 3d, flat"),
        ({"class": ""}, "1 to"),
    ):
        with pytest.raises(ValueError, match=message):
            draw(**wanted)
    with pytest.raises(ValueError, match="style 'flat': not for a model of classes"):
        draw(**{"model": "classes", "class": "cross", "style": "flat"})


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_visitors_type_prompts(studio, chromium, tmp_path, width, scheme):
    with in_thread(studio) as address:
        context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page, errors = context.new_page(), []
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.set_default_timeout(30_000)
        page.goto(address)
        page.wait_for_selector("[data-ready]")
        form = page.locator("#generate")
        assert form.locator("datalist option").evaluate_all("all => all.map((one) => one.value)") == [
            "shark",
            "taxi",
            "apple",
        ]
        assert not form.get_by_label("classes").is_checked()
        form.get_by_role("button", name="shark").click()
        assert form.get_by_label("Prompt").input_value() == "shark"
        form.get_by_label("Prompt").fill("a green shark")
        form.get_by_label("Style").select_option("flat")
        slide(page, "generate", "Pictures of each model", 2)
        page.click("#generate .primary")
        finish(page, "generate", "Done. Time of a picture: words")
        told = form.locator(".shown figcaption").first.inner_text()
        assert told.startswith("a green shark, flat · seed 0")
        assert "nearest known: shark" in told
        with page.expect_download() as download:
            form.get_by_role("link", name="Save").first.click()
        download.value.save_as(tmp_path / "shark.png")
        recipe, _ = read_recipe(tmp_path / "shark.png")
        assert recipe.class_name == "a green shark, flat style"
        redraw(recipe, find_pipelines(tmp_path, "cpu"))
        shoot(page, f"prompt-{width}-{scheme}")

        form.get_by_role("button", name="Edit").first.click()
        edit = page.locator("#edit")
        assert [box.input_value() for box in edit.get_by_label("Prompt").all()] == ["a green shark"] * 2
        assert [box.input_value() for box in edit.get_by_label("Style").all()] == ["flat"] * 2
        edit.locator("[data-token]").nth(5).click()
        edit.get_by_label("Prompt").nth(1).fill("apple")
        page.click("#edit [value=redraw]")
        finish(page, "edit", "Done: 1 tokens redrawn, the other 15 are the same.")

        page.click("#tab-generate")  # models of classes and of text do not mix
        form.get_by_role("checkbox", name="classes").check()
        assert not form.get_by_role("checkbox", name="words", exact=True).is_checked()
        assert form.get_by_role("checkbox", name="cross").is_checked()
        page.click("#generate .primary")
        finish(page, "generate", "Done. Time of a picture: classes")
        context.close()
    assert errors == []


def test_the_bundled_models_open_with_a_prompt(chromium, tmp_path):
    with serving(cwd=tmp_path) as (address, _):
        page = chromium.new_context(viewport={"width": 1280, "height": 900}).new_page()
        page.set_default_timeout(60_000)
        page.goto(address)
        page.wait_for_selector("[data-ready]")
        form = page.locator("#generate")
        assert "shark" in form.locator("datalist option").evaluate_all("all => all.map((one) => one.value)")
        chosen = form.locator("[name=models]:checked").evaluate_all("all => all.map((one) => one.value)")
        assert chosen == ["emoji-teacher", "emoji-student", "emoji-tuned"]
        assert form.get_by_label("Style").locator("option").all_inner_texts() == ["3d", "cartoon", "flat"]
        form.get_by_role("checkbox", name="emoji-teacher").uncheck()
        form.get_by_label("Prompt").fill("a shark")
        form.get_by_label("Style").select_option("flat")
        page.click("#generate .primary")
        finish(page, "generate", "Done. Time of a picture: emoji-student")
        assert form.locator(".shown figcaption").first.inner_text().startswith("a shark, flat · seed 0")
        assert form.locator(".shown .pictures img").count() == 8
        shoot(page, "bundled")
