"""CLIP's towers (Radford et al. 2021): two transformers whose embeddings of a picture and its text agree.
Names are open_clip's."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.models.clip.pixels import MEAN, STD, prepare
from ldm.models.layers.attention import attend
from ldm.models.meta import on_meta

Activation = Literal["gelu", "quick_gelu"]


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """A text tower's shape; the defaults are ViT-L/14's.

    ``embed_dim``: E, None for a tower without projection; ``mlp_width``: None for four times the width.
    ``bos_id`` and ``eot_id`` are ids below ``vocab_size``, which is smaller where only a part of the
    vocabulary is embedded. OpenAI's weights take quick_gelu, others gelu.
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
    """A vision tower's shape; the defaults are ViT-L/14's. ``mean`` and ``std`` are those of the pixels it
    was trained on."""

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
    """Both towers; their ``embed_dim`` is one."""

    text: TextConfig = field(default_factory=TextConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)

    def __post_init__(self) -> None:
        text, vision = self.text.embed_dim, self.vision.embed_dim
        if text is None or text != vision:
            raise ValueError(
                f"embed_dim: expected one number for both towers, got text {text} and vision {vision}"
            )


def check_positive(**values: int | None) -> None:
    """ValueError for a number below 1; None passes."""
    for name, value in values.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")


def check_transformer(width: int, layers: int, heads: int, mlp_width: int | None) -> None:
    """ValueError for shapes that no transformer has."""
    check_positive(width=width, layers=layers, heads=heads, mlp_width=mlp_width)
    if width % heads:
        raise ValueError(f"width {width} cannot be split into {heads} heads")


class CausalSelfAttention(nn.Module):
    """Multi-head self-attention whose q, k and v stand in one matrix, row blocks in this order."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)  # (B, L, 3·D)
        q, k, v = rearrange(qkv, "b l (three h d) -> three b h l d", three=3, h=self.heads)
        return self.out_proj(rearrange(attend(q, k, v, mask), "b h l d -> b l (h d)"))


class MLP(nn.Module):
    """Two linear layers, wide in between."""

    def __init__(self, width: int, inner: int, activation: Activation) -> None:
        super().__init__()
        self.activation = activation
        self.c_fc = nn.Linear(width, inner)
        self.c_proj = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_fc(x)
        # Hendrycks & Gimpel 2016, section 2
        x = F.gelu(x) if self.activation == "gelu" else x * torch.sigmoid(1.702 * x)
        return self.c_proj(x)


class CLIPBlock(nn.Module):
    """Attention and MLP, each after a norm and before a residual sum."""

    def __init__(self, config: TextConfig | VisionConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.width)
        self.attn = CausalSelfAttention(config.width, config.heads)
        self.ln_2 = nn.LayerNorm(config.width)
        self.mlp = MLP(config.width, config.mlp_width or 4 * config.width, config.activation)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), mask)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """The stack of blocks; OpenAI's initialisation, less at the ends of branches where there are more
    layers."""

    def __init__(self, config: TextConfig | VisionConfig) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(CLIPBlock(config) for _ in range(config.layers))
        width, branch = config.width, (config.width * 2 * config.layers) ** -0.5
        for block in self.resblocks:
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=branch)
            nn.init.zeros_(block.attn.out_proj.bias)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=branch)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, *, layer: int = -1, rest: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """The output (B, L, D) of the chosen block (−1 the last) and that of the last one, None if the
        ``rest`` need not be run."""
        depth = len(self.resblocks)
        if not -depth <= layer <= -1:
            raise ValueError(f"layer: expected −1 (the last block) to {-depth} (the first), got {layer}")
        for block in self.resblocks[: depth + 1 + layer]:
            x = block(x, mask)
        chosen = x
        if not rest and layer != -1:
            return chosen, None
        for block in self.resblocks[depth + 1 + layer :]:
            x = block(x, mask)
        return chosen, x


class TextOutput(NamedTuple):
    """tokens (B, L, D) of the chosen layer; pooled (B, E), the last layer's end-of-text state, projected and
    not normalised."""

    tokens: Tensor
    pooled: Tensor | None


class VisionOutput(NamedTuple):
    """tokens (B, 1 + patches, D) of the chosen layer, the class token first, not normed; pooled (B, E),
    projected and not normalised."""

    tokens: Tensor
    pooled: Tensor


class _Text(nn.Module):
    """The text tower's parameters and what they do; in CLIP they stand at the top level, so both classes
    below are made from this."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.positional_embedding = nn.Parameter(torch.empty(config.context_length, config.width))
        self.transformer = Transformer(config)
        self.ln_final = nn.LayerNorm(config.width)
        self.text_projection = (
            None if config.embed_dim is None else nn.Parameter(torch.empty(config.width, config.embed_dim))
        )
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        if self.text_projection is not None:
            nn.init.normal_(self.text_projection, std=config.width**-0.5)

    def read(
        self, ids: Tensor, eot_id: int, *, layer: int, final_norm: bool, mask: Tensor | None, pooled: bool
    ) -> TextOutput:
        """See `TextTower.forward`."""
        length, limit = ids.shape[1], len(self.positional_embedding)
        if length > limit:
            raise ValueError(f"ids: {length} tokens, expected at most {limit}")
        causal = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()  # (L, L)
        seen = causal if mask is None else causal & rearrange(mask, "b l -> b 1 1 l")
        x = self.token_embedding(ids) + self.positional_embedding[:length]  # (B, L, D)
        chosen, last = self.transformer(x, seen, layer=layer, rest=pooled)
        tokens = self.ln_final(chosen) if final_norm else chosen
        if not pooled:
            return TextOutput(tokens, None)
        normed = tokens if final_norm and layer == -1 else self.ln_final(last)
        state = normed[torch.arange(len(ids), device=ids.device), first_position(ids, eot_id)]  # (B, D)
        return TextOutput(tokens, state if self.text_projection is None else state @ self.text_projection)


