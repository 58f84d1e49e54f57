"""Calls of the `openai` client 0.28, run by a Python that has it: BASE_URL IMAGE MASK."""

from __future__ import annotations

import base64
import json
import sys
import urllib.request

import openai

openai.api_base, openai.api_key = sys.argv[1], "any"
found = {"version": openai.VERSION}


def content(item: dict[str, str]) -> bytes:
    if "b64_json" in item:
        return base64.b64decode(item["b64_json"])
    with urllib.request.urlopen(item["url"]) as response:
        return response.read()


for kind in ("url", "b64_json"):
    with open(sys.argv[2], "rb") as image, open(sys.argv[3], "rb") as mask:
        common = {"size": "256x256", "response_format": kind}
        made = openai.Image.create(prompt="a cat", n=2, **common)
        edited = openai.Image.create_edit(image=image, mask=mask, prompt="a cat", n=1, **common)
        image.seek(0)
        varied = openai.Image.create_variation(image=image, n=2, **common)
    files = [content(item) for response in (made, edited, varied) for item in response["data"]]
    found[kind] = [each[:8] == b"\x89PNG\r\n\x1a\n" for each in files]
for name, fields in (("n", {"n": 11}), ("size", {"size": "big"}), ("model", {"model": "none"})):
    try:
        openai.Image.create(**{"prompt": "a cat", **fields})
    except openai.error.InvalidRequestError as error:
        found[f"error of {name}"] = [error.param, error.http_status]
print(json.dumps(found))
