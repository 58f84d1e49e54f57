"""Compare how fast training images are read: WebDataset shards here, and a folder by torchvision.

The same JPEG files are written as shards and as a folder. Both are read in random order by the same number of
workers to uint8 batches of one shape, in turns. The table states images per second, by wall time and by the
processor time of all processes (the one to compare on a machine that others use), and the memory of all
processes (proportional set size) after the first and after three quarters of a reading. Opening a data set
comes before that: the first time ldm reads all headers, later it reads what it has kept of them in LDM_HOME.

    python benchmarks/reading.py --quick
"""

from __future__ import annotations

import argparse
import io
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from common import where, write
from PIL import Image

SIDE, BATCH, PER_SHARD = 256, 64, 1000


def jpeg(i: int) -> bytes:
    """Return image i: smooth noise, of some 15 KB."""
    rng = np.random.default_rng(i)
    small = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    small.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_images(place: Path, n: int) -> None:
    """Write n images as shards and as a folder of one class."""
    import webdataset

    (place / "folder" / "class").mkdir(parents=True)
    (place / "shards").mkdir()
    pattern = str(place / "shards" / "%05d.tar")
    with webdataset.ShardWriter(pattern, maxcount=PER_SHARD, verbose=0) as writer:
        for i in range(n):
            data = jpeg(i)
            (place / "folder" / "class" / f"{i:06d}.jpg").write_bytes(data)
            writer.write({"__key__": f"{i:06d}", "jpg": data, "txt": f"caption {i}"})


def read_shards(place: Path, n: int, workers: int) -> Iterator[int]:
    """Read n images from the shards, and give the number of images after each batch."""
    from ldm.data.sources.config import ShardData
    from ldm.training.config import OptimizerConfig, RunConfig
    from ldm.training.draws import Draws
    from ldm.training.inputs.files import FileImages

    run = RunConfig(name="reading", steps=1, batch=BATCH, optimizer=OptimizerConfig(lr=1e-3))
    data = ShardData(kind="webdataset", path=str(place / "shards"), size=SIDE, workers=workers, held_out=0.0)
    images = FileImages(data, run)
    yield 0
    for step in range(n // BATCH):
        samples = images.draw(Draws.of_step(0, step, BATCH))
        captions = images.captions(samples, Draws.of_step(0, step, BATCH))
        assert len(captions) == BATCH and samples[0].pixels is not None
        yield BATCH


def read_folder(place: Path, n: int, workers: int) -> Iterator[int]:
    """Read n images from the folder by torchvision, and give the number of images after each batch."""
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import PILToTensor

    images = ImageFolder(place / "folder", transform=PILToTensor())
    yield 0
    loader = DataLoader(images, BATCH, shuffle=True, num_workers=workers, drop_last=True)
    for pixels, _ in loader:
        assert pixels.shape == (BATCH, 3, SIDE, SIDE)
        yield len(pixels)


READERS = {"ldm, shards": read_shards, "torchvision, folder": read_folder}


def memory() -> float:
    """Return the memory of this process and its children in MB: their proportional set sizes."""
    total = 0
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text(encoding="ascii").split()
    for process in (os.getpid(), *children):
        text = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="ascii")
        total += next(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:"))
    return total / 1024


def processor_seconds() -> float:
    """Return the processor time of this process and of its children that have ended."""
    own, ended = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + ended.ru_utime + ended.ru_stime


def measure(name: str, place: Path, n: int, workers: int) -> dict[str, float]:
    """Read all images once by a reader, and return its figures."""
    reading, count, memories = READERS[name](place, n, workers), 0, []
    begun = time.perf_counter()
    next(reading)
    opened, started, processor = time.perf_counter() - begun, time.perf_counter(), processor_seconds()
    quarters = [n // 4, 3 * n // 4]
    for number in reading:
        count += number
        if quarters and count >= quarters[0]:
            memories.append(memory())
            quarters.pop(0)
    wall = time.perf_counter() - started
    del reading
    return {
        "opening": opened,
        "images_per_second": count / wall,
        "images_per_processor_second": count / (processor_seconds() - processor),
        "memory_first": memories[0],
        "memory_last": memories[-1],
    }


def main() -> None:
    """Write the images, read them in turns and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="1280 images, two rounds")
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    n, rounds = (1280, 2) if args.quick else (args.images, args.rounds)
    if rounds < 2:
        parser.error(f"--rounds: expected at least 2, got {rounds}")
    place = Path(tempfile.mkdtemp(prefix="reading-"))
    os.environ["LDM_HOME"] = str(place / "home")
    try:
        write_images(place, n)
        found = {name: [] for name in READERS}
        for _ in range(rounds):
            for name in READERS:
                found[name].append(measure(name, place, n, args.workers))
    finally:
        shutil.rmtree(place)
    keys = list(found["ldm, shards"][0])
    medians = {
        name: {
            key: float(np.median([row[key] for row in rows[key == "opening" :]]))  # without the first opening
            for key in keys
        }
        for name, rows in found.items()
    }
    print(f"{n} images of {SIDE}×{SIDE}, {args.workers} workers, batches of {BATCH}, {where(1)['cpu']}")
    print("| reader | opening s, first and later | images/s | per processor s | memory MB, early and late |")
    print("|---|---|---|---|---|")
    for name, row in medians.items():
        print(
            f"| {name} | {found[name][0]['opening']:.2f}, {row['opening']:.2f}"
            f" | {row['images_per_second']:.0f} | {row['images_per_processor_second']:.0f}"
            f" | {row['memory_first']:.0f}, {row['memory_last']:.0f} |"
        )
    if args.json:
        write(args.json, {"images": n, "workers": args.workers, "rounds": found, **where(1)})


if __name__ == "__main__":
    main()
