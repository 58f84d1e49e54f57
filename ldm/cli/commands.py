"""The table of all commands, and `run_command_line`, which dispatches from it.

A command that generates images has the name of its method with hyphens; `generate` is `text_to_image`.
"""

from __future__ import annotations

import argparse
import difflib
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli.adapters import ADAPTER_COMMANDS
from ldm.cli.data import DATA
from ldm.cli.evaluation import EVALUATE
from ldm.cli.options import ADDITIONS, ANIMATE, MODEL, MODEL_KEYWORDS, OUTPUT
from ldm.cli.output import check_animation, check_output, complain, drop_output, prepare_output, write_images
from ldm.cli.parsing import Command, UsageError
from ldm.cli.serving import SERVE
from ldm.cli.tables import TABLE, names_table, write_table
from ldm.cli.tasks import IMAGE_TASKS, ImageTask
from ldm.cli.tools import TOOLS

if TYPE_CHECKING:
    from ldm.images.result import Images

EXAMPLES = """examples:
  ldm "a red apple" --n 4 -o apples.png
  ldm inpaint "a green apple" photo.png mask.png -o edited.jpg
  ldm replay apples.png"""

CLOSED_PIPE = 141  # the exit status that a shell gives to a process which SIGPIPE ended
# what a user can cause; errors of other classes are errors of the library, and keep their traceback
REPORTED = (
    ValueError,
    TypeError,
    OSError,
    FloatingPointError,
    ImportError,
    Warning,
    argparse.ArgumentTypeError,
)
# in the RuntimeErrors of torch
OUT_OF_MEMORY = ("out of memory", "enough memory", "allocate memory", "bad_alloc", "ALLOC_FAILED", "overflow")
PILLOW = r"PIL\."  # whose warnings about damaged files the error that follows repeats


def run_command_line(argv: Sequence[str] | None = None) -> int:
    """Run `ldm` with the given arguments; wrong input is reported in one line on standard error.

    Args:
        argv: A command's name and its arguments, or a prompt and the options of `generate`. Default: None,
            `sys.argv[1:]`.

    Returns:
        The exit status: 0, or 2 for what a user can mend (input, options, memory, disk), or 130 if
        interrupted, or 141 if the reader of standard output has ended; `inspect` returns 1 for a file with
        damage, NaN or code. Python's own status of an unexpected exception, with its traceback, is 1.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    prepare_output()
    try:
        status = run_arguments(argv)
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except OSError as error:  # of standard output
        drop_output()
        if isinstance(error, BrokenPipeError):  # its reader has ended, as `ldm models | head -1` does
            return CLOSED_PIPE
        return report_error(error)


def run_arguments(argv: Sequence[str]) -> int:
    """Run a command and report its errors; see `run_command_line`."""
    if argv[:1] in (["-h"], ["--help"]):
        print(describe_commands())
        return 0
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=PILLOW)
        warnings.showwarning = lambda message, *_, **__: complain(f"warning: {message}")
        try:
            command, args = parse_command(argv)
            return command.run(args)
        except BrokenPipeError:
            raise
        except REPORTED as error:
            return report_error(error)
        except (RuntimeError, MemoryError) as error:
            if isinstance(error, MemoryError) or any(word in str(error) for word in OUT_OF_MEMORY):
                return report_error(error)
            raise
        except KeyboardInterrupt:
            complain("interrupted")
            return 130


def report_error(error: Exception) -> int:
    """Print an error in one line on standard error; return the exit status 2."""
    complain(f"error: {' '.join(str(error).splitlines()) or 'out of memory'}")
    return 2


def parse_command(argv: Sequence[str]) -> tuple[Command, argparse.Namespace]:
    """Return the command that the arguments name, `generate` if they name none, and its parsed arguments."""
    if not argv:
        raise UsageError('expected a prompt or a command, such as ldm "a red apple" (see `ldm --help`)')
    names = {name: command for command in COMMANDS for name in (command.name, *command.aliases)}
    if len(argv) > 1 and f"{argv[0]} {argv[1]}" in names:  # a command of two words
        return names[f"{argv[0]} {argv[1]}"], names[f"{argv[0]} {argv[1]}"].parser().parse_args(argv[2:])
    if argv[0] in names:
        return names[argv[0]], names[argv[0]].parser().parse_args(argv[1:])
    try:
        return names["generate"], names["generate"].parser().parse_args(argv)
    except UsageError as error:
        similar = difflib.get_close_matches(argv[0], names, n=1, cutoff=0.7)
        hint = f"; did you mean the command {similar[0]!r}?" if similar else ""
        raise UsageError(f"{error}{hint}") from None


def describe_commands() -> str:
    """Return the text of `ldm --help`."""
    lines = []
    for command in COMMANDS:
        also = f" (also: {', '.join(command.aliases)})" if command.aliases else ""
        lines.append(f"  {command.name:<16} {command.summary}{also}")
    return "\n".join(
        [
            "usage: ldm PROMPT [OPTIONS]",
            "       ldm COMMAND [ARGUMENTS] [OPTIONS]",
            "",
            "Latent diffusion from scratch: text in, image out.",
            "`ldm PROMPT` is short for `ldm generate PROMPT`. If the prompt is the name of a command, write",
            "`ldm generate inpaint` or `ldm -- inpaint`.",
            "",
            "commands (`ldm COMMAND --help` lists the options of each):",
            *lines,
            "",
            EXAMPLES,
        ]
    )


def run_task(task: ImageTask, args: argparse.Namespace) -> int:
    """Load the model, call its method with the arguments that were given, and write the images."""
    options = given_options(task, args)
    if task.tables and names_table(args):
        return write_table(args, options, lambda: load_pipe(task, args))
    count = getattr(args, "n", None) or 1
    seed = getattr(args, "seed", None) or 0
    check_output(args.output, quality=args.quality, seed=seed if args.separate else None, n=count)
    check_animation(args.animate)
    if task.prepare is not None:
        task.prepare(args)
        options = given_options(task, args)
    positional = [getattr(args, each.dest) for each in task.passed if each.positional]
    images = getattr(load_pipe(task, args), task.method_name)(*positional, **options)
    save_images(images, args)
    if args.animate is not None:
        print(images.animate(args.animate))
    return 0


def given_options(task: ImageTask, args: argparse.Namespace) -> dict[str, Any]:
    """Return the options of a task's method that were given."""
    options = {each.dest: getattr(args, each.dest) for each in task.passed if not each.positional}
    if (size := options.pop("size", None)) is not None:
        options["width"], options["height"] = size
    if args.animate is not None:
        options["keep_steps"] = True
    if args.control:
        options["controls"] = [(name, hint, *rest) for name, (_, hint, rest) in named_controls(args).items()]
    return {name: value for name, value in options.items() if value is not None}


