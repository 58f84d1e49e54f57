"""The command `serve`."""

from __future__ import annotations

import argparse
import os

from ldm.cli.options import MODEL
from ldm.cli.output import complain
from ldm.cli.parsing import Command, UsageError, argument

KEY_VARIABLE = "LDM_API_KEY"
# options of `ldm.load` that hold for all models
LOADED = tuple(each for each in MODEL if each.dest not in ("model", "weights"))


def run_server(args: argparse.Namespace) -> int:
    """Serve until Ctrl-C."""
    from ldm.serving.launch import serve, served_models
    from ldm.support.device import pick_device

    pick_device(args.device)
    for name, value, least in (("port", args.port, 0), ("queue", args.queue, 1), ("batch", args.batch, 1)):
        if not least <= value <= 65_535:
            raise UsageError(f"--{name}: expected {least} to 65535, got {value}")
    key = args.api_key or os.environ.get(KEY_VARIABLE) or None

    def report(line: str) -> None:
        print(line, flush=True)
        if key is None and args.host not in ("127.0.0.1", "::1", "localhost"):
            complain("warning: there is no --api-key, so whoever reaches this machine can use the server")

    options = {each.dest: getattr(args, each.dest) for each in LOADED}
    models = served_models(args.model or (), args.weights or (), options, fast=args.optimize)
    serve(
        models,
        host=args.host,
        port=args.port,
        key=key,
        origins=args.allow_origin or (),
        memory=None if args.memory is None else int(args.memory * 2**30),
        waiting=args.queue,
        batch=args.batch,
        exact=args.exact_batches,
        strict_sizes=args.strict_sizes,
        most=int(args.max_body * 2**20),
        report=report,
    )
    return 0


def parse_positive(text: str) -> float:
    """Return a positive number of the command line."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a positive number")
    return value


SERVE = Command(
    name="serve",
    summary="Serve images over HTTP: OpenAI's images API, and a page.",
    details="It needs `pip install '.[serve]'`. Ctrl-C ends it when the requests in work are done.",
    arguments=(
        argument(
            "--model",
            "name of a model; repeatable: the first is the default (default: emoji-ldm)",
            action="append",
            metavar="NAME",
        ),
        argument(
            "--weights",
            "weights of the models, one for each, instead of their own; repeatable",
            action="append",
            metavar="PATH",
        ),
        argument("--host", "address to listen at (default: %(default)s)", default="127.0.0.1"),
        argument("--port", "port; 0: any that is free (default: %(default)s)", type=int, default=8000),
        argument(
            "--api-key", f"key that requests must have (default: the variable {KEY_VARIABLE}, else none)"
        ),
        argument(
            "--allow-origin",
            "origin whose pages may use the server, such as https://example.org; repeatable",
            action="append",
            metavar="ORIGIN",
        ),
        argument(
            "--memory",
            "GiB of weights in memory, beyond which the model unused for longest is unloaded (default: any)",
            type=parse_positive,
        ),
        argument("--queue", "requests that may wait (default: %(default)s)", type=int, default=64),
        argument(
            "--batch", "images in one batch of several requests (default: %(default)s)", type=int, default=8
        ),
        argument(
            "--exact-batches",
            "put requests into one batch only where that changes no bit of an image (default)",
            action=argparse.BooleanOptionalAction,
            default=True,
        ),
        argument("--strict-sizes", "refuse sizes that the model does not make", action="store_true"),
        argument("--max-body", "MiB of a request (default: %(default)s)", type=parse_positive, default=64),
        argument("--optimize", "call ldm.optimize, which is faster up to rounding", action="store_true"),
        *LOADED,
    ),
    run=run_server,
)
