"""The commands that make adapter files: convert, resize, merge, extract."""

from __future__ import annotations

import argparse

from ldm.cli.output import complain
from ldm.cli.parsing import Command, argument, parse_adapter
from ldm.support.text import escaped


def run_convert(args: argparse.Namespace) -> int:
    """Write an adapter in other names."""
    from ldm.registry.adapting import convert_adapter

    print(convert_adapter(args.adapter, args.to, names=args.names, model=args.model))
    return 0


def run_resize(args: argparse.Namespace) -> int:
    """Write a LoRA of other ranks."""
    from ldm.registry.adapting import resize_adapter

    print(
        resize_adapter(
            args.adapter, args.to, rank=args.rank, keep=args.keep, names=args.names, model=args.model
        )
    )
    return 0


def run_merge(args: argparse.Namespace) -> int:
    """Write the weighted sum of LoRAs."""
    from ldm.registry.adapting import merge_adapters

    pairs = [parse_adapter(text) for text in args.adapter]
    print(merge_adapters(pairs, args.to, rank=args.rank, names=args.names, model=args.model))
    return 0


def run_extract(args: argparse.Namespace) -> int:
    """Write the LoRA that is closest to the difference of two models; name what is left out."""
    from ldm.registry.adapting import extract_adapter

    path, left = extract_adapter(
        args.base,
        args.tuned,
        args.to,
        model=args.model,
        rank=args.rank,
        convolutions=args.convolutions,
        clamp=args.clamp,
        names=args.names,
    )
    if left:
        first = ", ".join(escaped(name, 100) for name in left[:3])
        complain(f"warning: {len(left)} tensors differ and are not in the adapter ({first})")
    print(path)
    return 0


ADAPTER = argument("adapter", "a .safetensors, .pt or .bin file, or a folder that peft or diffusers wrote")
TO = argument("--to", "file to write (with --names peft, folder)", short="-o", required=True)
SPELLING = argument(
    "--names",
    "names of the written tensors (default: %(default)s)",
    choices=("kohya", "diffusers", "peft"),
    default="kohya",
)
FOR = argument("--model", "model that it is for (default: one of the family that it was made for)")
ADAPTER_COMMANDS: tuple[Command, ...] = (
    Command(
        name="adapters convert",
        summary="Write an adapter in the names of kohya, diffusers or peft.",
        arguments=(ADAPTER, TO, SPELLING, FOR),
        run=run_convert,
    ),
    Command(
        name="adapters resize",
        summary="Write a LoRA of smaller ranks.",
        arguments=(
            ADAPTER,
            TO,
            argument("--rank", "largest rank of a module (default: the present one)", type=int),
            argument(
                "--keep",
                "part of the squared norm of each module's change that is kept (default: %(default)s)",
                type=float,
                default=1.0,
            ),
            SPELLING,
            FOR,
        ),
        run=run_resize,
    ),
    Command(
        name="adapters merge",
        summary="Write the weighted sum of LoRAs as one.",
        arguments=(
            argument("adapter", "FILE or FILE:STRENGTH, such as style.safetensors:0.5", nargs="+"),
            TO,
            argument("--rank", "largest rank of a module (default: the sum, which is exact)", type=int),
            SPELLING,
            FOR,
        ),
        run=run_merge,
    ),
    Command(
        name="adapters extract",
        summary="Write the LoRA that is closest to the difference of two models.",
        arguments=(
            argument("base", "weights of the first model"),
            argument("tuned", "weights of the second model"),
            TO,
            argument("--model", "name of both models (default: the one that the weights state)"),
            argument("--rank", "largest rank of a module (default: %(default)s)", type=int, default=32),
            argument("--convolutions", "extract residual blocks and resampling too", action="store_true"),
            argument(
                "--clamp",
                "quantile of the entries beyond which they are cut (default: %(default)s; kohya's is 0.99)",
                type=float,
                default=1.0,
            ),
            SPELLING,
        ),
        run=run_extract,
    ),
)
