"""IP-Adapter (Ye et al. 2023, arXiv:2308.06721): a UNet's cross-attentions attend to tokens of an image.

Each has keys and values of its own for the tokens z of the image, and the queries of the text:

    out = softmax(q k(text)ᵀ/√d) v(text) + strength · softmax(q k'(z)ᵀ/√d) v'(z)

The tokens are made of CLIP's embedding of the image (base), or of its hidden states (plus, full face).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.diffusion.cond import Cond
from ldm.models.clip.towers import VisionConfig, VisionTower
from ldm.models.control.controlled import Added
from ldm.models.layers.attention import Attention, AttentionJoin, attend
from ldm.models.layers.modules import ModuleListOf

TokenKind = Literal["base", "plus", "full"]
HEAD = 64  # channels of a head of the resampler
PENULTIMATE = -2  # the layer of CLIP whose states the plus and full-face kinds read


@dataclass(frozen=True, kw_only=True)
class IPAdapterConfig:
    """Shape of an IP-Adapter; the defaults are those for Stable Diffusion 1.

    Args:
        kind: "base", "plus" or "full".
        image_dim: Width of what is read of CLIP: its embedding, or its hidden states. Default: 1024.
        context_dim: Width of the tokens, that of the UNet's context. Default: 768.
        tokens: Number of tokens; of "full" it is that of the hidden states. Default: 4.
        widths: Width of each cross-attention, of the way down, then of the way up, then of the middle.
        resampler: For "plus", width, number of blocks and number of heads of the resampler.

    Raises:
        ValueError: If a number is not positive, or there are no attentions.
    """

    kind: TokenKind = "base"
    image_dim: int = 1024
    context_dim: int = 768
    tokens: int = 4
    widths: tuple[int, ...]
    resampler: tuple[int, int, int] = (768, 4, 12)

    def __post_init__(self) -> None:
        numbers = (self.image_dim, self.context_dim, self.tokens, *self.resampler, *self.widths)
        if not self.widths or min(numbers) < 1:
            raise ValueError(f"expected positive numbers and at least one attention, got {self}")


class EmbeddingTokens(nn.Module):
    """A linear layer from an embedding to the tokens, and a layer norm (the base kind)."""

    def __init__(self, config: IPAdapterConfig) -> None:
        super().__init__()
        self.tokens = config.tokens
        self.proj = nn.Linear(config.image_dim, config.tokens * config.context_dim)
        self.norm = nn.LayerNorm(config.context_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return the tokens (B, N, D_c) of embeddings (B, E)."""
        return self.norm(rearrange(self.proj(x), "b (n d) -> b n d", n=self.tokens))


class StateTokens(nn.Module):
    """Two linear layers and a layer norm on each hidden state (the full-face kind)."""

    def __init__(self, config: IPAdapterConfig) -> None:
        super().__init__()
        width = config.image_dim
        self.proj = nn.ModuleList(
            [
                nn.Linear(width, width),
                nn.Identity(),
                nn.Linear(width, config.context_dim),
                nn.LayerNorm(config.context_dim),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the tokens (B, N, D_c) of hidden states (B, N, D)."""
        return self.proj[3](self.proj[2](F.gelu(self.proj[0](x))))


class ResamplerAttention(nn.Module):
    """Attention of latents to states and to themselves, without biases (Perceiver, Jaegle et al. 2021)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, heads * HEAD, bias=False)
        self.to_kv = nn.Linear(width, 2 * heads * HEAD, bias=False)
        self.to_out = nn.Linear(heads * HEAD, width, bias=False)

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        """Return the output (B, N, D) for states x (B, M, D) and latents (B, N, D)."""
        x, latents = self.norm1(x), self.norm2(latents)
        k, v = self.to_kv(torch.cat([x, latents], dim=1)).chunk(2, dim=-1)  # (B, M + N, H·d) each
        q, k, v = (
            rearrange(part, "b l (h d) -> b h l d", h=self.heads) for part in (self.to_q(latents), k, v)
        )
        return self.to_out(rearrange(attend(q, k, v), "b h l d -> b l (h d)"))


class ResamplerFeedForward(nn.ModuleList):
    """Layer norm, and two linear layers without biases with GELU between them."""

    def __init__(self, width: int) -> None:
        wide, narrow = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)
        super().__init__([nn.LayerNorm(width), wide, nn.Identity(), narrow])

    def forward(self, x: Tensor) -> Tensor:
        """Return the output (B, N, D) for x (B, N, D)."""
        return self[3](F.gelu(self[1](self[0](x))))


