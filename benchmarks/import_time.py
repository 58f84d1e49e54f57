"""Measure how long importing and the first command take, in new processes, against torch and the peers.

python benchmarks/import_time.py --json import.json
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from common import measure, parser, report

IMPORTS = {  # up to the point where a pipeline can be loaded
    "ldm": "import ldm; ldm.load, ldm.optimize",
    "torch": "import torch",
    "diffusers": "import diffusers; diffusers.StableDiffusionPipeline",
    "open_clip": "import open_clip",
}
STARTS = {  # what → (arguments of Python, largest ratio to `import torch`)
    "import ldm": (["-c", "import ldm"], 1.05),
    "ldm --help": (["-m", "ldm", "--help"], None),
    'ldm "red apple"': (["-m", "ldm", "red apple", "-o", "{folder}/apple.png"], 2.5),
}
HELP_SECONDS = 0.5


def run_python(*arguments: str) -> None:
    """Run Python in a new process."""
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    args = parser(__doc__.splitlines()[0], repeats=5).parse_args()
    if args.clock == "cpu":
        raise SystemExit(
            "--clock cpu: each import runs in a separate process, so only wall time can be measured"
        )
    imports = {
        who: lambda code=code: run_python("-c", code) for who, code in IMPORTS.items() if find_spec(who)
    }
    with tempfile.TemporaryDirectory() as folder:
        starts = {
            what: lambda arguments=arguments: run_python(*(a.format(folder=Path(folder)) for a in arguments))
            for what, (arguments, _) in STARTS.items()
        }
        seconds = measure({**imports, **starts}, args.repeats)
    torch = statistics.median(seconds["torch"])
    extra = {}
    for what, (_, bar) in STARTS.items():
        median = statistics.median(seconds[what])
        met = median <= HELP_SECONDS if bar is None else median <= bar * torch
        limit = f"{HELP_SECONDS} s" if bar is None else f"{bar} × torch"
        extra[what] = (
            f"{median:.3f} s, {median / torch:.2f} × torch (bar {limit}: {'met' if met else 'NOT met'})"
        )
    compared = {who: seconds[who] for who in imports}
    report("import", {"processes": "new, files in the page cache"}, compared, args, extra=extra)


if __name__ == "__main__":
    main()
