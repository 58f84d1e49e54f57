"""The shapes of CLIP's towers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ldm.models.checks import check_positive
from ldm.models.clip.pixels import MEAN, STD

Activation = Literal["gelu", "quick_gelu"]


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Shape of a text tower; the defaults are those of ViT-L/14.

    Args:
        vocab_size: Number of token ids; smaller than 49408 if only a part of the vocabulary is embedded.
        context_length: Maximum number L of tokens. Default: 77.
        width: Width D of a token. Default: 768.
        layers: Number of transformer blocks. Default: 12.
        heads: Number of attention heads. Default: 12.
        mlp_width: Hidden width of the MLPs. None for 4·width. Default: None.
        activation: "quick_gelu" for OpenAI's weights, "gelu" for others. Default: "quick_gelu".
        embed_dim: Width E of the embedding. None for a tower without projection. Default: 768.
        bos_id: Id of the start token, in [0, vocab_size). Default: 49406.
        eot_id: Id of the end-of-text token, in [0, vocab_size). Default: 49407.

    Raises:
        ValueError: If a number is out of range, or `width` is not a multiple of `heads`.
    """

    vocab_size: int = 49408
    context_length: int = 77
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_width: int | None = None
    activation: Activation = "quick_gelu"
    embed_dim: int | None = 768
    bos_id: int = 49406
    eot_id: int = 49407

    def __post_init__(self) -> None:
        check_transformer(self.width, self.layers, self.heads, self.mlp_width)
        check_positive(
            vocab_size=self.vocab_size, context_length=self.context_length, embed_dim=self.embed_dim
        )
        for name, value in (("bos_id", self.bos_id), ("eot_id", self.eot_id)):
            if not 0 <= value < self.vocab_size:
                raise ValueError(f"{name}: expected an id in [0, vocab_size {self.vocab_size}), got {value}")


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Shape of a vision tower; the defaults are those of ViT-L/14.

    Args:
        image_size: Side S of the input in pixels. Default: 224.
        patch_size: Side of a patch in pixels. Default: 14.
        width: Width D of a token. Default: 1024.
        layers: Number of transformer blocks. Default: 24.
        heads: Number of attention heads. Default: 16.
        mlp_width: Hidden width of the MLPs. None for 4·width. Default: None.
        activation: "quick_gelu" for OpenAI's weights, "gelu" for others. Default: "quick_gelu".
        embed_dim: Width E of the embedding. None for a tower without projection. Default: 768.
        mean: Mean of the training pixels in each channel, for pixels in [0, 1]. Default: OpenAI's.
        std: Standard deviation of the training pixels in each channel. Default: OpenAI's.

    Raises:
        ValueError: If a number is out of range, or `width` is not a multiple of `heads`.
    """

    image_size: int = 224
    patch_size: int = 14
    width: int = 1024
    layers: int = 24
    heads: int = 16
    mlp_width: int | None = None
    activation: Activation = "quick_gelu"
    embed_dim: int | None = 768
    mean: tuple[float, float, float] = MEAN
    std: tuple[float, float, float] = STD

    def __post_init__(self) -> None:
        check_transformer(self.width, self.layers, self.heads, self.mlp_width)
        check_positive(image_size=self.image_size, patch_size=self.patch_size, embed_dim=self.embed_dim)
        if self.image_size < self.patch_size:
            raise ValueError(
                f"image_size {self.image_size}: expected at least the patch_size {self.patch_size}"
            )
        if min(self.std) <= 0:
            raise ValueError(f"std: expected positive numbers, got {self.std}")


@dataclass(frozen=True, kw_only=True)
class CLIPConfig:
    """Shape of both towers, which must have the same `embed_dim`."""

    text: TextConfig = field(default_factory=TextConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)

    def __post_init__(self) -> None:
        text, vision = self.text.embed_dim, self.vision.embed_dim
        if text is None or text != vision:
            raise ValueError(
                f"embed_dim: expected one number for both towers, got text {text} and vision {vision}"
            )


def check_transformer(width: int, layers: int, heads: int, mlp_width: int | None) -> None:
    """Raise ValueError for numbers that no transformer has.

    Args:
        width: Width of a token, a multiple of `heads`.
        layers: Number of blocks, at least 1.
        heads: Number of attention heads, at least 1.
        mlp_width: Hidden width of the MLPs, at least 1, or None.
    """
    check_positive(width=width, layers=layers, heads=heads, mlp_width=mlp_width)
    if width % heads:
        raise ValueError(f"width {width} cannot be split into {heads} heads")
