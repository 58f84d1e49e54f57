"""WebDataset shards: tar files whose members are read in any order.

The `webdataset` package reads shards as streams, whose order depends on the number of workers and on where a
run is interrupted. Here the headers of the tar files are read once (see `ldm.data.sources.shard_index`), and
each image is then read at its place, so that a sample is a function of its global index. Which files belong
together is the package's rule.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ldm.data.dataset import Problem, Record
from ldm.data.sources.config import ShardData
from ldm.data.sources.decoding import decode
from ldm.data.sources.scanning import ScannedFile, check_problems, scan
from ldm.data.sources.shard_files import ShardFiles, ShardSpan
from ldm.data.sources.shard_index import scan_shard
from ldm.data.sources.table import Records
from ldm.support.text import escaped, shown

if TYPE_CHECKING:
    from PIL.Image import Image


class ShardImages:
    """The images of WebDataset shards.

    Args:
        config: The shards, and what is expected of them.

    Raises:
        FileNotFoundError: If there is no such shard.
        ValueError: If there is no image to train on, or too many are broken; the message names them.
        ImportError: If `webdataset` is not installed.
    """

    def __init__(self, config: ShardData) -> None:
        self.config = config
        self.files = ShardFiles(find_shards(config.path))
        candidates, spans, problems = list[ScannedFile](), list[ShardSpan](), list[Problem]()
        for number in range(len(self.files.paths)):
            found, places = scan_shard(self.files, number, config.caption_key, problems)
            candidates += found
            spans += places
        kept, records, noted = scan(candidates, lambda i: self.files.opened(spans[i]), config)
        self.records, self.problems = Records(records), (*problems, *noted)
        self.spans: np.ndarray = np.array([spans[i] for i in kept], dtype=np.int64).reshape(-1, 3)
        check_problems(self.problems, config, len(kept))

    def __len__(self) -> int:
        return len(self.records)

    def record(self, i: int) -> Record:
        """Return what is known of image i."""
        return self.records[i]

    def open(self, i: int, least: int | None = None) -> Image:
        """Decode image i; see `Dataset.open`."""
        try:
            data = self.files.read(ShardSpan(*self.spans[i].tolist()))
        except OSError as error:
            raise ValueError(escaped(error, 300)) from None
        return decode(data, self.config.background, least)


def find_shards(path: str) -> list[Path]:
    """Return the shards that a path names: with braces expanded, or the .tar files of a folder.

    Raises:
        FileNotFoundError: If one is absent, or the folder has none.
        ImportError: If `webdataset` is not installed.
    """
    try:
        from webdataset.shardlists import expand_urls
    except ImportError:
        raise ImportError("data.kind webdataset needs webdataset: pip install 'ldm[train]'") from None
    if Path(path).is_dir():
        found = sorted(Path(path).glob("*.tar"))
        if not found:
            raise FileNotFoundError(f"data.path {shown(path)}: no .tar file in this folder")
        return found
    if path.partition(":")[0] in ("pipe", "http", "https", "s3", "gs"):
        raise FileNotFoundError(f"data.path {shown(path)}: expected files: mount the server, or copy them")
    found = [Path(each) for each in expand_urls(path)]
    if absent := [str(each) for each in found if not each.is_file()]:
        raise FileNotFoundError(f"data.path {shown(path)}: no such file: {', '.join(map(shown, absent[:5]))}")
    return found
