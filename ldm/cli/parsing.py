"""Arguments as data, a parser whose errors are one line, and the types of arguments."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn


class UsageError(ValueError):
    """The command line does not fit the command's arguments."""


class CommandParser(argparse.ArgumentParser):
    """An argument parser that raises `UsageError` instead of printing the usage and exiting."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see `{self.prog} --help`)")


@dataclass(frozen=True, kw_only=True)
class Argument:
    """One argument of a command.

    Args:
        name: "image" for a positional argument, "--strength" for an option.
        help: Its line in the help text.
        short: Its short form, such as "-o", if it has one; else "".
        settings: Further keywords of `ArgumentParser.add_argument`, such as `type` and `default`.
    """

    name: str
    help: str
    short: str
    settings: Mapping[str, Any]  # argparse's own keywords, which have no common type

    @property
    def positional(self) -> bool:
        """Return whether the argument is given by its place."""
        return not self.name.startswith("-")

    @property
    def dest(self) -> str:
        """Return the name of its value: that of the Python argument."""
        return self.name.lstrip("-").replace("-", "_")

    def add_to(self, parser: argparse.ArgumentParser) -> None:
        """Add the argument to a parser."""
        names = (self.short, self.name) if self.short else (self.name,)
        parser.add_argument(*names, help=self.help, **self.settings)


def argument(name: str, help: str, *, short: str = "", **settings: Any) -> Argument:
    """Return an `Argument`; the settings are keywords of `ArgumentParser.add_argument`."""
    return Argument(name=name, help=help, short=short, settings=settings)


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command of the command line.

    Args:
        name: Its name.
        summary: One sentence, shown by `ldm --help` and at the top of `ldm NAME --help`.
        arguments: Its arguments, positional ones first.
        run: Runs it on the parsed arguments and returns the exit status.
        aliases: Other names. Default: none.
        details: Further text of `ldm NAME --help`. Default: none.
    """

    name: str
    summary: str
    arguments: Sequence[Argument]
    run: Callable[[argparse.Namespace], int]
    aliases: Sequence[str] = ()
    details: str = ""

    def parser(self) -> CommandParser:
        """Return the parser of its arguments."""
        also = f"Also: {', '.join(self.aliases)}." if self.aliases else ""
        description = " ".join(part for part in (self.summary, self.details, also) if part)
        parser = CommandParser(prog=f"ldm {self.name}", description=description)
        for each in self.arguments:
            each.add_to(parser)
        return parser


def parse_text(text: str) -> str:
    """Return a text of the command line, whose bytes are UTF-8 even where the locale is not.

    Python gives bytes that the locale's encoding lacks as lone surrogates; file names stay so.
    """
    if not any("\udc80" <= char <= "\udcff" for char in text):
        return text
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected UTF-8") from None


def parse_size(text: str) -> tuple[int, int]:
    """Return SIDE or WIDTHxHEIGHT as (width, height) in pixels."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() for side in sides):
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected SIDE or WIDTHxHEIGHT in pixels, such as 128 or 128x192"
        )
    return int(sides[0]), int(sides[-1])


def parse_emphasis(text: str) -> tuple[str, float]:
    """Return WORD=FACTOR as (word, factor)."""
    word, _, factor = parse_text(text).partition("=")
    try:
        return word, float(factor)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected WORD=FACTOR, such as red=2") from None


def parse_adapter(text: str) -> tuple[str, float]:
    """Return FILE or FILE:STRENGTH as (file, strength)."""
    file, colon, number = text.rpartition(":")
    if colon:
        try:
            return file, float(number)
        except ValueError:
            pass  # a colon in the name of the file
    return text, 1.0


def parse_control(text: str) -> tuple[str, str, tuple[float, ...]]:
    """Return FILE:HINT[:STRENGTH[:START:END]] as (file, hint, numbers)."""
    pieces, numbers = text.split(":"), list[float]()
    while len(pieces) > 2 and len(numbers) < 3:
        try:
            numbers.insert(0, float(pieces[-1]))
        except ValueError:
            break
        pieces.pop()
    file, hint = ":".join(pieces[:-1]), pieces[-1]
    if not file or not hint or len(numbers) == 2:
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected FILE:HINT, FILE:HINT:STRENGTH or FILE:HINT:STRENGTH:START:END, such as"
            " canny.safetensors:edges.png:0.8"
        )
    return file, hint, tuple(numbers)


class CollectPairs(argparse.Action):
    """Collect the (key, value) pairs of a repeatable option in a dictionary."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,  # what `type` returned
        option_string: str | None = None,
    ) -> None:
        key, value = values
        setattr(namespace, self.dest, {**(getattr(namespace, self.dest) or {}), key: value})
