"""The library of exemplars: images of named things in several styles, to which a user may add."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ldm.conditioning.things import Mention
from ldm.support.config import nearest
from ldm.support.scalars import whole_number
from ldm.support.text import escaped, shown

LARGEST_EXEMPLAR = 2048  # pixels of an image's side
LONGEST_NOUN = 200  # characters of a name, or of a phrase that means it
OWN_STYLE = "own"
"""The style of an image that is added without one."""


@dataclass(frozen=True, kw_only=True)
class Exemplar:
    """One image of the library.

    Args:
        name: The thing that it shows, such as "red-apple".
        style: Its style, such as "noto".
        content: The image as a WebP or PNG file, with opacity.
    """

    name: str
    style: str
    content: bytes


class ExemplarLibrary:
    """Images by name and style.

    Args:
        exemplars: The images; no (name, style) occurs twice.
        nouns: The names that each noun phrase may mean. Each name also means itself.
        size: Side of the images in pixels, at most `LARGEST_EXEMPLAR`.

    Attributes:
        nouns: The names that each noun phrase may mean; another mapping after each change of the library.

    Raises:
        ValueError: If a (name, style) occurs twice, a noun means no name or one without an image, or one is
            too long, or the size is out of range.
    """

    def __init__(
        self, exemplars: Iterable[Exemplar], nouns: Mapping[str, Sequence[str]], *, size: int
    ) -> None:
        self.size = whole_number("size", size, least=1, most=LARGEST_EXEMPLAR)
        self._of: dict[str, dict[str, Exemplar]] = {}
        for exemplar in exemplars:
            styles = self._of.setdefault(exemplar.name, {})
            if exemplar.style in styles:
                raise ValueError(f"two exemplars of {shown(exemplar.name)} in style {shown(exemplar.style)}")
            styles[exemplar.style] = exemplar
        known = {noun: tuple(names) for noun, names in nouns.items()}
        for noun, names in known.items():
            if absent := [name for name in names if name not in self._of]:
                raise ValueError(
                    f"noun {shown(noun)} means {shown(absent[0])}, of which there is no exemplar"
                )
            if not names:
                raise ValueError(f"noun {shown(noun)}: expected at least one name that it means")
            _check_noun(noun)
        for name in self._of:
            _check_noun(name)
            known.setdefault(name.replace("-", " "), (name,))
        self.nouns: Mapping[str, tuple[str, ...]] = known

    def __len__(self) -> int:
        return sum(map(len, self._of.values()))

    def __iter__(self) -> Iterator[Exemplar]:
        """Iterate over the exemplars, in the order in which they were added."""
        return (exemplar for styles in self._of.values() for exemplar in styles.values())

    @property
    def names(self) -> list[str]:
        """The names, sorted."""
        return sorted(self._of)

    @property
    def styles(self) -> list[str]:
        """The styles that any exemplar has, in the order of their first exemplar."""
        return list(dict.fromkeys(exemplar.style for exemplar in self))

    def styles_of(self, name: str) -> list[str]:
        """Return the styles of a name.

        Raises:
            ValueError: If there is no exemplar of the name.
        """
        if name not in self._of:
            raise ValueError(f"no exemplar of {shown(name)}; {nearest(name, self._of)}")
        return list(self._of[name])

    def add(self, name: str, pixels: Tensor, *, style: str = OWN_STYLE, nouns: Iterable[str] = ()) -> None:
        """Add an image; the prompt then draws the thing by its name or by one of the nouns.

        Args:
            name: The name, such as "my robot".
            pixels: RGB and opacity in [0, 1], shape (4, S, S).
            style: The style. An image of this name and style is replaced. Default: "own".
            nouns: Other phrases that mean the thing, such as a plural. Default: none.

        Raises:
            ValueError: If the shape is another, the name has no letters or digits, or a noun is too long.
        """
        if tuple(pixels.shape) != (4, self.size, self.size):
            raise ValueError(
                f"exemplar of shape {tuple(pixels.shape)}: expected (4, {self.size}, {self.size})"
            )
        if not any(char.isalnum() for char in name):
            raise ValueError(f"name {shown(name)}: expected letters or digits")
        key = name.strip().lower().replace(" ", "-")
        nouns = (key.replace("-", " "), *nouns)
        for noun in nouns:
            _check_noun(noun)
        content = write_exemplar(pixels)
        self._of.setdefault(key, {})[style] = Exemplar(name=key, style=style, content=content)
        self.nouns = {**self.nouns, **{noun.lower(): (key,) for noun in nouns}}

    def remove(self, name: str) -> None:
        """Remove all images of a name, and the nouns that mean nothing else.

        Raises:
            ValueError: If there is no exemplar of the name.
        """
        key = name.strip().lower().replace(" ", "-")
        self.styles_of(key)
        del self._of[key]
        left = {noun: tuple(n for n in names if n != key) for noun, names in self.nouns.items()}
        self.nouns = {noun: names for noun, names in left.items() if names}

    def choose(self, mention: Mention, seed: int, slot: int) -> Exemplar:
        """Return the exemplar of a thing, chosen by the seed among what the prompt leaves open.

        Args:
            mention: The thing. If it has no image in the style that is asked for, any style is chosen.
            seed: Seed of the image.
            slot: The thing's place in the prompt.
        """
        name = mention.names[_draw(seed, slot, "name", len(mention.names))]
        styles = self.styles_of(name)
        if mention.style in styles:
            return self._of[name][str(mention.style)]
        return self._of[name][styles[_draw(seed, slot, "style", len(styles))]]

    def meant(self, mention: Mention) -> list[Exemplar]:
        """Return the exemplars that `choose` draws from, with any seed."""
        found: list[Exemplar] = []
        for name in mention.names:
            styles = self._of[name]
            found += [styles[mention.style]] if mention.style in styles else styles.values()
        return found

    def pixels(self, exemplar: Exemplar) -> Tensor:
        """Return the image of an exemplar: RGB and opacity in [0, 1], shape (4, S, S), float32."""
        return read_exemplar(exemplar.content, self.size)


def _check_noun(noun: str) -> None:
    """Raise ValueError for a noun that is too long; the time to read a prompt grows with the square."""
    if len(noun) > LONGEST_NOUN:
        raise ValueError(f"noun {shown(noun)}: expected at most {LONGEST_NOUN} characters, got {len(noun)}")


def _draw(seed: int, slot: int, what: str, choices: int) -> int:
    """Return a number below `choices`, a function of the other arguments alone."""
    digest = hashlib.sha256(f"{what} {seed} {slot}".encode()).digest()
    return int.from_bytes(digest[:8], "big") * choices >> 64


def write_exemplar(pixels: Tensor) -> bytes:
    """Return an image (4, S, S) in [0, 1] as a lossless WebP file."""
    from PIL import Image

    levels = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(levels, "RGBA").save(file, "WEBP", lossless=True, quality=50, exact=True)
    return file.getvalue()


def read_exemplar(content: bytes, size: int) -> Tensor:
    """Return the image of a WebP or PNG file as RGB and opacity in [0, 1], shape (4, size, size).

    Raises:
        ValueError: If the content is no such image, or has another size.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content), formats=["WEBP", "PNG"]) as image:
            found = image.size
            levels = np.asarray(image.convert("RGBA")) if found == (size, size) else None
    except Exception as error:  # decoders raise errors of every class
        reason = escaped(str(error) or type(error).__name__, 300)
        raise ValueError(f"exemplar: no readable WebP or PNG image ({reason})") from None
    if levels is None:
        raise ValueError(f"exemplar of {found} pixels: expected {(size, size)}")
    return torch.from_numpy(levels.copy()).permute(2, 0, 1).float() / 255
