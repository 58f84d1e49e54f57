"""Requests generated from the OpenAPI document, right and wrong: none is answered by 5xx.

`LDM_FUZZ=2000` sends so many; by default there are fewer.
"""

from __future__ import annotations

import base64
import io
import json
import os
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from PIL import Image
from running_server import Running, running_server
from tiny_latent_diffusion import tiny_model

PIPE = tiny_model("tiny")
CASES = int(os.environ.get("LDM_FUZZ", "100"))
TEXTS = (
    "",
    "a cat",
    "é🍎",
    "\x00",
    "a" * 20_000,
    "{a|b}",
    "((((",
    "(a:1e9)",
    "\u202e",
    "'; --",
    "../../etc/passwd",
)
ODD: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, [], {}, [1], {"a": 1}, *TEXTS),
    *("NaN", "inf", "1e5", "0x10", " 1", "1_000", "１", "٣", "true", "1x1", "99999x99999", "0x0", "auto"),
)


def image_file(mode: str, size: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, (200, 30, 30, 0)[: len(mode)]).save(buffer, format="PNG")
    return buffer.getvalue()


PICTURES = (
    image_file("RGBA", (32, 32)),
    image_file("RGB", (32, 32)),
    image_file("RGB", (1, 1)),
    image_file("RGBA", (8, 64)),
)
FILES = (
    *PICTURES,
    PICTURES[0][:40],
    b"",
    b"GIF89a",
    b"\x89PNG\r\n\x1a\n",
    b"RIFF\0\0\0\0WEBPVP8 ",
    b"\xff\xd8\xff",
)


def value_of(schema: dict[str, Any], rng: random.Random) -> Any:
    """Return a value that a schema allows; of numbers a small one, so that images are made fast."""
    if "enum" in schema:
        return rng.choice(schema["enum"])
    if schema.get("format") == "binary":
        return rng.choice(PICTURES)
    kind = schema["type"]
    if kind == "boolean":
        return rng.random() < 0.5
    if kind in ("integer", "number"):
        low = max(schema["minimum"], 0)
        high = min(schema.get("maximum", 3), low + 2)
        return rng.randint(int(low), int(high)) if kind == "integer" else rng.uniform(low, high)
    if kind == "array":
        return [base64.b64encode(rng.choice(PICTURES)).decode()]
    if schema.get("contentEncoding") == "base64":
        return base64.b64encode(rng.choice(PICTURES)).decode()
    return rng.choice(("32x32", "auto", "40x20")) if "pattern" in schema else rng.choice(TEXTS[:7])


def case_of(schema: dict[str, Any], rng: random.Random) -> tuple[dict[str, Any], bool]:
    """Return the fields of a request, and whether all of them are as the document says."""
    required = set(schema["required"])
    fields = {
        name: value_of(each, rng)
        for name, each in schema["properties"].items()
        if name in required or rng.random() < 0.3
    }
    fields.pop("model", None)
    right = rng.random() < 0.4
    if not right:
        for _ in range(rng.randint(1, 2)):
            name = rng.choice([*schema["properties"], "unknown", "model"])
            if rng.random() < 0.2:
                fields.pop(name, None)
            else:
                binary = schema["properties"].get(name, {}).get("format") == "binary"
                fields[name] = rng.choice(FILES if binary else ODD)
    if "steps" not in fields:
        fields["steps"] = 1
    return fields, right


def send_json(server: Running, path: str, fields: dict[str, Any], rng: random.Random) -> Any:
    content = json.dumps(fields).encode()
    if rng.random() < 0.05:
        content = content[: rng.randint(0, len(content))]
    return server.http.post(path, content=content, headers={"content-type": "application/json"})


def send_form(server: Running, path: str, fields: dict[str, Any], rng: random.Random) -> Any:
    files = [(name, value) for name, value in fields.items() if isinstance(value, bytes)]
    if files and rng.random() < 0.1:
        files.append((f"{files[0][0]}[]", rng.choice(FILES)))
    texts = {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in fields.items()
        if not isinstance(value, bytes)
    }
    return server.http.post(path, files=files or None, data=texts)


@pytest.fixture(scope="module")
def answers() -> Counter:
    """Send the requests; return the number of answers by path, status, and whether the request was right."""
    rng, found = random.Random(0), Counter()
    with running_server({"tiny": lambda: PIPE}, most=2**20) as server:
        document = server.http.get("/openapi.json").json()
        posts = [(path, each["post"]) for path, each in document["paths"].items() if "post" in each]
        for _ in range(CASES):
            path, operation = rng.choice(posts)
            ((media, content),) = operation["requestBody"]["content"].items()
            fields, right = case_of(content["schema"], rng)
            send: Callable[..., Any] = send_json if media == "application/json" else send_form
            made = send(server, path, fields, rng)
            assert made.status_code < 500, (path, fields, made.text)
            assert str(made.status_code) in operation["responses"], (path, fields, made.text)
            if made.status_code >= 400:
                assert set(made.json()["error"]) == {"message", "type", "param", "code"}
            found[path, made.status_code, right] += 1
        assert server.http.get("/health").json()["status"] == "ok"
        assert server.service.counters.failed == 0
    return found


def test_no_request_is_answered_by_5xx(answers):
    assert sum(answers.values()) == CASES


def test_right_and_wrong_requests_are_among_them(answers):
    statuses = Counter(status for _, status, _ in answers.elements())
    assert statuses[200] > CASES / 10 and statuses[400] > CASES / 10
