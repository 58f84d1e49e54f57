"""CLIP's embeddings of compositions and captions, for the parts of unCLIP in training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ldm.data import Composition
from ldm.models.clip import VisionConfig, VisionTower
from ldm.models.conditioner import TextConditioner
from ldm.pipelines.clip import ClipPair
from ldm.training.data import Pictures
from ldm.weights.native import EMOJI_TEXT, about_part, read_part, read_text


def read_clip(text: str | Path, vision: str | Path, *, length: int) -> ClipPair:
    """The CLIP of two folders, frozen, reading texts at a length. Its name holds the hash of its vision tower: that tells two trainings apart."""
    tower, _ = read_part(vision, "vision", VisionConfig, VisionTower)
    assert isinstance(tower, VisionTower)
    read = read_text(text)
    conditioner = TextConditioner(read.tower, read.tokenizer, replace(EMOJI_TEXT, length=length), read.words)
    return ClipPair(clip_name(vision), text=conditioner, vision=tower).eval().requires_grad_(False)


def clip_name(vision: str | Path) -> str:
    """What a CLIP trained here is called: after its vision tower's hash."""
    return f"emoji-clip/{about_part(vision, 'vision')['sha256'][:12]}"


@torch.no_grad()
def embed(clip: ClipPair, pictures: Pictures, compositions: Sequence[Composition], *, batch: int = 64) -> Tensor:
    """The image embeddings of compositions, (B, E) float32, not of length 1."""
    parts = [compositions[i : i + batch] for i in range(0, len(compositions), batch)]
    return torch.cat([clip.image_embedding(((pictures.tensor(part) + 1) / 2).clamp(0, 1)).vector for part in parts])


def statistics(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation (1, E) of embeddings (N, E), the latter at least a thousandth of the mean one."""
    mean, std = embeddings.mean(0, keepdim=True), embeddings.std(0, keepdim=True)
    return mean, std.clamp_min(1e-3 * float(std.mean()) + 1e-8)
