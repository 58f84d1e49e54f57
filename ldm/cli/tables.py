"""`ldm generate --prompts FILE --out FOLDER`: a data set of generated images in WebDataset shards."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ldm.cli.parsing import UsageError, argument

TABLE = (
    argument(
        "--prompts",
        "a .txt file with a prompt in each line, or a .csv or .jsonl file with the columns prompt, seed and"
        " options (needs --out)",
        type=Path,
    ),
    argument("--out", "folder of the shards to write (needs --prompts)", type=Path),
    argument("--shard", "images in a shard (default: %(default)s)", type=int, default=1000),
    argument("--batch", "images of one call (default: %(default)s)", type=int, default=8),
)


def names_table(args: argparse.Namespace) -> bool:
    """Return whether the prompts come from a table.

    Raises:
        UsageError: If there is neither a prompt nor a table, or both.
    """
    if (args.prompts is None) != (args.out is None):
        raise UsageError("--prompts FILE and --out FOLDER: expected both or neither")
    if (args.prompt is None) == (args.prompts is None):
        raise UsageError("expected a prompt, or --prompts FILE and --out FOLDER")
    if args.prompts is not None and args.animate is not None:
        raise UsageError("--animate: expected a prompt; shards hold no animations")
    return args.prompts is not None


def write_table(args: argparse.Namespace, options: dict[str, Any], load_pipe: Callable[[], Any]) -> int:
    """Generate the shards of this process and print their paths.

    Args:
        args: The parsed arguments.
        options: Options of the method for all rows, without those that were not given.
        load_pipe: Loads the model.
    """
    from ldm.data.generated.prompts import read_prompt_table
    from ldm.data.generated.shards import ShardPlan, generate_shards

    rows = read_prompt_table(args.prompts)
    numbers = {key: options.pop(key) for key in ("n", "seed") if key in options}
    plan = ShardPlan(rows=rows, options=options, shard=args.shard, batch=args.batch, **numbers)
    rank, size = (int(os.environ.get(name, usual)) for name, usual in (("RANK", 0), ("WORLD_SIZE", 1)))
    generate_shards(
        load_pipe(), plan, args.out, rank=rank, size=size, report=lambda path: print(path, flush=True)
    )
    return 0