def first_position(ids: Tensor, token: int) -> Tensor:
    """Where a token first stands in each row, (B,) int64; ValueError if nowhere. (The largest id need not be
    it: tokens can be added.)"""
    found = ids == token  # (B, L)
    if not torch.compiler.is_compiling() and not found.any(dim=1).all():
        rows = (~found.any(dim=1)).nonzero().flatten().tolist()
        raise ValueError(f"ids: no end-of-text token {token} in rows {rows}")
    return found.int().argmax(dim=1)


class TextTower(_Text):
    """CLIP's text tower: a causal transformer over token ids."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__(config)
        self.config = config

    def forward(
        self,
        ids: Tensor,
        *,
        layer: int = -1,
        final_norm: bool = True,
        mask: Tensor | None = None,
        pooled: bool = True,
    ) -> TextOutput:
        """Token states and the pooled embedding of ids (B, L).

        ``layer``: the block whose output the tokens are, −1 the last, −2 the last but one; ``final_norm``:
        whether the final norm is applied to them; it always is to the pooled state, which is the last
        layer's. ``mask`` (B, L) bool, True where a token may be looked at, besides the causal one; the first
        token's must be True. ``pooled`` False leaves out what only the pooled state needs. ValueError if L
        exceeds the context length, or a row has no end-of-text token.
        """
        return self.read(
            ids, self.config.eot_id, layer=layer, final_norm=final_norm, mask=mask, pooled=pooled
        )


class VisionTower(nn.Module):
    """CLIP's vision transformer (Dosovitskiy et al. 2021, with a norm before the first block)."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        width, grid = config.width, config.image_size // config.patch_size
        self.conv1 = nn.Conv2d(3, width, config.patch_size, stride=config.patch_size, bias=False)
        self.class_embedding = nn.Parameter(width**-0.5 * torch.randn(width))
        self.positional_embedding = nn.Parameter(width**-0.5 * torch.randn(grid * grid + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(config)
        self.ln_post = nn.LayerNorm(width)
        self.proj = (
            None
            if config.embed_dim is None
            else nn.Parameter(width**-0.5 * torch.randn(width, config.embed_dim))
        )

    def forward(self, x: Tensor, *, layer: int = -1) -> VisionOutput:
        """Patch states and the pooled embedding of prepared pixels (B, 3, S, S), as `prepare` gives;
        ValueError for another size."""
        size = self.config.image_size
        if x.shape[1:] != (3, size, size):
            raise ValueError(f"pixels: expected (B, 3, {size}, {size}), got {tuple(x.shape)}")
        x = rearrange(self.conv1(x), "b d h w -> b (h w) d")
        # (B, 1 + patches, D)
        x = torch.cat([self.class_embedding.to(x.dtype).expand(len(x), 1, -1), x], dim=1)
        x = self.ln_pre(x + self.positional_embedding)
        chosen, last = self.transformer(x, layer=layer)
        assert last is not None  # all blocks are run
        state = self.ln_post(last[:, 0])  # (B, D)
        return VisionOutput(chosen, state if self.proj is None else state @ self.proj)

    def prepare(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [0, 1], any size, as the tower takes them."""
        return prepare(pixels, self.config.image_size, self.config.mean, self.config.std)


class CLIP(_Text):
    """Both towers: the text tower at the top level, the vision tower below ``visual``; ``logit_scale`` is
    log(1 / temperature)."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__(config.text)
        self.config = config
        self.visual = VisionTower(config.vision)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def encode_text(self, ids: Tensor, *, normalize: bool = False) -> Tensor:
        """The embeddings (B, E) of token ids (B, L), of length 1 if ``normalize``."""
        out = self.read(
            ids, self.config.text.eot_id, layer=-1, final_norm=True, mask=None, pooled=True
        ).pooled
        assert out is not None  # asked for
        return F.normalize(out, dim=-1) if normalize else out

    def encode_image(self, pixels: Tensor, *, normalize: bool = False) -> Tensor:
        """The embeddings (B, E) of pixels (B, 3, H, W) in [0, 1], of length 1 if ``normalize``."""
        out = self.visual(self.visual.prepare(pixels)).pooled
        return F.normalize(out, dim=-1) if normalize else out

    def text_tower(self) -> TextTower:
        """The text tower alone; its parameters are these."""
        with on_meta():
            tower = TextTower(self.config.text)
        own = dict(self.named_parameters())
        tower.load_state_dict({name: own[name] for name in tower.state_dict()}, assign=True)
        return tower.train(self.training)
