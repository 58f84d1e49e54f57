"""The page in a headless Chromium: every way to make an image, by mouse and by keyboard, and axe-core."""

from __future__ import annotations

import base64
import io
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from running_server import Running, running_server
from tiny_exemplars import tiny_exemplar_model
from tiny_latent_diffusion import tiny_model

from ldm.images.files import read_recipe

playwright_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium")

PIPE = tiny_model("tiny")
READY = "#status:has-text('ready')"
WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


@pytest.fixture
def slowly() -> Iterator[None]:
    """Let each step of the model last long enough for what the page shows meanwhile to be seen."""
    hook = PIPE.denoiser.register_forward_pre_hook(lambda *_: time.sleep(0.3))
    yield
    hook.remove()


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running_server({"tiny": lambda: PIPE}, most=2**24) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright_api.sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture
def page(browser, server) -> Iterator[Any]:
    """Open the page in a new profile; messages of the console and foreign requests fail the test."""
    context = browser.new_context(viewport=WIDE)
    made = context.new_page()
    wrong: list[str] = []
    made.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    made.on("pageerror", lambda error: wrong.append(str(error)))
    made.on(
        "request",
        lambda request: (
            wrong.append(request.url) if not request.url.startswith((server.url, "blob:", "data:")) else None
        ),
    )
    open_page(made, server)
    yield made
    context.close()
    assert wrong == []


def open_page(page: Any, server: Running) -> None:
    page.goto(server.url)
    page.wait_for_selector("#model option", state="attached")


def images_of(page: Any) -> list[Image.Image]:
    """Return the images that the page shows."""
    files = page.evaluate(READ)
    return [Image.open(io.BytesIO(base64.b64decode(each))) for each in files]


# The policy of the page lets scripts read no blobs by `fetch`, so the pixels are read from a canvas.
READ = """() => [...document.querySelectorAll("#images img")].map((image) => {
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
    canvas.getContext("2d").drawImage(image, 0, 0);
    return canvas.toDataURL().split(",")[1];
})"""


def choose(page: Any, content: bytes, name: str = "a.png") -> None:
    page.set_input_files("#file", {"name": name, "mimeType": "image/png", "buffer": content})


def png(size: tuple[int, int] = (32, 32)) -> bytes:
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, format="PNG")
    return buffer.getvalue()


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"))


def test_four_images_appear(page):
    page.fill("#prompt", "a red cat")
    page.fill("#seed", "3")
    page.click("#generate")
    page.wait_for_selector(READY)
    own = PIPE.text_to_image("a red cat", n=4, seed=3, progress=False)
    for shown, expected in zip(images_of(page), own.pil(), strict=True):
        assert np.array_equal(pixels(shown), pixels(expected))
    assert page.locator("#images figcaption span").all_inner_texts() == [f"Seed {3 + i}" for i in range(4)]


def test_images_are_shown_step_by_step_and_cancelled(page, slowly):
    page.fill("#prompt", "a cat")
    page.fill("#steps", "250")
    page.click("#generate")
    page.wait_for_selector("#images img")
    assert "step" in page.inner_text("#left-text")
    page.click("#cancel")
    page.wait_for_selector("#status:has-text('Cancelled')")
    assert page.is_enabled("#generate") and page.is_disabled("#cancel")
    page.fill("#steps", "2")
    page.click("#generate")
    page.wait_for_selector(READY)


def test_a_seed_is_used_again(page):
    page.fill("#prompt", "a cat")
    page.fill("#steps", "2")
    page.click("#generate")
    page.wait_for_selector(READY)
    seed = page.inner_text("#images figcaption span >> nth=1").removeprefix("Seed ")
    second = images_of(page)[1]
    page.click("text=Reuse seed >> nth=1")
    assert page.input_value("#seed") == seed
    page.select_option("#n", "1")
    page.click("#generate")
    page.wait_for_selector("#status:has-text('1 image is ready')")
    assert np.abs(pixels(images_of(page)[0]).astype(int) - pixels(second)).max() <= 1


def paint(page: Any, *points: tuple[float, float]) -> None:
    """Draw a line on the canvas, between points in parts of its sides."""
    page.locator("#canvas").scroll_into_view_if_needed()
    box = page.locator("#canvas").bounding_box()
    places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*place, steps=5)
    page.mouse.up()


