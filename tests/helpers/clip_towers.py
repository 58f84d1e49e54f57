"""Small and published configurations of CLIP's towers, random weights and token ids, and a comparison."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

from ldm.models.clip.towers import TextConfig, VisionConfig

TEXT = TextConfig(
    vocab_size=310,
    context_length=20,
    width=64,
    layers=3,
    heads=4,
    embed_dim=48,
    activation="gelu",
    bos_id=298,
    eot_id=299,
)
VISION = VisionConfig(
    image_size=32, patch_size=8, width=96, layers=3, heads=3, mlp_width=288, embed_dim=48, activation="gelu"
)
FULL: dict[str, tuple[TextConfig, VisionConfig]] = {
    "ViT-L-14-quickgelu": (TextConfig(), VisionConfig()),
    "ViT-H-14": (
        TextConfig(width=1024, layers=24, heads=16, embed_dim=1024, activation="gelu"),
        VisionConfig(width=1280, layers=32, heads=16, embed_dim=1024, activation="gelu"),
    ),
    "ViT-bigG-14": (
        TextConfig(width=1280, layers=32, heads=20, embed_dim=1280, activation="gelu"),
        VisionConfig(width=1664, layers=48, heads=16, mlp_width=8192, embed_dim=1280, activation="gelu"),
    ),
}
IMAGE_TOWER = {  # of Hugging Face
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "projection_dim": 24,
    "hidden_act": "gelu",
}
# float32 sums in a different order through up to 48 layers: several roundings of 6e-8 per layer
CLOSE = 1e-5


def close(ours: Tensor, theirs: Tensor, tolerance: float = CLOSE) -> None:
    """Assert that the largest difference is below `tolerance` times the RMS of the expected output."""
    assert ours.shape == theirs.shape
    rms = theirs.double().square().mean().sqrt()
    assert rms > 1e-3  # otherwise the comparison proves nothing
    assert float((ours.double() - theirs.double()).abs().max() / rms) < tolerance


def scaled(name: str, shape: torch.Size, normal: Tensor) -> Tensor:
    """Scale standard normal numbers so that, as weights, they keep signals of order one; gains are near 1."""
    if len(shape) < 2 or "embedding" in name:
        return 0.2 * normal + (1 if "ln_" in name and name.endswith("weight") else 0)
    fan_in = (
        shape[0] if name.endswith(("text_projection", "visual.proj")) or name == "proj" else shape[1:].numel()
    )
    return normal * fan_in**-0.5


def randomize(module: nn.Module, seed: int = 0) -> None:
    """Fill a module with random weights, including gains and biases."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(scaled(name, parameter.shape, torch.randn(parameter.shape, generator=generator)))


def ids_for(config: TextConfig, ends: tuple[int, ...], length: int | None = None, seed: int = 0) -> Tensor:
    """Return random token ids (B, L) whose first end-of-text token is at `ends`."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, config.bos_id, (len(ends), length or config.context_length), generator=generator)
    ids[:, 0] = config.bos_id
    ids[torch.arange(len(ends)), torch.tensor(ends)] = config.eot_id
    return ids


def write_tower(folder: Path) -> Path:
    """Write a small image tower of random weights in Hugging Face layout, and return its folder."""
    torch.manual_seed(0)
    made = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**IMAGE_TOWER))
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    made.save_pretrained(folder)
    return folder
