"""The command that looks at a data set of images before it is trained on."""

from __future__ import annotations

import argparse

from ldm.cli.parsing import Command, argument
from ldm.support.text import escaped

MOST_LISTED = 1000  # files that are named for each kind of problem


def check_images(args: argparse.Namespace) -> int:
    """Decode every image of a data set and print what was found; return 1 if too many files are broken."""
    from ldm.data.checking import check_data, contact_sheet
    from ldm.data.framing import Buckets
    from ldm.data.sources.opening import FILE_KINDS, kind_of, open_dataset, open_emoji
    from ldm.images.files import check_writable
    from ldm.support.config import build
    from ldm.support.files import open_atomically

    sheet = None if args.sheet is None else check_writable(args.sheet)
    kind = kind_of(args.path) if args.kind is None else args.kind
    shapes = Buckets(step=args.buckets).sizes(args.size) if args.buckets else [(args.size, args.size)]
    if kind == "emoji":
        dataset = open_emoji(args.path)
    else:
        options = {"kind": kind, "path": args.path, "size": args.size, "max_broken": 2**31}
        dataset = open_dataset(build(FILE_KINDS[kind], options, "data"))
    report = check_data(dataset, shapes, decodes=not args.headers)
    for line in (f"kind: {kind}", *report.lines(MOST_LISTED)):
        print(escaped(line, 1_000_000))
    if sheet is not None:
        with open_atomically(sheet) as file:
            contact_sheet(dataset).save(
                file, format={".jpg": "jpeg"}.get(sheet.suffix.lower(), sheet.suffix[1:])
            )
        print(sheet)
    return 1 if report.broken > args.max_broken else 0


DATA = Command(
    name="data",
    summary="Look at a data set of images before it is trained on.",
    details=(
        "`ldm data check PATH` decodes every image and prints the number of images, their sizes and captions,"
        " and each file that is broken, small, a duplicate or without a caption. The exit status is 1 if more"
        " files than --max-broken are broken."
    ),
    arguments=(
        argument("action", "action: check", choices=("check",)),
        argument("path", "a folder of images, WebDataset shards (a folder, or braces), or a saved data set"),
        argument(
            "--kind",
            "folder, classes, webdataset, datasets or emoji (default: what the path looks like)",
            choices=("folder", "classes", "webdataset", "datasets", "emoji"),
        ),
        argument("--size", "side of training images in pixels (default: %(default)s)", type=int, default=256),
        argument("--buckets", "count aspect-ratio buckets with sides in steps of this many pixels", type=int),
        argument(
            "--max-broken",
            "broken files above which the exit status is 1 (default: %(default)s)",
            type=int,
            default=10,
        ),
        argument("--sheet", "file of a contact sheet with captions to write, such as sheet.jpg"),
        argument("--headers", "read headers only; damage behind them is not noticed", action="store_true"),
    ),
    run=check_images,
)
