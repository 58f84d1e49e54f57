"""Measure `ldm serve` under load: lost and wrong answers, memory, throughput and overhead.

Throughput is compared with the library's own batched loop, which runs before and after the server, twice: by
the clock, which other programs on the machine disturb, and by the processor time of an image, in which the
server's includes its HTTP, its files and the work on requests that were broken off. The clients share the
processors with the server; their processor time is stated.

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


async def one(client: httpx.AsyncClient, kind: str, i: int, steps: int, seconds: float) -> str:
    """Send request i; return what became of it."""
    body: dict[str, Any] = {
        "prompt": PROMPTS[i % len(PROMPTS)],
        "seed": i,
        "steps": steps,
        "response_format": "b64_json",
    }
    if kind == "malformed":
        fields, param = MALFORMED[i % len(MALFORMED)]
        made = await client.post(PATH, json={**body, **fields})
        right = 400 <= made.status_code < 500 and made.json()["error"]["param"] == param
        return "refused" if right else f"wrongly answered: {made.status_code} {made.text[:100]}"
    if kind == "broken":
        try:
            await client.post(PATH, json=body, timeout=random.Random(i).uniform(0.02, seconds))
        except httpx.TimeoutException:
            return "broken off"
        return "answered before it was broken off"
    made = await client.post(PATH, json=body)
    if made.status_code != 200:
        return f"lost: {made.status_code} {made.text[:100]}"
    (item,) = made.json()["data"]
    recipe = read_recipe(base64.b64decode(item["b64_json"]))
    right = item["seed"] == i and recipe["prompt"] == body["prompt"] and recipe["seed"] == [i]
    return "answered" if right else "answered with the image of another request"


async def load(url: str, process: subprocess.Popen[str], args: argparse.Namespace, seconds: float) -> Any:
    """Send all requests by clients that each wait for an answer; return the outcomes, times and memory."""
    rng = random.Random(0)
    kinds = ["broken", "malformed", *["right"] * 8] * (args.requests // 10)
    rng.shuffle(kinds)
    waiting, outcomes, memory = list(enumerate(kinds)), Counter[str](), list[float]()

    async def client() -> None:
        limits = httpx.Limits(max_keepalive_connections=1)
        async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits, verify=False) as own:
            while waiting:
                i, kind = waiting.pop()
                outcomes[await one(own, kind, i, args.steps, seconds)] += 1
                memory.append(resident(process))

    begin = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(args.clients)))
    return outcomes, time.perf_counter() - begin, memory


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
        prompts = [PROMPTS[(k + i) % len(PROMPTS)] for i in range(args.batch)]
        begin, used = time.perf_counter(), time.process_time()
        pipe.text_to_image(prompts, seed=k * args.batch, steps=args.steps, progress=False)
        if k:
            seconds.append((time.perf_counter() - begin) / args.batch)
            processor.append((time.process_time() - used) / args.batch)
    return seconds, processor


def main() -> None:
    made = parser(__doc__.splitlines()[0], repeats=20)
    made.add_argument("--model", default="emoji-ldm", help="model that is served")
    made.add_argument("--clients", type=int, default=50, help="clients that send requests at once")
    made.add_argument("--requests", type=int, default=400, help="requests, in multiples of 10")
    made.add_argument("--steps", type=int, default=10, help="sampling steps")
    made.add_argument("--batch", type=int, default=8, help="images in a batch")
    add_quick(made, clients=20, requests=60, steps=4, repeats=5)
    args = made.parse_args()
    torch.set_num_threads(args.threads)
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
    batches = re.findall(r'ldm_batch_images_bucket\{le="(\S+)"\} (\d+)', metrics)
    figures = {
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
        "batches of at most n images": dict(batches),
    }
    for name, value in figures.items():
        print(f"{name:<45} {value}")
    if args.json:
        write_atomically(args.json, json.dumps({**figures, **where(args.threads)}, indent=1).encode())


if __name__ == "__main__":
    main()
