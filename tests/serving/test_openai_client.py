"""The current `openai` client: every method, every way to get images, and every class of error."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator

import numpy as np
import openai
import pytest
from PIL import Image
from running_server import Running, running_server
from tiny_exemplars import tiny_exemplar_model
from tiny_latent_diffusion import tiny_model

from ldm.images.files import read_recipe

PIPE = tiny_model("tiny")
FAST = {"steps": 2, "seed": 5}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running_server({"tiny": lambda: PIPE}) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.v1, api_key="any", max_retries=0) as made:
        yield made


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def noisy(size: tuple[int, int] = (32, 32), mode: str = "RGB") -> Image.Image:
    shape = (size[1], size[0], len(mode))
    values = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def holed(image: Image.Image) -> Image.Image:
    """Return an image whose middle is transparent."""
    made = image.convert("RGBA")
    made.paste((0, 0, 0, 0), (8, 8, 20, 20))
    return made


def content(item) -> bytes:
    return base64.b64decode(item.b64_json)


def test_files_are_those_that_the_library_writes(client, tmp_path):
    body = {"seed": 7, "steps": 3, "guidance": 2.5, "negative_prompt": "blue", "sampler": "ddim"}
    made = client.images.generate(prompt="a red cat", n=3, response_format="b64_json", extra_body=body)
    own = PIPE.text_to_image(
        "a red cat", n=3, seed=7, steps=3, guidance=2.5, negative="blue", sampler="ddim", progress=False
    )
    paths = own.save(tmp_path / "own.png", separate=True)
    assert [content(item) for item in made.data] == [path.read_bytes() for path in paths]
    assert [item.seed for item in made.data] == [7, 8, 9] and made.size == "32x32"


def test_urls_hold_the_same_files(client, server):
    one = client.images.generate(prompt="a cat", extra_body=FAST)
    two = client.images.generate(prompt="a cat", extra_body=FAST, response_format="b64_json")
    assert one.data[0].url.startswith(f"{server.v1}/images/files/")
    assert server.http.get(one.data[0].url).content == content(two.data[0])


def test_everything_but_the_prompt_has_a_default(client):
    seeds = {client.images.generate(prompt="a cat").data[0].seed for _ in range(2)}
    assert len(seeds) == 2  # random ones
    made = client.images.generate(prompt="a cat", model="dall-e-2")
    assert made.created > 1_700_000_000 and len(made.data) == 1


def test_all_fields_are_taken(client):
    made = client.images.generate(
        prompt="a cat",
        model="tiny",
        n=1,
        size="auto",
        quality="high",
        style="vivid",
        background="opaque",
        moderation="low",
        output_format="jpeg",
        output_compression=70,
        user="someone",
        response_format="b64_json",
        extra_body={**FAST, "wild": 1},
    )
    image = Image.open(io.BytesIO(content(made.data[0])))
    assert image.format == "JPEG" and made.output_format == "jpeg"
    assert made.warnings == ["unknown field wild: ignored"]
    recipe = read_recipe(content(made.data[0]))
    assert recipe["steps"] == 2 and recipe["seed"] == [5] and recipe["replayable"]


def test_other_sizes_are_the_nearest_one_resized(client):
    made = client.images.generate(
        prompt="a cat", size="96x64", response_format="b64_json", extra_body={**FAST, "seed": 0}
    )
    image = Image.open(io.BytesIO(content(made.data[0])))
    recipe = read_recipe(content(made.data[0]))
    assert image.size == (96, 64) and made.size == "96x64"
    assert recipe["width"] / recipe["height"] == 1.5 and "pixels" not in recipe
    own = PIPE.text_to_image(
        "a cat", seed=0, steps=2, progress=False, width=recipe["width"], height=recipe["height"]
    )
    assert image.tobytes() == own.pil()[0].resize((96, 64), Image.Resampling.LANCZOS).tobytes()


def test_strict_sizes_name_the_choices():
    with (
        running_server({"tiny": lambda: PIPE}, strict_sizes=True) as running,
        openai.OpenAI(base_url=running.v1, api_key="any", max_retries=0) as client,
        pytest.raises(openai.BadRequestError, match="32x32") as refused,
    ):
        client.images.generate(prompt="a cat", size="1024x1024")
    assert refused.value.param == "size" and refused.value.code == "invalid_size"


def test_a_mask_repaints_where_it_is_transparent(client):
    image = noisy()
    made = client.images.edit(
        image=png(image),
        mask=png(holed(Image.new("RGB", (32, 32), "white"))),
        prompt="a cat",
        n=2,
        response_format="b64_json",
        extra_body=FAST,
    )
    own = PIPE.inpaint("a cat", image, hole(), n=2, steps=2, seed=5, progress=False)
    for item, expected in zip(made.data, own.pil(), strict=True):
        found = np.asarray(Image.open(io.BytesIO(content(item))))
        assert np.array_equal(found, np.asarray(expected))
        outside = np.asarray(hole()) == 0
        assert np.array_equal(found[outside], np.asarray(image)[outside])


def hole() -> Image.Image:
    made = Image.new("L", (32, 32), 0)
    made.paste(255, (8, 8, 20, 20))
    return made


def test_an_image_without_a_mask_has_its_own(client):
    image = noisy()
    made = client.images.edit(
        image=[png(holed(image))], prompt="a cat", response_format="b64_json", extra_body=FAST
    )
    own = PIPE.inpaint("a cat", image, hole(), steps=2, seed=5, progress=False)
    found = Image.open(io.BytesIO(content(made.data[0])))
    assert found.tobytes() == own.pil()[0].tobytes()


def test_an_opaque_image_without_a_mask_is_changed_as_a_whole(client):
    image = noisy()
    made = client.images.edit(
        image=png(image),
        prompt="a cat",
        response_format="b64_json",
        extra_body={**FAST, "strength": 0.5},
    )
    own = PIPE.image_to_image("a cat", image, strength=0.5, steps=2, seed=5, progress=False)
    assert Image.open(io.BytesIO(content(made.data[0]))).tobytes() == own.pil()[0].tobytes()


def test_what_a_mask_keeps_is_kept_in_an_image_that_the_model_does_not_make(client):
    image = noisy((300, 200))
    mask = Image.new("RGBA", (300, 200), "white")
    mask.paste((0, 0, 0, 0), (100, 50, 200, 150))
    made = client.images.edit(
        image=png(image), mask=png(mask), prompt="a cat", response_format="b64_json", extra_body=FAST
    )
    found = np.asarray(Image.open(io.BytesIO(content(made.data[0]))))
    kept = np.asarray(mask)[..., 3] > 0
    assert found.shape == (200, 300, 3) and np.array_equal(found[kept], np.asarray(image)[kept])
    assert not np.array_equal(found[~kept], np.asarray(image)[~kept])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_variations(client):
    image = noisy()
    made = client.images.create_variation(image=png(image), n=2, response_format="b64_json", extra_body=FAST)
    own = PIPE.variations(image, n=2, steps=2, seed=5, progress=False)
    for item, expected in zip(made.data, own.pil(), strict=True):
        assert Image.open(io.BytesIO(content(item))).tobytes() == expected.tobytes()


def test_streams_hold_estimates_and_the_image(client):
    events = list(
        client.images.generate(
            prompt="a cat", n=2, stream=True, partial_images=2, extra_body={"steps": 6, "seed": 5}
        )
    )
    kinds = [event.type.removeprefix("image_generation.") for event in events]
    assert kinds == ["partial_image"] * 4 + ["completed"] * 2
    assert [event.partial_image_index for event in events[:4]] == [0, 0, 1, 1]
    own = PIPE.text_to_image("a cat", n=2, steps=6, seed=5, keep_steps=True, progress=False)
    estimates = [Image.open(io.BytesIO(content(event))) for event in events[:2]]
    for i, estimate in enumerate(estimates):
        step = np.rint(own.steps[1][i].permute(1, 2, 0).numpy() * 255)
        assert np.abs(np.asarray(estimate).astype(float) - step).max() <= 1
    last = [Image.open(io.BytesIO(content(event))) for event in events[4:]]
    assert [each.tobytes() for each in last] == [each.tobytes() for each in own.pil()]


def test_streams_of_edits_have_their_own_names(client):
    events = client.images.edit(
        image=png(noisy()), prompt="a cat", stream=True, partial_images=1, extra_body=FAST
    )
    assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "ldm"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_a_model_with_exemplars_states_what_it_can_draw():
    pipe = tiny_exemplar_model()
    with (
        running_server({"tiny": lambda: pipe}) as running,
        openai.OpenAI(base_url=running.v1, api_key="any", max_retries=0) as client,
    ):
        assert "nouns" not in client.models.retrieve("tiny").ldm  # it is not in memory yet
        made = client.images.generate(prompt="a catt", extra_body={"steps": 1})
        (warning,) = made.warnings
        assert "'catt'" in warning and "did you mean 'cat" in warning
        own = client.models.retrieve("tiny").ldm
        assert own["nouns"] == sorted(pipe.exemplars.nouns) and own["styles"] == pipe.exemplars.styles
        assert "nouns" not in client.models.list().data[0].ldm


@pytest.mark.parametrize(
    ("fields", "error", "param"),
    [
        ({"prompt": 3}, openai.BadRequestError, "prompt"),
        ({"n": 11}, openai.BadRequestError, "n"),
        ({"n": 0}, openai.BadRequestError, "n"),
        ({"n": True}, openai.BadRequestError, "n"),
        ({"n": "2"}, openai.BadRequestError, "n"),
        ({"size": "1024*1024"}, openai.BadRequestError, "size"),
        ({"size": "99999x1"}, openai.BadRequestError, "size"),
        ({"size": "0x0"}, openai.BadRequestError, "size"),
        ({"response_format": "file"}, openai.BadRequestError, "response_format"),
        ({"output_format": "svg"}, openai.BadRequestError, "output_format"),
        ({"output_compression": 101}, openai.BadRequestError, "output_compression"),
        ({"background": "transparent"}, openai.BadRequestError, "background"),
        ({"partial_images": 4, "stream": True}, openai.BadRequestError, "partial_images"),
        ({"partial_images": 1}, openai.BadRequestError, "partial_images"),
        ({"stream": "yes"}, openai.BadRequestError, "stream"),
        ({"model": "gpt-4"}, openai.NotFoundError, "model"),
        ({"extra_body": {"steps": 0}}, openai.BadRequestError, "steps"),
        ({"extra_body": {"seed": -1}}, openai.BadRequestError, "seed"),
        ({"extra_body": {"seed": 2**63}}, openai.BadRequestError, "seed"),
        ({"extra_body": {"guidance": "high"}}, openai.BadRequestError, "guidance"),
        ({"extra_body": {"sampler": "euller"}}, openai.BadRequestError, "sampler"),
        ({"extra_body": {"negative_prompt": []}}, openai.BadRequestError, "negative_prompt"),
        (
            {"extra_body": {"steps": 2, "num_inference_steps": 3}},
            openai.BadRequestError,
            "num_inference_steps",
        ),
    ],
)
def test_errors_name_their_field(client, fields, error, param):
    with pytest.raises(error) as refused:
        client.images.generate(**{"prompt": "a cat", **fields})
    assert refused.value.param == param and refused.value.type == "invalid_request_error"
    assert refused.value.response.headers["x-should-retry"] == "false"
    assert str(refused.value.body["message"]).startswith(param)


@pytest.mark.parametrize(
    ("files", "param"),
    [
        ({"image": b""}, "image"),
        ({"image": b"no image"}, "image"),
        ({"image": [png(noisy()), png(noisy())]}, "image"),
        ({"image": png(noisy()), "mask": png(noisy())}, "mask"),
        ({"image": png(noisy()), "mask": png(holed(noisy((16, 16))))}, "mask"),
        ({"image": png(noisy()), "mask": b"no image"}, "mask"),
    ],
)
def test_wrong_files_are_named(client, files, param):
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.edit(prompt="a cat", **files)
    assert refused.value.param == param


def test_a_missing_prompt_or_image_is_named(server):
    made = server.http.post("/v1/images/generations", json={})
    assert made.status_code == 400 and made.json()["error"]["param"] == "prompt"
    made = server.http.post("/v1/images/edits", files={"mask": png(noisy())}, data={"prompt": "a cat"})
    assert made.status_code == 400 and made.json()["error"]["param"] == "image"
