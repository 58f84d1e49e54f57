"""Records of many images in arrays, which processes share and which no reference count copies."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from ldm.data.dataset import Record

SEPARATOR = "\n"  # between the captions of an image, which have none


class PackedTexts(Sequence[str]):
    """An immutable sequence of texts in one block of memory."""

    def __init__(self, texts: Iterable[str]) -> None:
        encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
        self._ends: np.ndarray = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        self._block = np.frombuffer(b"".join(encoded), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, i):  # type: ignore[no-untyped-def]  # a text for each whole number
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        i %= len(self)
        return self._block[self._ends[i] : self._ends[i + 1]].tobytes().decode("utf-8", "surrogatepass")


class Records:
    """The records of a data set.

    Args:
        records: The records, whose captions have no line ends.
    """

    def __init__(self, records: Sequence[Record]) -> None:
        self.names = PackedTexts(record.name for record in records)
        self.captions = PackedTexts(SEPARATOR.join(record.captions) for record in records)
        self.fingerprints = PackedTexts(record.fingerprint for record in records)
        self.sizes: np.ndarray = np.array(
            [(record.height, record.width) for record in records], dtype=np.int32
        ).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> Record:
        height, width = self.sizes[i].tolist()
        captions = self.captions[i]
        return Record(
            name=self.names[i],
            captions=tuple(captions.split(SEPARATOR)) if captions else (),
            height=height,
            width=width,
            fingerprint=self.fingerprints[i],
        )
