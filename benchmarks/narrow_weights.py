"""Measure a call with weights of 16 bits against float32, on a CPU that does not multiply them.

    python benchmarks/narrow_weights.py --json narrow.json  # SD 1.5, 512×512, 20 steps, random weights
    python benchmarks/narrow_weights.py --size 128 --steps 1 --repeats 1

Each run has a separate process, and the sides take turns. A run loads the model, calls it once with one step,
and then with all steps: the second call is timed, and the memory is the peak of both.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import report, settle
from memory import forget, in_child, peak
from text_to_image import call, options, ours, prepare

from ldm.support.device import computing_dtype

FILE_DTYPE = "bf16"  # of the file that every side reads
SIDES = {
    "bfloat16": "bfloat16",
    "bfloat16, memory=True": "bfloat16",
    "float16": "float16",
    "float32": "float32",
}
MOST_GB, MOST_TIME = 3.0, 1.08  # the bars


def child(who: str, args: Any) -> None:
    """Run in a separate process: load, call twice, and print seconds and peak."""
    settle(args)
    path = prepare(args.folder, args.card, FILE_DTYPE)
    pipe = ours(path, args.card, SIDES[who], memory="memory" in who)
    if who != "float32" and computing_dtype(pipe.denoiser) != torch.float32:
        raise RuntimeError(f"this processor multiplies {SIDES[who]}: there is nothing to compare")
    forget()
    call(pipe, "ldm", args.size, 1, args.guidance)
    begin = time.process_time() if args.clock == "cpu" else time.perf_counter()
    call(pipe, "ldm", args.size, args.steps, args.guidance)
    end = time.process_time() if args.clock == "cpu" else time.perf_counter()
    print(json.dumps({"seconds": end - begin, "peak": peak()}))


def main() -> None:
    parser = options(__doc__.splitlines()[0], 2)
    parser.set_defaults(dtype=FILE_DTYPE)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=["bfloat16", "float32"])
    parser.add_argument("--child", choices=SIDES)
    args = parser.parse_args()
    if args.child:
        child(args.child, args)
        return
    seconds: dict[str, list[float]] = {who: [] for who in args.sides}
    peaks: dict[str, list[float]] = {who: [] for who in args.sides}
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        prepare(folder, args.card, FILE_DTYPE)
        for _ in range(args.repeats):
            for who in args.sides:
                got = in_child(__file__, who, folder)
                seconds[who].append(got["seconds"])
                peaks[who].append(got["peak"])
    settings = {"card": args.card, "size": args.size, "steps": args.steps, "guidance": args.guidance}
    extra: dict[str, float | str] = {}
    for who, values in peaks.items():
        bar = (
            ""
            if who == "float32"
            else f"; bar {MOST_GB} GB: {'met' if max(values) <= MOST_GB else 'NOT met'}"
        )
        extra[f"peak memory, {who}"] = f"{max(values):.2f} GB{bar}"
    # `report` compares "ldm" with every other side
    named = {"ldm" if who == args.sides[0] else who: runs for who, runs in seconds.items()}
    report(
        f"time of a call, ldm: {args.sides[0]}",
        settings,
        named,
        args,
        bars={"float32": MOST_TIME},
        extra=extra,
    )


if __name__ == "__main__":
    main()
