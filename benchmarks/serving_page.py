"""Measure how soon the page of `ldm serve` shows something after Generate: a preview, and the images.

A headless Chromium opens the page of a server that has just started. The first row is the first request. The
processor time is the server's, of all its threads; other programs disturb it less than the clock.

python benchmarks/serving_page.py --json serving_page.json
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import time
from typing import Any

from common import add_quick, parser, where
from serving import processor_seconds, started

from ldm.support.files import write_atomically

PROMPT = "a red apple on a blue background"
READY = "#status:has-text('ready')"


def seconds_of(page: Any, process: subprocess.Popen[str]) -> dict[str, float]:
    """Press Generate; return the seconds to the first preview and to the images, and the server's own."""
    begin, used = time.perf_counter(), processor_seconds(process)
    found = {}
    page.click("#generate")
    for name, selector in (("preview", "#images img"), ("images", READY)):
        page.wait_for_selector(selector)
        found[name] = time.perf_counter() - begin
        found[f"{name}, processor"] = processor_seconds(process) - used
    return found


def measure(args: argparse.Namespace, chromium: str) -> dict[str, Any]:
    """Return the seconds of the first request after the start, and of the ones that follow."""
    from playwright.sync_api import sync_playwright

    process, url = started(args)
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            page = browser.new_page()
            page.goto(url)
            page.wait_for_selector("#model option", state="attached")
            page.fill("#prompt", PROMPT)
            found = [seconds_of(page, process) for _ in range(args.repeats + 1)]
            browser.close()
    finally:
        process.terminate()
        process.wait()
    later = {name: statistics.median(each[name] for each in found[1:]) for name in found[0]}
    return {"first request": found[0], "later requests, median": later}


def main() -> None:
    made = parser(__doc__.splitlines()[0], repeats=5)
    made.add_argument("--model", default="emoji-ldm", help="model that is served")
    made.add_argument("--batch", type=int, default=8, help="images in a batch")
    add_quick(made, repeats=2)
    args = made.parse_args()
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if chromium is None:
        raise SystemExit("expected Chromium in PATH or in the variable CHROMIUM")
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    figures = measure(args, chromium)
    for name, each in figures.items():
        print(f"{name:<24}", ", ".join(f"{what} {value:.2f} s" for what, value in each.items()))
    if args.json:
        write_atomically(args.json, json.dumps({**figures, **where(args.threads)}, indent=1).encode())


if __name__ == "__main__":
    main()
