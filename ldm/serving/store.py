"""Images that are given as urls: kept in memory under unguessable names, for an hour."""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

LIFETIME = 3600.0  # seconds
LARGEST_STORE = 2**28


class StoredImage(NamedTuple):
    """An image file.

    Attributes:
        content: The file.
        media: Its media type.
        until: When it expires, in seconds of the store's clock.
    """

    content: bytes
    media: str
    until: float


class ImageStore:
    """Image files by unguessable names.

    Args:
        lifetime: Seconds that a file is kept. Default: an hour.
        most: Bytes that are kept; beyond them the oldest files go first. Default: 256 MiB.
        clock: Returns the time in seconds. Default: `time.monotonic`.
    """

    def __init__(
        self,
        *,
        lifetime: float = LIFETIME,
        most: int = LARGEST_STORE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.lifetime, self.most, self.clock = lifetime, most, clock
        self._images: OrderedDict[str, StoredImage] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._images)

    def put(self, content: bytes, media: str, suffix: str) -> str:
        """Keep a file and return its name, 256 random bits and the suffix."""
        name = f"{secrets.token_urlsafe(32)}.{suffix}"
        self._images[name] = StoredImage(content, media, self.clock() + self.lifetime)
        self._bytes += len(content)
        self.clean()
        return name

    def get(self, name: str) -> StoredImage | None:
        """Return a file; None if there is none of this name, or no longer."""
        self.clean()
        return self._images.get(name)

    def clean(self) -> None:
        """Forget what has expired, and the oldest files beyond the limit; the newest always stays."""
        now = self.clock()
        while self._images:
            oldest = next(iter(self._images.values()))
            if oldest.until > now and (self._bytes <= self.most or len(self._images) == 1):
                break
            self._images.popitem(last=False)
            self._bytes -= len(oldest.content)
