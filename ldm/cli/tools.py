"""The commands that sample no prompt: replay, models, training, grids and files of weights."""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

from ldm.cli.options import GRID, QUALITY
from ldm.cli.output import check_output, complain, write_images
from ldm.cli.parsing import Command, argument
from ldm.support.text import escaped


def replay_file(args: argparse.Namespace) -> int:
    """Generate the image of a file again from its recipe."""
    from ldm.images.files import read_recipe
    from ldm.registry.replaying import replay

    recipe, source = read_recipe(args.image), Path(args.image)
    output = args.output or source.with_name(f"{source.stem}-replay{source.suffix}")
    check_output(output, quality=args.quality)
    images = replay(
        recipe,
        weights=args.weights,
        limits=args.limits,
        download=args.download,
        vocabulary=args.vocabulary,
        safety=args.safety,
        adapters=args.adapters,
        controls=args.controls,
    )
    write_images(images, output, quality=args.quality)
    return 0


def print_models(args: argparse.Namespace) -> int:
    """Print the name and the summary of each model."""
    from ldm.catalog.lookup import find_card
    from ldm.registry.names import list_models

    for name in list_models():
        print(escaped(f"{name}: {find_card(name)[0].summary}"))
    return 0


def train_config(args: argparse.Namespace) -> int:
    """Train a recipe or a single stage; print the folder of the model or of the export at the end."""
    from ldm.support.device import pick_device
    from ldm.training.distributed.group import joined_processes
    from ldm.training.recipe import train_recipe

    pick_device(args.device)
    try:
        with joined_processes(args.device) as processes:
            folder = train_recipe(
                args.config,
                runs=args.runs,
                device=args.device,
                until=args.until,
                dry_run=args.dry_run,
                report=functools.partial(print, flush=True) if processes.first else None,
            )
    except KeyboardInterrupt:
        complain("interrupted; the same command resumes from the last checkpoint")
        return 130
    if folder is not None and processes.first:
        print(folder)
    return 0


def step_or_stage(text: str) -> int | str:
    """Return a number of steps, or else the name of a stage."""
    return int(text) if text.isdecimal() else text


def export_run(args: argparse.Namespace) -> int:
    """Write the averaged weights of a run."""
    from ldm.training.run import open_run

    run = open_run(args.config, runs=args.runs)
    if run.step == 0:
        raise ValueError(f"{args.config!r}: the run {run.config.name!r} has no checkpoint; train it first")
    name = "export" if args.width is None else f"export-{args.width:g}"
    folder = Path(args.to) if args.to else run.folder / name
    run.export(folder, width=args.width, step=args.step)
    print(folder)
    return 0


def assemble_folder(args: argparse.Namespace) -> int:
    """Write the folder of a model."""
    from ldm.registry.bundling import gather

    print(gather(args.card, args.folder))
    return 0


def print_grid(args: argparse.Namespace) -> int:
    """Print the states and evaluations of a sampler on a model's grid."""
    from ldm.analysis.plan import describe_grid
    from ldm.catalog.lookup import find_model
    from ldm.samplers.conventions import get_convention

    card = find_model(args.model)
    convention = get_convention(args.convention) if args.convention else card.grids()
    sampler = args.sampler or card.defaults.sampler
    steps = card.defaults.steps if args.steps is None else args.steps
    spacing = {"spacing": args.spacing} if args.spacing else {}
    grid = convention.grid(card.schedule.make(), steps, sampler, **spacing)
    print(describe_grid(grid, sampler, **convention.options.get(sampler, {})))
    return 0


def print_report(args: argparse.Namespace) -> int:
    """Print what a file of weights holds; return 1 if it has damage, NaN or code, or no known part."""
    from ldm.registry.inspection import inspect

    report = inspect(args.path, nan=args.nan, digest=not args.no_hash, model=args.model)
    print(report.text())
    return 1 if report.unsafe or report.bad or not report.parts else 0


