"""Measure the import time, up to the point where a pipeline can be loaded, against diffusers and torch.

python benchmarks/import_time.py --json import.json
"""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

from common import measure, parser, report

CODE = {
    "ldm": "import ldm; ldm.load, ldm.optimize",
    "torch": "import torch",
    "diffusers": "import diffusers; diffusers.StableDiffusionPipeline",
    "open_clip": "import open_clip",
}


def main() -> None:
    args = parser(__doc__.splitlines()[0], repeats=5).parse_args()
    if args.clock == "cpu":
        raise SystemExit(
            "--clock cpu: each import runs in a separate process, so only wall time can be measured"
        )
    sides = {
        who: lambda code=code: subprocess.run([sys.executable, "-c", code], check=True)
        for who, code in CODE.items()
        if find_spec(who)
    }
    report("import", {"processes": "new, files in the page cache"}, measure(sides, args.repeats), args)


if __name__ == "__main__":
    main()
