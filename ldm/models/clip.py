"""CLIP's two towers (Radford et al. 2021), with open_clip's parameter names."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.nn.attention import attend

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of the pictures that CLIP was trained on, in [0, 1]
STD = (0.26862954, 0.26130258, 0.27577711)

Activation = Literal["gelu", "quick_gelu"]


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The shape of a text tower; the defaults are ViT-L/14's."""

    vocab_size: int = 49408
    context_length: int = 77
    width: int = 768
    layers: int = 12
    heads: int = 12
    bos_id: int = 49406
    eot_id: int = 49407
    activation: Activation = "quick_gelu"
    embed_dim: int = 768


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The shape of an image tower; the defaults are ViT-L/14's. ``mlp_width``: the hidden width of its MLPs, None for 4 × width."""

    image_size: int = 224
    patch_size: int = 14
    width: int = 1024
    layers: int = 24
    heads: int = 16
    mlp_width: int | None = None
    activation: Activation = "quick_gelu"
    embed_dim: int = 768

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size}: expected a multiple of patch_size {self.patch_size}")


@dataclass(frozen=True, kw_only=True)
class CLIPConfig:
    """Two towers that share an embedding."""

    text: TextConfig = field(default_factory=TextConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)

    def __post_init__(self) -> None:
        if self.text.embed_dim != self.vision.embed_dim:
            raise ValueError(f"embed_dim: text {self.text.embed_dim}, vision {self.vision.embed_dim}; expected one number")


class SelfAttention(nn.Module):
    """Multi-head self-attention with one projection for queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} cannot be split into {heads} heads")
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = rearrange(qkv, "b l (three h d) -> three b h l d", three=3, h=self.heads)
        return self.out_proj(rearrange(attend(q, k, v, mask), "b h l d -> b l (h d)"))


class MLP(nn.Module):
    """Linear, gelu, linear."""

    def __init__(self, width: int, hidden: int, activation: Activation) -> None:
        super().__init__()
        self.activation = activation
        self.c_fc = nn.Linear(width, hidden)
        self.c_proj = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_fc(x)
        return self.c_proj(x * torch.sigmoid(1.702 * x) if self.activation == "quick_gelu" else F.gelu(x))


class Block(nn.Module):
    """Attention and MLP, each behind a norm and before a residual sum."""

    def __init__(self, width: int, heads: int, hidden: int, activation: Activation) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = SelfAttention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = MLP(width, hidden, activation)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.attn(self.ln_1(x), mask)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A stack of blocks; started as CLIP's code starts it (GPT-2's rule: residual projections shrink with depth)."""

    def __init__(self, width: int, layers: int, heads: int, hidden: int, activation: Activation) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads, hidden, activation) for _ in range(layers))
        residual_std = width**-0.5 * (2 * layers) ** -0.5
        for block in self.resblocks:
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.zeros_(block.attn.in_proj_bias)
            nn.init.normal_(block.attn.out_proj.weight, std=residual_std)
            nn.init.zeros_(block.attn.out_proj.bias)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=residual_std)

    def forward(self, x: Tensor, mask: Tensor | None = None, layer: int = -1) -> Tensor:
        """x (B, L, D) after block ``layer`` (−1 the last, −2 the last but one)."""
        count = len(self.resblocks)
        if not -count <= layer < count:
            raise ValueError(f"layer {layer}: expected {-count} to {count - 1}")
        for block in self.resblocks[: layer % count + 1]:
            x = block(x, mask)
        return x


class TextOutput(NamedTuple):
    """What a text tower gives: the chosen layer's tokens (B, L, D), and the projected end-of-text state (B, E), not normalised."""

    tokens: Tensor
    pooled: Tensor