class Resampler(nn.Module):
    """Learned latents that attend to the hidden states (the plus kind)."""

    def __init__(self, config: IPAdapterConfig) -> None:
        super().__init__()
        width, depth, heads = config.resampler
        self.latents = nn.Parameter(torch.randn(1, config.tokens, width) / width**0.5)
        self.proj_in = nn.Linear(config.image_dim, width)
        self.proj_out = nn.Linear(width, config.context_dim)
        self.norm_out = nn.LayerNorm(config.context_dim)
        self.layers: ModuleListOf[nn.ModuleList] = ModuleListOf(
            nn.ModuleList([ResamplerAttention(width, heads), ResamplerFeedForward(width)])
            for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the tokens (B, N, D_c) of hidden states (B, M, D_i)."""
        latents = self.latents.expand(len(x), -1, -1)  # (B, N, D)
        x = self.proj_in(x)  # (B, M, D)
        for attention, feed_forward in self.layers:
            latents = latents + attention(x, latents)  # (B, N, D)
            latents = latents + feed_forward(latents)  # (B, N, D)
        return self.norm_out(self.proj_out(latents))


class ImageKeysValues(nn.Module):
    """Keys and values of the image's tokens, for one cross-attention."""

    def __init__(self, context_dim: int, width: int) -> None:
        super().__init__()
        self.to_k_ip = nn.Linear(context_dim, width, bias=False)
        self.to_v_ip = nn.Linear(context_dim, width, bias=False)

    def forward(self, q: Tensor, tokens: Tensor, weights: Tensor) -> Tensor:
        """Return what is added to the attention's product (B, H, L, d).

        Args:
            q: Queries, shape (B, H, L, d).
            tokens: Tokens of the image, shape (B, N, D_c).
            weights: Factor for each sample, shape (B,).
        """
        k, v = (
            rearrange(part, "b n (h d) -> b h n d", h=q.shape[1])
            for part in (self.to_k_ip(tokens), self.to_v_ip(tokens))
        )
        return attend(q, k, v) * weights[:, None, None, None]


TOKENS: Mapping[TokenKind, type[nn.Module]] = {
    "base": EmbeddingTokens,
    "plus": Resampler,
    "full": StateTokens,
}


class IPAdapter(nn.Module):
    """The tokens of images, and the keys and values for each cross-attention; the names are the files'."""

    def __init__(self, config: IPAdapterConfig) -> None:
        super().__init__()
        self.config = config
        self.image_proj = TOKENS[config.kind](config)
        # attentions to the positions have the even numbers
        self.ip_adapter = nn.ModuleDict(
            {
                str(2 * i + 1): ImageKeysValues(config.context_dim, width)
                for i, width in enumerate(config.widths)
            }
        )

    @classmethod
    def of_unet(cls, unet: nn.Module, config: IPAdapterConfig) -> IPAdapter:
        """Return an adapter to be trained, whose keys and values begin as those of the text.

        Args:
            unet: The UNet, whose cross-attentions have the widths of the configuration.
            config: The shape.
        """
        made = cls(config)
        names = cross_attentions([name for name, _ in unet.named_modules()])
        with torch.no_grad():
            for name, layer in zip(names, made.ip_adapter.values(), strict=True):
                text = unet.get_submodule(name)
                assert isinstance(text, Attention) and isinstance(layer, ImageKeysValues)
                for own, other in ((layer.to_k_ip, text.to_k), (layer.to_v_ip, text.to_v)):
                    own.weight.copy_(other.weight)
        return made

    def read(self, vision: VisionTower, pixels: Tensor) -> Tensor:
        """Return what is read of CLIP for pixels from its `prepare`: embeddings or hidden states."""
        if self.config.kind == "base":
            return vision(pixels).pooled
        return vision(pixels, layer=PENULTIMATE).tokens

    def forward(self, read: Tensor) -> Tensor:
        """Return the tokens (B, N, D_c) of what `read` returned."""
        return self.image_proj(read)


def read_width(kind: TokenKind, tower: VisionConfig) -> int | None:
    """Return the width of what a kind of IP-Adapter reads of a CLIP tower; None if the tower lacks it."""
    return tower.embed_dim if kind == "base" else tower.width


def cross_attentions(names: Sequence[str]) -> list[str]:
    """Return the names of a UNet's cross-attentions in the order of the files: down, up, middle.

    Args:
        names: Names of its modules.
    """
    found = [name for name in names if name.endswith(".attn2")]
    places = ("down_blocks.", "up_blocks.", "mid_block.")
    return [name for place in places for name in found if name.startswith(place)]


@dataclass(frozen=True, kw_only=True, eq=False)
class IPAdapterKind:
    """An `IPAdapter` with its CLIP tower, as a `ControlKind`.

    Args:
        network: The adapter.
        vision: The tower.
        attentions: Names of the UNet's cross-attentions, from `cross_attentions`.
    """

    network: IPAdapter
    vision: VisionTower
    attentions: tuple[str, ...]
    in_attentions = True
    count = 1
    factor = None
    hint_channels = 3

    def prepare(self, hint: Tensor) -> tuple[Tensor, ...]:
        """Return the tokens of images (B, 3, H, W) in [0, 1]."""
        pixels = self.vision.prepare(hint)
        return (self.network(self.network.read(self.vision, pixels)),)

    def prepare_without(self, hint: Tensor, prepared: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the tokens of the unconditional branch.

        They are those of a zero embedding (base), or of pixels that are zero behind CLIP's normalization.
        """
        first = prepared[0][:1]  # (1, N, D_c)
        if self.network.config.kind == "base":
            return (self.network(first.new_zeros(1, self.network.config.image_dim)),)
        side = self.vision.config.image_size
        return (self.network(self.network.read(self.vision, first.new_zeros(1, 3, side, side))),)

    def added(
        self, x_t: Tensor, t: Tensor, cond: Cond, prepared: Sequence[Tensor], *, strength: float, guess: bool
    ) -> Added:
        """Return nothing: it acts in the attentions."""
        return {}

    def joined(self, prepared: Sequence[Tensor], weights: Tensor) -> Mapping[str, AttentionJoin]:
        """Return what is added to the product of each attention; the arguments are those of `ControlKind`."""
        layers = self.network.ip_adapter.values()
        return {
            name: AttentionJoin(
                product=partial(layer, tokens=prepared[0], weights=weights.to(prepared[0].dtype))
            )
            for name, layer in zip(self.attentions, layers, strict=True)
        }