RUNS = argument("--runs", "folder of the runs (default: %(default)s)", default="runs")
TOOLS: tuple[Command, ...] = (
    Command(
        name="replay",
        summary="Generate an image again from the recipe in its file.",
        details=(
            "The pixels are identical on the same machine with the same versions. JPEG and WebP are lossy:"
            " there, this holds for the pixels before compression, and the files are identical if they are"
            " written with the same --quality."
        ),
        arguments=(
            argument("image", "a .png, .jpg or .webp file that ldm has written"),
            argument(
                "--output", "file to write (default: NAME-replay with the suffix of the input)", short="-o"
            ),
            QUALITY,
            argument("--weights", "weights of the model, if the image was not generated with its own"),
            argument("--vocabulary", "BERT's vocab.txt, if the image was generated with one that was given"),
            argument("--safety", "file or folder of the safety checker, if it made images black"),
            argument(
                "--adapters",
                "file of the adapter that the image was made with, or a folder with them (default: the folder"
                " adapters below LDM_HOME)",
            ),
            argument(
                "--controls",
                "file of the control that the image was made with, or a folder with them (default: the folder"
                " controls below LDM_HOME)",
            ),
            argument(
                "--limits",
                "refuse a recipe of more than 64 images, 1000 steps, 2048×2048 pixels or 4000 characters"
                " (default), or follow it",
                action=argparse.BooleanOptionalAction,
                default=True,
            ),
            argument("--download", "download weights that are not on this machine", action="store_true"),
        ),
        run=replay_file,
    ),
    Command(name="models", summary="List the models.", arguments=(), run=print_models),
    Command(
        name="train",
        summary="Train a model from its recipe, or a single stage of it.",
        details=(
            "The stages and their expected cost are printed first. Finished stages are skipped, and an"
            " interrupted one resumes from its last checkpoint. The trained parts are bundled into the folder"
            " RUNS/RECIPE/model, which --weights and ldm.load read."
        ),
        arguments=(
            argument("config", "a recipe's folder, such as configs/emoji-ldm, or a stage's YAML file"),
            RUNS,
            argument("--device", "device to train on (default: %(default)s)", default="cpu"),
            argument(
                "--until",
                "stop when a stage reaches this step, or when the stage of this name is finished",
                type=step_or_stage,
                metavar="STEP|STAGE",
            ),
            argument("--dry-run", "print the stages and their expected cost only", action="store_true"),
        ),
        run=train_config,
    ),
    Command(
        name="export",
        summary="Write the averaged weights of a run, finished or not.",
        details="The files have half precision.",
        arguments=(
            argument("config", "a stage's YAML file, such as configs/emoji-ldm/layout.yaml"),
            argument("--to", "folder to write (default: RUN/export, or RUN/export-WIDTH)"),
            argument(
                "--width",
                "width of the average, relative to the training, such as 0.1, for a run with `widths`",
                type=float,
            ),
            argument(
                "--step", "step at whose end the average of a width is taken (default: the last)", type=int
            ),
            RUNS,
        ),
        run=export_run,
    ),
    Command(
        name="assemble",
        summary="Bundle a card and exported parts into the folder of a model.",
        arguments=(
            argument("card", "a YAML file with the model's card and the folder of each exported part"),
            argument("folder", "folder to write, which --weights and ldm.load read"),
        ),
        run=assemble_folder,
    ),
    Command(
        name="grid",
        summary="Print the timesteps, noise levels and evaluations of a sampler.",
        details="The columns are t, alpha-bar, sigma, sigma/alpha and lambda.",
        arguments=(
            argument(
                "--model",
                "model whose schedule and convention are used (default: %(default)s)",
                default="emoji-ldm",
            ),
            argument("--sampler", "sampling method (default: the model's)"),
            argument("--steps", "sampling steps (default: the model's)", type=int),
            *GRID,
        ),
        run=print_grid,
    ),
    Command(
        name="inspect",
        summary="Print what a file of weights holds, without executing anything in it.",
        details="The exit status is 1 if the file has damage, NaN or code.",
        arguments=(
            argument("path", "a .safetensors, .ckpt or .pt file, or a folder; a model or an adapter"),
            argument("--model", "model with which an adapter is compared (default: that of its family)"),
            argument("--nan", "look for NaN and infinity, which reads every tensor", action="store_true"),
            argument("--no-hash", "leave out the SHA-256, which reads every byte", action="store_true"),
        ),
        run=print_report,
    ),
)
