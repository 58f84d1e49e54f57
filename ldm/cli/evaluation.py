"""The command that measures a set of generated images."""

from __future__ import annotations

import argparse
import json
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.cli.options import MODEL, MODEL_KEYWORDS
from ldm.cli.output import complain
from ldm.cli.parsing import Command, argument

if TYPE_CHECKING:
    from ldm.analysis.metrics.evaluation import ImageSet


def evaluate_images(args: argparse.Namespace) -> int:
    """Measure generated images; print the metrics, and write the report and the JSON that were asked for."""
    from ldm.analysis.metrics.bootstrap import Bootstrap
    from ldm.analysis.metrics.evaluation import METRICS, evaluate
    from ldm.analysis.metrics.features import open_features
    from ldm.analysis.metrics.report import check_report, write_report
    from ldm.analysis.metrics.sets import open_set
    from ldm.images.files import check_writable
    from ldm.support.device import pick_device
    from ldm.support.files import write_atomically

    device = pick_device(args.device)
    if args.report is not None:
        check_report(args.report)
    if args.json is not None:
        check_writable(args.json, (".json",))
    bootstrap = Bootstrap(resamples=args.resamples, seed=args.seed)
    extractors = [open_features(spec, device=device) for spec in args.features or ["emoji-clip"]]
    reference = None if args.reference is None else open_set(args.reference)
    with ExitStack() as stack:
        generated = generated_set(args, stack)
        found = evaluate(
            generated,
            reference,
            extractors,
            metrics=args.metrics or METRICS,
            bootstrap=bootstrap,
            batch=args.batch,
        )
        print(found.table())
        for text in found.warnings():
            complain(f"warning: {text}")
        if args.report is not None:
            print(write_report(args.report, found, generated, reference))
    if args.json is not None:
        write_atomically(Path(args.json), (json.dumps(found.to_dict(), indent=1) + "\n").encode())
        print(args.json)
    return 0


def generated_set(args: argparse.Namespace, stack: ExitStack) -> ImageSet:
    """Return the generated images: those of a path, or what a model draws for prompts.

    Raises:
        ValueError: If there is neither a path nor a file of prompts.
    """
    from ldm.analysis.metrics.sets import draw_set, open_set, read_prompts
    from ldm.registry.loading import load
    from ldm.support.files import temporary_folder

    if args.prompts is None:
        if args.images is None:
            raise ValueError("expected a folder or shards of generated images, or --prompts for a model")
        return open_set(args.images)
    prompts = read_prompts(args.prompts)
    pipe = load(args.model, **{name: getattr(args, name) for name in MODEL_KEYWORDS})
    folder = args.images or stack.enter_context(temporary_folder(Path(tempfile.gettempdir())))
    options = {name: getattr(args, name) for name in ("steps", "guidance", "sampler")}
    given = {name: value for name, value in options.items() if value is not None}
    drawn = draw_set(pipe, prompts, Path(folder), seed=args.seed, batch=args.batch, **given)
    if args.images is None:
        drawn.name = f"{pipe.name}, prompts of {args.prompts}"
    return drawn


EVALUATE = Command(
    name="evaluate",
    summary="Measure generated images by FID, KID, CMMD, precision, recall and CLIP score.",
    details=(
        "Distances are to the images of --reference. Each --features adds the metrics of one network;"
        " inception and dinov2 read a file of published weights, clip a folder."
    ),
    arguments=(
        argument(
            "images",
            "folder or WebDataset shards of generated images; with --prompts, the folder to write (default:"
            " a temporary one)",
            nargs="?",
        ),
        argument("--reference", "folder or shards of the images to compare with"),
        argument(
            "--features",
            "emoji-clip (default), inception=FILE, dinov2=FILE, clip=FOLDER, or open_clip's NAME=FILE;"
            " repeatable",
            action="append",
            metavar="NAME[=PATH]",
        ),
        argument("--metrics", "which metrics (default: all)", nargs="+", metavar="METRIC"),
        argument("--prompts", "text file with a prompt on each line, of which the model draws an image each"),
        argument("--seed", "seed of the first image and of the bootstrap (default: 0)", type=int, default=0),
        argument("--steps", "sampling steps (default: the model's)", type=int),
        argument("--guidance", "guidance scale (default: the model's)", type=float),
        argument("--sampler", "sampling method (default: the model's)"),
        argument("--resamples", "resamples of the bootstrap (default: %(default)s)", type=int, default=200),
        argument("--batch", "images at a time (default: %(default)s)", type=int, default=32),
        argument("--report", "write the report to this file: .html or .png"),
        argument("--json", "write the metrics to this file"),
        *MODEL,
    ),
    run=evaluate_images,
)
