"""Measure the peak resident memory of a whole call, or of decoding a large image.

    python benchmarks/memory.py --json memory.json  # text to image, 512×512
    python benchmarks/memory.py --decode --size 2048 --json decode.json

Each run has a separate process.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import DTYPES, report, settle
from pairs import our_vae, vaes
from text_to_image import call, options, ours, prepare, theirs

import ldm


def peak() -> float:
    """Return the peak resident memory of this process in GB."""
    line = next(
        line
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        if line.startswith("VmHWM")
    )
    return int(line.split()[1]) * 1024 / 1e9


def forget() -> None:
    """Reset the kernel's record of peak memory."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def child(who: str, args: Any) -> None:
    """Run in a separate process: prepare, run, and print the peak of the run."""
    settle(args)
    if args.decode:
        model, dtype = "small" if args.small else "kl-f8", DTYPES[args.dtype]
        z = torch.randn(1, 4, args.size // 8, args.size // 8, generator=torch.Generator().manual_seed(0)).to(
            dtype
        )
        if who == "diffusers":
            peer = vaes(model, dtype)[1]
            run = lambda: peer.decode(z).sample  # noqa: E731
        else:
            mine = ldm.optimize(our_vae(model, dtype), memory=who == "ldm")
            run = lambda: mine.decode(z)  # noqa: E731
    else:
        path = prepare(args.folder, args.card, args.dtype)
        pipe = (
            theirs(path, args.dtype)
            if who == "diffusers"
            else ours(path, args.card, args.dtype, memory=who == "ldm")
        )
        run = lambda: call(pipe, who[:3] if who != "diffusers" else who, args.size, args.steps, args.guidance)  # noqa: E731
    forget()
    result = run()
    print(
        json.dumps(
            {"peak": peak(), "mean": float(result.float().mean()) if torch.is_tensor(result) else None}
        )
    )


def in_child(script: str, who: str, folder: Path) -> dict[str, float]:
    """Return the figures that a script prints as JSON when it runs one side in a process of its own."""
    command = [sys.executable, script, *sys.argv[1:], "--child", who, "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    if done.returncode:
        raise RuntimeError(f"{who}: {done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = options(__doc__.splitlines()[0], 1)
    parser.add_argument("--decode", action="store_true", help="decode one latent instead of a whole call")
    parser.add_argument(
        "--small", action="store_true", help="an autoencoder with a quarter of the channels, for a quick look"
    )
    parser.add_argument(
        "--sides",
        nargs="+",
        default=["ldm", "ldm, resident", "diffusers"],
        help="'ldm' uses memory=True, 'ldm, resident' does not",
    )
    parser.add_argument("--child")
    args = parser.parse_args()
    if args.child:
        child(args.child, args)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        if not args.decode:
            prepare(folder, args.card, args.dtype)
        peaks: dict[str, list[float]] = {who: [] for who in args.sides}
        for _ in range(args.repeats):
            for who in args.sides:
                peaks[who].append(in_child(__file__, who, folder)["peak"])
    settings = {
        "dtype": args.dtype,
        "size": args.size,
        **({} if args.decode else {"card": args.card, "steps": args.steps}),
    }
    bars = {} if args.decode else {"diffusers": 0.70}
    extra = {"bar": "less than 4 GB at 2048×2048; goal: less than 3 GB"} if args.decode else {}
    report(
        "peak memory of decoding" if args.decode else "peak memory of a call",
        settings,
        peaks,
        args,
        bars=bars,
        extra=extra,
        unit="GB",
    )


if __name__ == "__main__":
    main()