def test_a_part_is_repainted_by_the_brush(page):
    content = png()
    choose(page, content)
    page.check("input[value=paint]")
    page.fill("#prompt", "a cat")
    page.fill("#steps", "2")
    page.click("#generate")
    assert "Paint over" in page.inner_text("#error")
    paint(page, (0.3, 0.3), (0.7, 0.3))
    page.click("#generate")
    page.wait_for_selector(READY)
    given = pixels(Image.open(io.BytesIO(content)))
    for image in images_of(page):
        changed = (pixels(image) != given).any(-1)
        assert changed[9, 12:20].any() and not changed[16:].any() and not changed[:4].any()


def test_a_frame_is_dragged_to_extend_an_image(page):
    content = png()
    choose(page, content)
    page.check("input[value=extend]")
    page.fill("#prompt", "a cat")
    page.fill("#steps", "2")
    paint(page, (0.75, 0.5), (0.9, 0.5))  # the right side of the frame
    grown = int(page.input_value("#right"))
    assert grown in (8, 16) and page.input_value("#left") == "0"
    page.fill("#left", "8")
    page.click("#generate")
    page.wait_for_selector(READY)
    for image in images_of(page):
        assert image.size == (40 + grown, 32)
        assert np.array_equal(pixels(image)[:, 8:40], pixels(Image.open(io.BytesIO(content))))


def test_variations_of_an_image(page, slowly):
    page.fill("#prompt", "a cat")
    page.fill("#steps", "2")
    page.click("#generate")
    page.wait_for_selector(READY)
    first = pixels(images_of(page)[0])
    page.fill("#prompt", "")
    page.click("text=Variations >> nth=1")  # the first is the mode of the editor
    page.wait_for_selector("#images .busy")
    page.wait_for_selector(READY)
    varied = images_of(page)
    assert len(varied) == 4 and varied[0].size == (32, 32)
    assert not np.array_equal(pixels(varied[0]), first)


def test_an_image_is_the_start_of_another(page):
    choose(page, png())
    assert page.is_checked("input[value=change]")
    page.fill("#prompt", "a cat")
    page.fill("#seed", "1")
    page.fill("#steps", "4")
    page.select_option("#n", "1")
    page.click("#generate")
    page.wait_for_selector(READY)
    own = PIPE.image_to_image(
        "a cat", Image.open(io.BytesIO(png())), strength=0.75, seed=1, steps=4, progress=False
    )
    assert np.array_equal(pixels(images_of(page)[0]), pixels(own.pil()[0]))


DROP = """([data, selector]) => {
    const bytes = Uint8Array.from(atob(data), (char) => char.charCodeAt(0));
    const transfer = new DataTransfer();
    transfer.items.add(new File([bytes], "a.png", { type: "image/png" }));
    const event = new DragEvent("drop", { dataTransfer: transfer, bubbles: true, cancelable: true });
    document.querySelector(selector).dispatchEvent(event);
}"""


def test_a_dropped_image_restores_its_settings(page, tmp_path):
    own = PIPE.text_to_image(
        "a blue cat", n=2, seed=8, steps=3, guidance=1.5, sampler="ddim", negative="red", progress=False
    )
    path = own.save(tmp_path / "a.png", separate=True)[1]
    page.evaluate(DROP, [base64.b64encode(path.read_bytes()).decode(), "#results"])
    page.wait_for_selector("#status:has-text('restored')")
    found = {
        name: page.input_value(f"#{name}")
        for name in ("prompt", "negative", "seed", "steps", "guidance", "sampler", "size")
    }
    assert found == {
        "prompt": "a blue cat",
        "negative": "red",
        "seed": "9",
        "steps": "3",
        "guidance": "1.5",
        "sampler": "ddim",
        "size": "32x32",
    }
    page.evaluate(DROP, [base64.b64encode(png()).decode(), "#results"])  # which has no recipe
    page.wait_for_selector("#editor:not([hidden])")


def test_downloads_carry_the_recipe(page):
    page.fill("#prompt", "a cat")
    page.fill("#steps", "2")
    page.click("#generate")
    page.wait_for_selector(READY)
    with page.expect_download() as download:
        page.click("text=Download >> nth=2")
    path = Path(download.value.path())
    recipe = read_recipe(path.read_bytes())
    assert recipe["prompt"] == "a cat" and recipe["index"] == 2
    assert download.value.suggested_filename.startswith("a-cat-")


def test_the_history_survives_a_reload(page, server):
    page.fill("#prompt", "a cat")
    page.fill("#steps", "2")
    page.click("#generate")
    page.wait_for_selector(READY)
    page.wait_for_selector("#history button >> nth=3")
    open_page(page, server)
    page.click("#history button >> nth=0")
    assert page.input_value("#prompt") == "a cat" and page.input_value("#steps") == "2"
    assert len(images_of(page)) == 1
    page.click("#forget")
    page.wait_for_selector("#history-section", state="hidden")


