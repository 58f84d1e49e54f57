"""Measure `ldm serve` under load: lost and wrong answers, memory, throughput and overhead.

Throughput is compared with the library's own batched loop, which runs before and after the server, twice: by
the clock, which other programs on the machine disturb, and by the processor time of an image, in which the
server's includes its HTTP, its files and the work on requests that were broken off. The same loop differs by
a fifth from process to process, so that several servers are started, and medians stated. The clients share
the processors with the server; their processor time is stated.

python benchmarks/serving.py --json serving.json
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import torch
from common import add_quick, parser, where

import ldm
from ldm.images.files import read_recipe
from ldm.support.files import write_atomically

PROMPTS = ("a red apple", "cat face", "rocket on a blue background", "tiger face", "green tree", "a dog")
MALFORMED: tuple[tuple[dict[str, Any], str], ...] = (
    ({"n": 0}, "n"),
    ({"n": "two"}, "n"),
    ({"size": "1024"}, "size"),
    ({"steps": 0}, "steps"),
    ({"guidance": "high"}, "guidance"),
    ({"sampler": "eulr"}, "sampler"),
    ({"prompt": None}, "prompt"),
    ({"model": "none"}, "model"),
    ({"response_format": "file"}, "response_format"),
)
PATH = "/v1/images/generations"
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown")
THINGS = ("apple", "rocket", "tree", "cat face", "dog", "house", "car", "fish")


def prompt_of(i: int, args: argparse.Namespace) -> str:
    """Return the prompt of request i: one of six, or with `--distinct` one of its own up to 512."""
    if not args.distinct:
        return PROMPTS[i % len(PROMPTS)]
    (rest, thing), n = divmod(i, len(THINGS)), len(COLOURS)
    return f"a {COLOURS[rest % n]} {THINGS[thing]} on a {COLOURS[(rest // n) % n]} background"


def started(args: argparse.Namespace) -> tuple[subprocess.Popen[str], str]:
    """Start the server; return its process and its address."""
    command = [sys.executable, "-m", "ldm", "serve", "--port", "0", "--queue", "1000"]
    command += ["--batch", str(args.batch), "--model", args.model]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8")
    assert process.stdout is not None
    line = process.stdout.readline()
    if " at " not in line:
        raise SystemExit("the server did not start")
    return process, line.split(" at ")[1].strip()


def resident(process: subprocess.Popen[str]) -> float:
    """Return the resident memory of a process in MiB."""
    text = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
    found = re.search(r"VmRSS:\s+(\d+)", text)
    return int(found[1]) / 1024 if found else float("nan")


def processor_seconds(process: subprocess.Popen[str]) -> float:
    """Return the processor time that a process has used, of all its threads."""
    text = Path(f"/proc/{process.pid}/stat").read_text(encoding="utf-8")
    user, system = text.rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def work(text: str) -> float:
    """Return the seconds of work that the counters state."""
    found = re.search(r"^ldm_image_seconds_sum (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else float("nan")


class Client:
    """A client that takes little of the processors, which it shares with the server.

    Args:
        url: Address of the server.
    """

    def __init__(self, url: str) -> None:
        self.host, _, port = url.removeprefix("http://").partition(":")
        self.port = int(port)
        self.streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def post(self, path: str, body: dict[str, Any]) -> tuple[int, bytes]:
        """Return the status and the content of an answer."""
        if self.streams is None:
            self.streams = await asyncio.open_connection(self.host, self.port, limit=1 << 20)
        reader, writer = self.streams
        content = json.dumps(body).encode()
        fields = f"host: {self.host}:{self.port}\r\ncontent-type: application/json"
        writer.write(f"POST {path} HTTP/1.1\r\n{fields}\r\ncontent-length: {len(content)}\r\n\r\n".encode())
        writer.write(content)
        head = (await reader.readuntil(b"\r\n\r\n")).decode("ascii").lower()
        length = re.search(r"content-length: (\d+)", head)
        assert length is not None
        return int(head.split()[1]), await reader.readexactly(int(length[1]))

    def close(self) -> None:
        """Close the connection."""
        if self.streams is not None:
            self.streams[1].close()
        self.streams = None


async def one(
    client: Client, kind: str, i: int, args: argparse.Namespace, seconds: float
) -> str | tuple[bytes, dict[str, Any]]:
    """Send request i; return what became of it, or the answer and what was asked."""
    body: dict[str, Any] = {
        "prompt": prompt_of(i, args),
        "seed": i,
        "steps": args.steps,
        "response_format": "b64_json",
    }
    if kind == "malformed":
        fields, param = MALFORMED[i % len(MALFORMED)]
        status, content = await client.post(PATH, {**body, **fields})
        right = 400 <= status < 500 and json.loads(content)["error"]["param"] == param
        return "refused" if right else f"wrongly answered: {status} {content[:100]!r}"
    if kind == "broken":
        try:
            await asyncio.wait_for(client.post(PATH, body), random.Random(i).uniform(0.02, seconds))
        except TimeoutError:
            client.close()
            return "broken off"
        return "answered before it was broken off"
    status, content = await client.post(PATH, body)
    return (content, body) if status == 200 else f"lost: {status} {content[:100]!r}"


def outcome(answer: str | tuple[bytes, dict[str, Any]]) -> str:
    """Return what became of a request that `one` sent; answers with images are read only now."""
    if isinstance(answer, str):
        return answer
    content, body = answer
    (item,) = json.loads(content)["data"]
    recipe = read_recipe(base64.b64decode(item["b64_json"]))
    right = item["seed"] == body["seed"] and recipe["seed"] == [body["seed"]]
    right = right and recipe["prompt"] == body["prompt"]
    return "answered" if right else "answered with the image of another request"


async def load(url: str, process: subprocess.Popen[str], args: argparse.Namespace, seconds: float) -> Any:
    """Send all requests by clients that each wait for an answer; return the outcomes, times and memory."""
    rng = random.Random(0)
    kinds = ["broken", "malformed", *["right"] * 8] * (args.requests // 10)
    rng.shuffle(kinds)
    waiting, answers, memory = list(enumerate(kinds)), list[Any](), list[float]()

    async def client() -> None:
        own = Client(url)
        while waiting:
            i, kind = waiting.pop()
            answers.append(await one(own, kind, i, args, seconds))
            memory.append(resident(process))
        own.close()

    begin = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(args.clients)))
    took = time.perf_counter() - begin
    return Counter(map(outcome, answers)), took, memory


def overhead(url: str, repeats: int, steps: int) -> list[float]:
    """Return, for single requests of one image, the milliseconds that were not work of the model."""
    found = []
    with httpx.Client(base_url=url, timeout=None, verify=False) as client:
        for i in range(repeats + 2):
            before = work(client.get("/metrics").text)
            begin = time.perf_counter()
            body = {"prompt": PROMPTS[0], "seed": i, "steps": steps, "response_format": "b64_json"}
            client.post(PATH, json=body).raise_for_status()
            took = time.perf_counter() - begin
            if i >= 2:
                found.append(1000 * (took - (work(client.get("/metrics").text) - before)))
    return found


def own_loop(args: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Return the seconds of an image in the library's own batched loop, by the clock and of the processor."""
    pipe = ldm.load(args.model)
    rounds = max(args.requests // 4 // args.batch, 2)
    seconds, processor = list[float](), list[float]()
    for k in range(rounds + 1):
        prompts = [prompt_of(k * args.batch + i, args) for i in range(args.batch)]
        begin, used = time.perf_counter(), time.process_time()
        pipe.text_to_image(prompts, seed=k * args.batch, steps=args.steps, progress=False)
        if k:
            seconds.append((time.perf_counter() - begin) / args.batch)
            processor.append((time.process_time() - used) / args.batch)
    return seconds, processor


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of one server, started for them, between two runs of the library's own loop."""
    before_load = own_loop(args)
    process, url = started(args)
    try:
        extra = overhead(url, args.repeats, args.steps)
        with httpx.Client(base_url=url, timeout=None, verify=False) as client:
            before = work(client.get("/metrics").text) / (args.repeats + 2)
        used, clients = processor_seconds(process), time.process_time()
        outcomes, seconds, memory = asyncio.run(load(url, process, args, 5 * before))
        used, clients = processor_seconds(process) - used, time.process_time() - clients
        metrics = httpx.get(f"{url}/metrics").text
    finally:
        process.terminate()
        process.wait()
    half, quarter = len(memory) // 2, max(len(memory) // 4, 1)
    growth = max(memory[-quarter:]) / max(memory[: half + 1][-quarter:]) - 1
    loops = zip(before_load, own_loop(args), strict=True)
    own, own_used = (statistics.median([*first, *last]) for first, last in loops)
    answered = outcomes["answered"]
    return {
        "outcomes": dict(outcomes),
        "requests": sum(outcomes.values()),
        "seconds": seconds,
        "images per second": answered / seconds,
        "the library's own loop, images per second": 1 / own,
        "throughput ratio": answered / seconds * own,
        "processor seconds of an image": used / answered,
        "the clients' processor seconds of an image": clients / answered,
        "the library's own loop, processor seconds": own_used,
        "throughput ratio by processor time": own_used * answered / used,
        "memory MiB, first, middle, last": [memory[0], memory[half], memory[-1]],
        "growth in the second half": growth,
        "overhead ms, median": statistics.median(extra),
        "batches of at most n images": dict(
            re.findall(r'ldm_batch_images_bucket\{le="(\S+)"\} (\d+)', metrics)
        ),
    }


def main() -> None:
    made = parser(__doc__.splitlines()[0], repeats=20)
    made.add_argument("--model", default="emoji-ldm", help="model that is served")
    made.add_argument("--clients", type=int, default=50, help="clients that send requests at once")
    made.add_argument("--requests", type=int, default=400, help="requests, in multiples of 10")
    made.add_argument("--steps", type=int, default=10, help="sampling steps")
    made.add_argument(
        "--distinct",
        action="store_true",
        help="give each request a prompt of its own, in place of one of six",
    )
    made.add_argument("--batch", type=int, default=8, help="images in a batch")
    made.add_argument("--servers", type=int, default=3, help="servers that are started, one after another")
    add_quick(made, clients=20, requests=60, steps=4, repeats=5, servers=1)
    args = made.parse_args()
    torch.set_num_threads(args.threads)
    rounds = []
    for i in range(args.servers):
        rounds.append(measured(args))
        print(f"server {i + 1}")
        for name, value in rounds[-1].items():
            print(f"    {name:<45} {value}")
    medians = {
        name: statistics.median(each[name] for each in rounds)
        for name, value in rounds[0].items()
        if isinstance(value, float)
    }
    print(f"median of {len(rounds)}")
    for name, value in medians.items():
        print(f"    {name:<45} {value}")
    if args.json:
        figures = {**medians, "servers": rounds, **where(args.threads)}
        write_atomically(args.json, json.dumps(figures, indent=1).encode())


if __name__ == "__main__":
    main()
