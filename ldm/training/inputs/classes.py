"""Captions as the numbers of classes, for models that are conditioned on classes."""

from __future__ import annotations

from collections.abc import Sequence

from ldm.pipelines.latent import LatentDiffusion
from ldm.training.inputs.files import files_only
from ldm.training.inputs.protocol import TrainingImages


class ClassNumbers:
    """The number of the class that each caption names.

    Where all captions are whole numbers, these are the classes. Otherwise the classes are numbered in the
    alphabetical order of the captions, as torchvision's ImageFolder numbers folders.

    Args:
        pipe: The model.
        images: The training images; each has one caption, as data of the kind "classes" have.
        drop: Share of captions that are replaced by the class that stands for none.

    Attributes:
        named: The number of each class of the data.

    Raises:
        ValueError: If images have no class or several, there are more classes than the model has, or there is
            no class that stands for none and captions are dropped.
    """

    def __init__(self, pipe: LatentDiffusion, images: TrainingImages, drop: float) -> None:
        files, count = (
            files_only(images, f"{pipe.name!r}, which reads classes").files,
            pipe.text.config.classes,
        )
        records = [files.dataset.record(int(item)) for item in (*files.train, *files.held)]
        for record in records:
            if len(record.captions) != 1:
                raise ValueError(
                    f"{pipe.name!r} reads classes: {record.name!r} has {len(record.captions)} captions,"
                    " expected one, the name of its class, as data of kind 'classes' gives"
                )
        names = sorted({record.captions[0] for record in records})
        numbered = all(name.isdecimal() for name in names)
        self.named = {name: int(name) if numbered else i for i, name in enumerate(names)}
        none = pipe.card.null_class
        if max(self.named.values()) >= count or none in self.named.values():
            but = "" if none is None else f" but {none}, which stands for none"
            raise ValueError(
                f"data: {len(names)} classes, of which the last has the number {max(self.named.values())};"
                f" {pipe.name!r} has the classes 0 to {count - 1}{but}"
            )
        if none is None and drop:
            raise ValueError(
                f"diffusion.drop {drop}: expected 0, as {pipe.name!r} has no class that stands for none"
            )
        # without guidance, the preview does not look at that of the empty text
        self.numbers = {**self.named, "": 0 if none is None else none}

    def __call__(self, texts: Sequence[str]) -> list[int]:
        """Return the number of each text's class; that which stands for none for an empty text."""
        return [self.numbers[text] for text in texts]