def test_the_keyboard_alone(page, slowly):
    keys = page.keyboard
    keys.type("a cat")  # the prompt has the focus
    keys.press("Enter")
    page.wait_for_selector(READY)
    for _ in range(60):  # to the first image's button "Edit", by Tab alone
        keys.press("Tab")
        label = page.evaluate("document.activeElement.getAttribute('aria-label') || ''")
        if label.startswith("Edit, image"):
            break
    keys.press("Enter")
    page.wait_for_selector("#editor:not([hidden])")
    assert page.evaluate("document.activeElement.id") == "canvas"
    for key in ("ArrowUp", "ArrowLeft", " ", "ArrowRight", " "):
        keys.press(key)
    assert page.evaluate("document.activeElement.id") == "canvas"
    for _ in range(60):
        keys.press("Shift+Tab")
        if page.evaluate("document.activeElement.id") == "generate":
            break
    before = page.inner_text("#images")
    keys.press("Enter")
    page.wait_for_function("before => document.getElementById('images').innerText !== before", arg=before)
    page.wait_for_selector(READY)
    page.fill("#steps", "250")
    page.focus("#prompt")
    keys.press("Enter")
    page.wait_for_selector("#status:has-text('Generating')")
    keys.press("Escape")
    page.wait_for_selector("#status:has-text('Cancelled')")


def test_unknown_words_are_named(page):
    page.fill("#prompt", "a zebra")
    page.fill("#steps", "2")
    page.click("#generate")
    page.wait_for_selector(READY)
    assert "zebra" in page.inner_text("#note") and not page.inner_text("#error")


def test_what_a_model_can_draw_is_found_by_a_search(browser):
    pipe = tiny_exemplar_model()
    with running_server({"tiny": lambda: pipe}) as running:
        running.service.fleet.seat("tiny")
        context = browser.new_context(viewport=NARROW, bypass_csp=True)
        page = context.new_page()
        page.goto(running.url)
        page.click("#known summary")
        assert str(len(pipe.exemplars.nouns)) in page.inner_text("#known-title")
        assert all(style in page.inner_text("#known-styles") for style in pipe.exemplars.styles)
        page.fill("#known-search", "do")
        assert page.locator("#known-list button").first.inner_text() == "dog"
        page.fill("#prompt", "a red")
        page.click("#known-list button >> nth=0")
        assert page.input_value("#prompt") == "a red dog"
        page.fill("#known-search", "zeppelin")
        assert page.inner_text("#known-list") == "none of this name"
        assert violations(page) == []
        page.fill("#prompt", "a zeppelin")
        page.click("#settings summary")
        page.fill("#steps", "1")
        page.click("#generate")
        page.wait_for_selector(READY)
        assert "zeppelin" in page.inner_text("#note")
        assert violations(page) == []
        context.close()


def violations(page: Any) -> list[tuple[str, str, str]]:
    """Return what axe-core finds on a page."""
    axe = pytest.importorskip("axe_core_python.sync_playwright", reason="axe-core-python is not installed")
    found = axe.Axe().run(page)["violations"]
    return [(each["id"], each["impact"], each["nodes"][0]["html"][:200]) for each in found]


def test_a_key_is_asked_for(browser):
    with running_server({"tiny": lambda: PIPE}, key="sesame") as running:
        page = browser.new_page()
        page.goto(running.url)
        page.fill("#key", "sesame")
        page.press("#key", "Tab")
        page.wait_for_selector("#model option", state="attached")
        page.fill("#prompt", "a cat")
        page.fill("#steps", "1")
        page.click("#generate")
        page.wait_for_selector(READY)
        page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
def test_axe_finds_no_violation(browser, server, scheme, size):
    context = browser.new_context(viewport=size, color_scheme=scheme, bypass_csp=True)
    page = context.new_page()
    open_page(page, server)
    choose(page, png())
    page.check("input[value=paint]")
    paint(page, (0.3, 0.3), (0.7, 0.7))
    page.fill("#prompt", "a cat")
    if size is NARROW:
        page.click("#settings summary")
    page.fill("#steps", "1")
    page.click("#generate")
    page.wait_for_selector(READY)
    page.wait_for_selector("#history button")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page is too wide"
    if folder := os.environ.get("LDM_SCREENSHOTS"):
        page.screenshot(path=f"{folder}/page-{scheme}-{size['width']}.png", full_page=True)
    found = violations(page)
    context.close()
    assert found == []
