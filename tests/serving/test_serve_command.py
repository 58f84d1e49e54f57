"""`ldm serve` in a process: its start, its errors, and Ctrl-C."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from tiny_latent_diffusion import tiny_model

import ldm
from ldm.__main__ import main
from ldm.serving.launch import bound_socket

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("serve")
    ldm.save(tiny_model("tiny"), made / "tiny")
    return made


@pytest.fixture(scope="module")
def process(folder) -> Iterator[tuple[subprocess.Popen, str]]:
    arguments = ["serve", "--weights", str(folder / "tiny"), "--port", "0", "--dtype", "float32"]
    made = subprocess.Popen(
        [sys.executable, "-m", "ldm", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    line = made.stdout.readline()
    yield made, line
    made.kill()
    made.wait()


def test_it_serves_until_it_is_interrupted(process):
    made, line = process
    assert line.startswith("serving tiny at http://127.0.0.1:")
    url = line.split(" at ")[1].strip()
    with httpx.Client(base_url=url, timeout=60) as client:
        assert "<title>ldm" in client.get("/").text
        body = {"prompt": "a cat", "steps": 2, "response_format": "b64_json"}
        assert client.post("/v1/images/generations", json=body).status_code == 200
    made.send_signal(signal.SIGINT)
    assert made.wait(30) == 0
    assert made.stderr.read() == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nothing"], "nothing"),
        (["--model", "emoji-ldm", "--weights", "none"], "no such file"),
        (["--model", "emoji-ldm", "--model", "emoji-unclip", "--weights", "none"], "expected one for each"),
        (["--model", "emoji-ldm", "--model", "emoji-ldm"], "different names"),
        (["--port", "70000"], "--port"),
        (["--queue", "0"], "--queue"),
        (["--memory", "-1"], "positive"),
        (["--memory", "nan"], "positive"),
        (["--device", "tpu"], "tpu"),
        (["--host", "256.0.0.1"], "256.0.0.1"),
    ],
)
def test_wrong_options_end_it_with_one_line(arguments, message, capsys):
    assert main(["serve", *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1, err


def test_a_port_that_is_taken_is_named(capsys, folder):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main(["serve", "--weights", str(folder / "tiny"), "--port", port]) == 2
    assert port in capsys.readouterr().err


def test_small_parts_of_answers_are_sent_at_once():
    listening = bound_socket("127.0.0.1", 0)
    with listening:
        assert listening.proto == socket.IPPROTO_TCP  # else asyncio leaves Nagle's algorithm on: 40 ms