class TextTower(nn.Module):
    """Token ids to states: embeddings, causal transformer, norm, projection of the state at the end of the text."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.positional_embedding = nn.Parameter(torch.empty(config.context_length, config.width))
        self.transformer = Transformer(config.width, config.layers, config.heads, 4 * config.width, config.activation)
        self.ln_final = nn.LayerNorm(config.width)
        self.text_projection = nn.Parameter(torch.empty(config.width, config.embed_dim))
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=config.width**-0.5)

    def forward(self, ids: Tensor, *, layer: int = -1, final_norm: bool = True) -> TextOutput:
        """ids (B, L) int64, L at most the context length → `TextOutput`.

        The end of a text is its first end-of-text id; ValueError where a row has none. Attention is causal, so what stands behind the end, padding,
        does not reach the states before it.
        """
        _, length = ids.shape
        if length > self.config.context_length:
            raise ValueError(f"{length} tokens: expected at most {self.config.context_length}")
        is_end = ids == self.config.eot_id
        if not bool(is_end.any(dim=1).all()):
            raise ValueError(f"a row of ids has no end-of-text token ({self.config.eot_id})")
        x = self.token_embedding(ids) + self.positional_embedding[:length]  # (B, L, D)
        causal = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
        last = self.transformer(x, causal)
        end = last[torch.arange(len(ids), device=ids.device), is_end.int().argmax(dim=1)]  # (B, D)
        tokens = last if layer in (-1, self.config.layers - 1) else self.transformer(x, causal, layer)
        return TextOutput(self.ln_final(tokens) if final_norm else tokens, self.ln_final(end) @ self.text_projection)


class VisionTower(nn.Module):
    """Pictures to an embedding: patches, a class token, a transformer, the class token's state projected."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        width, patches = config.width, (config.image_size // config.patch_size) ** 2
        self.conv1 = nn.Conv2d(3, width, config.patch_size, stride=config.patch_size, bias=False)
        self.class_embedding = nn.Parameter(width**-0.5 * torch.randn(width))
        self.positional_embedding = nn.Parameter(width**-0.5 * torch.randn(patches + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, config.layers, config.heads, config.mlp_width or 4 * width, config.activation)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(width**-0.5 * torch.randn(width, config.embed_dim))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, 3, S, S), normalised as `preprocess` does → (B, E), not normalised."""
        return self.ln_post(self.states(x)[:, 0]) @ self.proj

    def states(self, x: Tensor) -> Tensor:
        """The last block's states of the class token and every patch, (B, 1 + patches, D), before the last norm."""
        x = rearrange(self.conv1(x), "b d h w -> b (h w) d")
        x = torch.cat([self.class_embedding.to(x.dtype).expand(len(x), 1, -1), x], dim=1)
        return self.transformer(self.ln_pre(x + self.positional_embedding.to(x.dtype)))


def preprocess(pixels: Tensor, size: int) -> Tensor:
    """Pixels (B, 3, H, W) in [0, 1] → normalised (B, 3, size, size): the shorter side resized (bicubic, antialiased), the middle cut out."""
    h, w = pixels.shape[-2:]
    if (h, w) != (size, size):
        scale = size / min(h, w)
        new = (max(size, round(h * scale)), max(size, round(w * scale)))
        pixels = F.interpolate(pixels.float(), size=new, mode="bicubic", antialias=True).clamp(0, 1)
        top, left = (new[0] - size) // 2, (new[1] - size) // 2
        pixels = pixels[..., top : top + size, left : left + size]
    mean, std = (torch.tensor(v, device=pixels.device).view(3, 1, 1) for v in (MEAN, STD))
    return (pixels - mean) / std


class CLIP(TextTower):
    """Both towers: a text tower that also has ``visual`` and the logarithm of the similarity's scale, as open_clip lays them out."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__(config.text)
        self.clip_config = config
        self.visual = VisionTower(config.vision)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def encode_text(self, ids: Tensor, *, normalize: bool = False) -> Tensor:
        """ids (B, L) → embeddings (B, E), of length 1 if ``normalize``."""
        pooled = self(ids).pooled
        return F.normalize(pooled, dim=-1) if normalize else pooled

    def encode_image(self, pixels: Tensor, *, normalize: bool = False) -> Tensor:
        """pixels (B, 3, H, W) in [0, 1], any size → embeddings (B, E), of length 1 if ``normalize``."""
        x = preprocess(pixels, self.clip_config.vision.image_size).to(self.visual.conv1.weight.dtype)
        embedding = self.visual(x)
        return F.normalize(embedding, dim=-1) if normalize else embedding

    def text_tower(self) -> TextTower:
        """The text tower alone, sharing the parameters."""
        with torch.device("meta"):
            tower = TextTower(self.config)
        own = self.state_dict(keep_vars=True)
        tower.load_state_dict({name: own[name] for name in tower.state_dict()}, assign=True)
        return tower
