"""Each class of error of the `openai` clients: the current one, and 0.28 in an environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import openai
import pytest
from PIL import Image
from running_server import Running, running_server
from tiny_latent_diffusion import tiny_model

from ldm.serving.encoding import plain_file

OLD_PYTHON = os.environ.get("LDM_OLD_OPENAI")
OLD_SCRIPT = Path(__file__).parents[1] / "helpers" / "old_openai_errors.py"
PIPE = tiny_model("tiny")
PNG = plain_file(Image.new("RGB", (32, 32), "red"))


def broken_after(loads: int) -> Callable[[], Any]:
    """Return a loader that fails after a number of loads."""
    done: list[bool] = []

    def load() -> Any:
        done.append(True)
        if len(done) > loads:
            raise FileNotFoundError("weights")
        return PIPE

    return load


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[str, Running]]:
    """Start a usual server, one with a key, one whose queue has no room, and one that is stopping."""
    options: dict[str, dict[str, Any]] = {"usual": {}, "key": {"key": "k"}, "full": {"waiting": 0}, "end": {}}
    with ExitStack() as stack:
        made = {
            name: stack.enter_context(
                running_server({"tiny": lambda: PIPE, "broken": broken_after(1)}, **each)
            )
            for name, each in options.items()
        }
        made["end"].service.worker.stop()
        yield made


CASES: dict[str, tuple[str, dict[str, Any], type[openai.APIError], int, str]] = {
    "bad request": ("usual", {"n": 11}, openai.BadRequestError, 400, "integer_above_max_value"),
    "unknown model": ("usual", {"model": "none"}, openai.NotFoundError, 404, "model_not_found"),
    "no key": ("key", {}, openai.AuthenticationError, 401, "invalid_api_key"),
    "foreign origin": (
        "usual",
        {"extra_headers": {"origin": "https://other.example"}},
        openai.PermissionDeniedError,
        403,
        "origin_not_allowed",
    ),
    "full queue": ("full", {}, openai.RateLimitError, 429, "rate_limit_exceeded"),
    "failure": ("usual", {"model": "broken"}, openai.InternalServerError, 500, "server_error"),
    "stopping": ("end", {}, openai.InternalServerError, 503, "server_stopping"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("case", CASES)
def test_the_client_raises_its_own_class(servers, case):
    server, fields, kind, status, code = CASES[case]
    with openai.OpenAI(base_url=servers[server].v1, api_key="wrong", max_retries=0) as client:
        with pytest.raises(kind) as raised:
            client.images.generate(**{"prompt": "a cat", "extra_body": {"steps": 1}, **fields})
    error = raised.value
    assert type(error) is kind and (error.status_code, error.code) == (status, code)
    retried = error.response.headers["x-should-retry"]
    assert retried == ("true" if status == 429 else "false")


def test_a_server_that_does_not_answer_is_a_connection_error(servers):
    with openai.OpenAI(base_url="http://127.0.0.1:9/v1", api_key="any", max_retries=0) as client:
        with pytest.raises(openai.APIConnectionError):
            client.images.generate(prompt="a cat")
    with openai.OpenAI(base_url=servers["usual"].v1, api_key="any", max_retries=0, timeout=0.05) as client:
        with pytest.raises(openai.APITimeoutError):
            client.images.generate(prompt="a cat", extra_body={"steps": 250})


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_errors_of_edits_and_variations_have_the_same_classes(servers):
    with openai.OpenAI(base_url=servers["usual"].v1, api_key="any", max_retries=0) as client:
        with pytest.raises(openai.BadRequestError) as raised:
            client.images.edit(image=b"no image", prompt="a cat")
        assert raised.value.param == "image" and raised.value.code == "invalid_image"
        with pytest.raises(openai.NotFoundError) as absent:
            client.images.create_variation(image=PNG, model="none")
        assert absent.value.param == "model"


def test_errors_inside_a_stream_are_raised(servers):
    with openai.OpenAI(base_url=servers["full"].v1, api_key="any", max_retries=0) as client:
        with pytest.raises(openai.RateLimitError):
            list(client.images.generate(prompt="a cat", stream=True, partial_images=1))


@pytest.mark.skipif(OLD_PYTHON is None, reason="LDM_OLD_OPENAI names no Python with openai 0.28")
def test_the_old_client_raises_its_own_class(servers):
    bases = {name: running.v1 for name, running in servers.items()}
    done = subprocess.run(
        [str(OLD_PYTHON), str(OLD_SCRIPT), json.dumps(bases)],
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "bad request": ["InvalidRequestError", 400],
        "unknown model": ["InvalidRequestError", 404],
        "no key": ["AuthenticationError", 401],
        "full queue": ["RateLimitError", 429],
        "failure": ["APIError", 500],
        "stopping": ["ServiceUnavailableError", 503],
        "no server": ["APIConnectionError", None],
    }
