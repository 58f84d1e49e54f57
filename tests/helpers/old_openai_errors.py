"""Provoke each class of error of the `openai` client 0.28, run by a Python that has it: {name: base url}."""

from __future__ import annotations

import json
import sys

import openai

bases = json.loads(sys.argv[1])
openai.api_key = "wrong"
CASES = {
    "bad request": ("usual", {"n": 11}),
    "unknown model": ("usual", {"model": "none"}),
    "no key": ("key", {}),
    "full queue": ("full", {}),
    "failure": ("usual", {"model": "broken"}),
    "stopping": ("end", {}),
    "no server": ("none", {}),
}
found = {}
for name, (server, fields) in CASES.items():
    openai.api_base = bases.get(server, "http://127.0.0.1:9/v1")
    try:
        openai.Image.create(**{"prompt": "a cat", "steps": 1, **fields})
    except openai.error.OpenAIError as error:
        found[name] = [type(error).__name__, error.http_status]
print(json.dumps(found))
