"""A server with a safety checker: flagged images are withheld, and unfinished ones are not shown."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import pytest
from running_server import Running, running_server
from tiny_latent_diffusion import tiny_model
from torch import Tensor


class Checker:
    """Flags the images at some places of a batch."""

    black, origin = False, {}

    def __init__(self) -> None:
        self.flags: list[bool] = []

    def __call__(self, pixels: Tensor) -> tuple[bool, ...]:
        return tuple(self.flags[: len(pixels)])

    def hide(self, pixels: Tensor, flagged: Sequence[bool]) -> Tensor:
        return pixels


CHECKER = Checker()
BODY = {"prompt": "a cat", "n": 2, "seed": 5, "steps": 3, "response_format": "b64_json"}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    pipe = tiny_model("tiny")
    pipe.safety = CHECKER
    with running_server({"tiny": lambda: pipe}) as running:
        yield running


def test_flagged_images_are_withheld(server):
    CHECKER.flags = [True, False]
    made = server.http.post("/v1/images/generations", json=BODY).json()
    assert [item["seed"] for item in made["data"]] == [6]
    assert made["warnings"] == ["the safety checker has flagged the images with seeds 5"]


def test_nothing_but_flagged_images_is_an_error(server):
    CHECKER.flags = [True, True]
    made = server.http.post("/v1/images/generations", json=BODY)
    assert made.status_code == 400 and made.json()["error"]["code"] == "content_policy_violation"


def test_streams_show_no_unfinished_images(server):
    CHECKER.flags = [False, False]
    body = {**BODY, "stream": True, "preview_every": 1, "progress": True}
    text = server.http.post("/v1/images/generations", json=body).text
    kinds = [json.loads(line[6:])["type"] for line in text.splitlines() if line.startswith("data: {")]
    assert kinds == ["progress"] * 3 + ["image_generation.completed"] * 2
    CHECKER.flags = [True, True]
    text = server.http.post("/v1/images/generations", json=body).text
    assert "content_policy_violation" in text and "b64_json" not in text
