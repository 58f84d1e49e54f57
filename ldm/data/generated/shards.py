"""Generate a data set in WebDataset shards, each by one of several processes.

Shard k has the images k·S … k·S + S − 1 of the table, and is written whole or not at all. What it holds
depends on the table and the options alone, so a restart skips the shards that are there, and any number of
processes writes the same files.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from ldm.data.generated.prompts import PromptRow
from ldm.images.files import encode_image
from ldm.images.result import Images, with_pixels
from ldm.support.files import open_atomically, write_atomically
from ldm.support.scalars import whole_number
from ldm.support.strict_json import read_json

PLAN_FILE = "plan.json"


@dataclass(frozen=True, kw_only=True)
class GeneratedImage:
    """One image of a generated data set.

    Args:
        number: Its number in the data set.
        prompt: Its prompt.
        seed: Its seed.
        options: Its options, without the seed.
    """

    number: int
    prompt: str
    seed: int
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ShardPlan:
    """Which images a data set has, and in which shards and batches they are generated.

    Args:
        rows: The table.
        n: Images of each row, with consecutive seeds. Default: 1.
        seed: Seed of the first image; image i has seed `seed` + i unless its row states one. Default: 0.
        options: Options of all rows that do not state them.
        shard: Images in a shard. Default: 1000.
        batch: Most images of one call. Default: 8.
    """

    rows: Sequence[PromptRow]
    n: int = 1
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    shard: int = 1000
    batch: int = 8

    def __post_init__(self) -> None:
        for name in ("n", "shard", "batch"):
            whole_number(name, getattr(self, name), least=1)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.rows) * self.n

    @property
    def shards(self) -> int:
        """The number of shards."""
        return -(-len(self) // self.shard)

    def image(self, number: int) -> GeneratedImage:
        """Return an image by its number."""
        row, copy = self.rows[number // self.n], number % self.n
        seed = self.seed + number if row.seed is None else row.seed + copy
        options = {**self.options, **row.options}
        return GeneratedImage(number=number, prompt=row.prompt, seed=seed, options=options)

    def batches(self, shard: int) -> Iterator[list[GeneratedImage]]:
        """Return the images of a shard in batches that share their options."""
        numbers = range(shard * self.shard, min((shard + 1) * self.shard, len(self)))
        for _, group in groupby(map(self.image, numbers), key=lambda each: _key(each.options)):
            images = list(group)
            for start in range(0, len(images), self.batch):
                yield images[start : start + self.batch]

    def describe(self, model: str, origin: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the images depend on, for `PLAN_FILE`."""
        rows = [[row.prompt, row.seed, dict(row.options)] for row in self.rows]
        return {
            "model": model,
            "weights": dict(origin),
            "images": len(self),
            "rows_sha256": hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest(),
            "n": self.n,
            "seed": self.seed,
            "options": dict(self.options),
            "shard": self.shard,
            "batch": self.batch,
        }


def generate_shards(
    pipe: Any,
    plan: ShardPlan,
    folder: str | Path,
    *,
    rank: int = 0,
    size: int = 1,
    report: Callable[[Path], object] | None = None,
) -> list[Path]:
    """Generate the shards of one process that are not there yet.

    Args:
        pipe: A pipeline with `text_to_image`.
        plan: The data set.
        folder: Its folder, for all processes.
        rank: Number of this process, from 0. Default: 0.
        size: Number of processes; process r writes the shards r, r + size, … Default: 1.
        report: Called with each shard that was written. Default: None.

    Returns:
        The shards written, "000000.tar" and so on.

    Raises:
        ValueError: If a row is wrong, or the folder has shards of another plan.
        OSError: If a file cannot be written.
    """
    folder = Path(folder)
    check_rows(pipe, plan)
    _note_plan(plan.describe(pipe.name, pipe.origin), folder)
    written = []
    for shard in range(rank, plan.shards, size):
        path = folder / f"{shard:06d}.tar"
        if path.exists():
            continue
        write_shard(pipe, plan, shard, path)
        written.append(path)
        if report is not None:
            report(path)
    return written


def check_rows(pipe: Any, plan: ShardPlan) -> None:
    """Check all rows of a plan before any work.

    Raises:
        ValueError: If an option or a prompt is wrong; the message names the prompt.
    """
    checked: set[str] = set()
    for row in plan.rows:
        options = {**plan.options, **row.options}
        for prompt, seed, settings in ((row.prompt, row.seed, {}), ("", 0, options)):
            key = _key([prompt, seed, settings])
            if key not in checked:
                checked.add(key)
                try:
                    pipe.settle(prompt, seed=seed or 0, progress=False, **settings)
                except ValueError as error:
                    raise ValueError(f"prompt {row.prompt!r}: {error}") from None


def _note_plan(plan: dict[str, Any], folder: Path) -> None:
    """Write the plan of a folder, or check that it has the same."""
    path = folder / PLAN_FILE
    plan = json.loads(json.dumps(plan))
    if not path.exists():
        write_atomically(path, (json.dumps(plan, indent=1) + "\n").encode())
        return
    differing = sorted(key for key in plan if read_json(path, infinite=True).get(key) != plan[key])
    if differing:
        raise ValueError(
            f"{str(folder)!r} has shards of another data set, which differs in {', '.join(differing)}: choose"
            " another folder"
        )


def write_shard(pipe: Any, plan: ShardPlan, shard: int, path: Path) -> None:
    """Generate the images of a shard and write it; the file appears when it is complete."""
    with (
        open_atomically(path) as file,
        tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for batch in plan.batches(shard):
            negatives = [each.options.get("negative", "") for each in batch]
            shared = {key: value for key, value in batch[0].options.items() if key != "negative"}
            images = pipe.text_to_image(
                [each.prompt for each in batch],
                seed=[each.seed for each in batch],
                negative=negatives if len(set(negatives)) > 1 else negatives[0],
                progress=False,
                **shared,
            )
            for i, each in enumerate(batch):
                for suffix, content in _files(images, i).items():
                    _add(tar, f"{each.number:09d}.{suffix}", content)


def _files(images: Images, i: int) -> dict[str, bytes]:
    """Return the files of image i by their suffixes: the recipe, the PNG that holds it too, the prompt."""
    image = images.pil()[i]
    recipe = with_pixels({**images.recipe, "index": i}, image)
    flagged = {} if images.flagged is None else {"flagged": images.flagged[i]}
    about = {**recipe, "caption": images.prompts[i], "image_seed": images.seeds[i], **flagged}
    return {
        "json": json.dumps(about, ensure_ascii=False).encode(),
        "png": encode_image(Path("image.png"), image, recipe),
        "txt": images.prompts[i].encode(),
    }


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)  # without times and owners: the same content gives the same bytes
    entry.size, entry.mode = len(content), 0o444
    tar.addfile(entry, io.BytesIO(content))


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