def load_pipe(task: ImageTask, args: argparse.Namespace) -> Any:  # Any: models have different methods
    """Load the model that the options name; ValueError if it has no method for the task."""
    from ldm.registry.loading import load
    from ldm.support.device import pick_device, process_device

    pick_device(args.device)
    keywords = {name: getattr(args, name) for name in MODEL_KEYWORDS}
    pipe = load(args.model, **{**keywords, "device": process_device(args.device)})
    if args.dtype == "auto":
        complain(f"dtype {str(pipe.dtype_choice.dtype).removeprefix('torch.')}: {pipe.dtype_choice.reason}")
    if not hasattr(pipe, "text_to_image"):
        raise ValueError(f"{args.model or args.weights!r} is a single network, which generates no images")
    if not hasattr(pipe, task.method_name):
        others = ", ".join(each.name for each in IMAGE_TASKS if hasattr(pipe, each.method_name))
        raise ValueError(f"{pipe.card.name!r} has no {task.name}; its commands: {others}")
    for path, strength in args.adapter or ():
        pipe.adapters.load(path, strength=strength)
    if args.control and not hasattr(pipe, "controls"):
        raise ValueError(f"{pipe.card.name!r} takes no controls; they are for latent diffusion with a UNet")
    add_controls(pipe, args)
    return pipe


def add_controls(pipe: Any, args: argparse.Namespace) -> None:
    """Load the controls that were asked for, with the image tower where they read one."""
    from ldm.weights.controls.building import reads_vision

    for name, (path, _, _) in named_controls(args).items():
        reads = args.vision is not None and reads_vision(path)
        pipe.controls.load(path, name=name, vision=args.vision if reads else None)


def named_controls(args: argparse.Namespace) -> dict[str, tuple[str, str, tuple[float, ...]]]:
    """Return the controls that were asked for, by names that differ."""
    found: dict[str, tuple[str, str, tuple[float, ...]]] = {}
    for control in args.control or ():
        stem = Path(control[0]).stem
        found[f"{stem}-{len(found) + 1}" if stem in found else stem] = control
    return found


def save_images(images: Images, args: argparse.Namespace) -> None:
    """Write images where the options say and print the paths; name flagged images on standard error."""
    if images.flagged is not None and any(images.flagged):
        seeds = ", ".join(str(seed) for seed, flag in zip(images.seeds, images.flagged, strict=True) if flag)
        complain(f"warning: the safety checker flagged the images with seeds {seeds}")
    write_images(images, args.output, separate=args.separate, quality=args.quality)


COMMANDS: tuple[Command, ...] = (
    *(
        Command(
            name=task.name,
            summary=task.summary,
            arguments=(*task.passed, *(TABLE if task.tables else ()), *OUTPUT, ANIMATE, *MODEL, *ADDITIONS),
            run=partial(run_task, task),
            aliases=task.aliases,
            details=task.details,
        )
        for task in IMAGE_TASKS
    ),
    *TOOLS,
    SERVE,
    EVALUATE,
    *ADAPTER_COMMANDS,
    DATA,
)
