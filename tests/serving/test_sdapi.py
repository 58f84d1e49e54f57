"""A1111's door."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from running_server import Running, running_server
from tiny_latent_diffusion import tiny_model

from ldm.images.files import read_recipe
from ldm.samplers import SAMPLERS
from ldm.serving.worker import Follower

PIPE = tiny_model("tiny")


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running_server({"tiny": lambda: PIPE, "other": lambda: PIPE}) as running:
        yield running


def asked(server: Running, path: str, **options):
    made = server.http.post(f"/sdapi/v1/{path}", json=options)
    assert made.status_code == 200, made.text
    return made.json()


def encoded(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def image_of(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


def noisy() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))


def test_txt2img(server):
    options = {
        "prompt": "a red cat",
        "negative_prompt": "blue",
        "seed": 7,
        "steps": 3,
        "cfg_scale": 2.5,
        "sampler_name": "DPM++ 2M Karras",
        "batch_size": 2,
        "width": 32,
        "height": 32,
        "restore_faces": False,
        "save_images": True,
        "override_settings": {"sd_model_checkpoint": "other"},
    }
    made = asked(server, "txt2img", **options)
    own = PIPE.text_to_image(
        "a red cat",
        negative="blue",
        seed=7,
        n=2,
        steps=3,
        guidance=2.5,
        sampler="dpmpp_2m",
        spacing="karras",
        progress=False,
    )
    assert [image_of(each).tobytes() for each in made["images"]] == [each.tobytes() for each in own.pil()]
    info = json.loads(made["info"])
    assert info["all_seeds"] == [7, 8] and info["seed"] == 7 and info["sd_model_name"] == "other"
    assert info["unknown_options"] == ["restore_faces"] and info["sampler_name"] == "dpmpp_2m"
    assert "Steps: 3" in info["infotexts"][0] and made["parameters"]["prompt"] == "a red cat"


def test_defaults_and_random_seeds(server):
    seeds = {json.loads(asked(server, "txt2img", steps=1, seed=-1)["info"])["seed"] for _ in range(2)}
    assert len(seeds) == 2
    assert asked(server, "txt2img", steps=1, send_images=False)["images"] == []


def test_img2img(server):
    made = asked(
        server,
        "img2img",
        prompt="a cat",
        init_images=["data:image/png;base64," + encoded(noisy())],
        denoising_strength=0.5,
        seed=3,
        steps=4,
    )
    own = PIPE.image_to_image("a cat", noisy(), strength=0.5, seed=3, steps=4, progress=False)
    assert image_of(made["images"][0]).tobytes() == own.pil()[0].tobytes()


@pytest.mark.parametrize("inverted", [0, 1])
def test_masks_are_white_where_to_repaint(server, inverted):
    mask = Image.new("L", (32, 32), 0)
    mask.paste(255, (8, 8, 20, 20))
    made = asked(
        server,
        "img2img",
        prompt="a cat",
        init_images=[encoded(noisy())],
        mask=encoded(mask),
        inpainting_mask_invert=inverted,
        denoising_strength=1,
        steps=2,
    )
    found, kept = np.asarray(image_of(made["images"][0])), (np.asarray(mask) == 0) != bool(inverted)
    assert np.array_equal(found[kept], np.asarray(noisy())[kept])
    assert not np.array_equal(found[~kept], np.asarray(noisy())[~kept])


@pytest.mark.parametrize(
    ("path", "options", "param"),
    [
        ("txt2img", {"steps": "many"}, "steps"),
        ("txt2img", {"sampler_name": "Eulr"}, "sampler_name"),
        ("txt2img", {"scheduler": "Wild"}, "scheduler"),
        ("txt2img", {"batch_size": 10, "n_iter": 10}, "n_iter"),
        ("txt2img", {"width": 32}, "width"),
        ("txt2img", {"override_settings": []}, "override_settings"),
        ("txt2img", {"override_settings": {"sd_model_checkpoint": 3}}, "sd_model_checkpoint"),
        ("img2img", {}, "init_images"),
        ("img2img", {"init_images": "a"}, "init_images"),
        ("img2img", {"init_images": ["!"]}, "init_images"),
        ("img2img", {"init_images": [3]}, "init_images"),
        ("png-info", {}, "image"),
    ],
)
def test_errors_name_the_option(server, path, options, param):
    made = server.http.post(f"/sdapi/v1/{path}", json=options)
    assert made.status_code == 400 and made.json()["error"]["param"] == param


def test_what_clients_ask_for_first(server):
    assert server.http.get("/sdapi/v1/options").json()["sd_model_checkpoint"] == "tiny"
    assert [each["model_name"] for each in server.http.get("/sdapi/v1/sd-models").json()] == ["tiny", "other"]
    assert {each["name"] for each in server.http.get("/sdapi/v1/samplers").json()} == set(SAMPLERS)
    idle = server.http.get("/sdapi/v1/progress").json()
    assert idle["progress"] == 0.0 and idle["current_image"] is None


SEED = 6


def windows(image: np.ndarray) -> list[np.ndarray]:
    """Return every 32×32 part of an image (H, W, 3)."""
    rows, columns = image.shape[0] - 31, image.shape[1] - 31
    return [image[y : y + 32, x : x + 32] for y in range(rows) for x in range(columns)]


def test_progress_names_a_wrong_switch(server):
    made = server.http.get("/sdapi/v1/progress?skip_current_image=maybe")
    assert made.status_code == 400 and made.json()["error"]["param"] == "skip_current_image"


def test_progress_and_interrupt(server, monkeypatch):
    reached, opened, check = threading.Event(), threading.Event(), Follower.check

    def held(follower: Follower, done: int, total: int) -> None:
        check(follower, done, total)
        if done == 5:
            reached.set()
            opened.wait(30)

    monkeypatch.setattr(Follower, "check", held)
    with ThreadPoolExecutor(1) as pool:
        made = pool.submit(
            server.http.post,
            "/sdapi/v1/txt2img",
            json={"prompt": "a cat", "steps": 100, "seed": SEED, "batch_size": 2},
        )
        assert reached.wait(30)
        progress = server.http.get("/sdapi/v1/progress").json()
        assert progress["progress"] == 0.05 and progress["state"]["sampling_steps"] == 100
        assert progress["eta_relative"] > 0
        own = PIPE.text_to_image("a cat", steps=100, seed=SEED, n=2, keep_steps=True, progress=False)
        shown = np.asarray(image_of(progress["current_image"]).convert("RGB")).astype(float)
        for i in range(2):  # a grid of the two
            step = np.rint(own.steps[4][i].permute(1, 2, 0).numpy() * 255)
            distances = [np.abs(part - step).max() for part in windows(shown)]
            assert min(distances) <= 1
        without = server.http.get("/sdapi/v1/progress?skip_current_image=true").json()
        assert without["current_image"] is None and without["progress"] == 0.05
        assert server.http.post("/sdapi/v1/interrupt").json() == {}
        opened.set()
        response = made.result(30)
        assert response.status_code == 200 and json.loads(response.json()["info"])["interrupted"]
        images = [np.asarray(image_of(each)).astype(float) for each in response.json()["images"]]
        assert len(images) == 2
        for i, image in enumerate(images):  # the last estimates
            assert np.abs(image - np.rint(own.steps[4][i].permute(1, 2, 0).numpy() * 255)).max() <= 1


def test_png_info_gives_the_recipe(server):
    text = asked(server, "txt2img", prompt="a cat", seed=4, steps=2)["images"][0]
    info = asked(server, "png-info", image=text)
    assert info["parameters"] == read_recipe(base64.b64decode(text)) == json.loads(info["info"])
    assert asked(server, "png-info", image=encoded(noisy())) == {"info": "", "items": {}, "parameters": {}}
