"""The decoder of DALL·E Mini (Dayma et al. 2021): text states → image tokens, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.checks import check_positive
from ldm.models.dalle.encoder import check_heads
from ldm.models.dalle.layers import DalleDecoderLayer, LayerCache, TokenLinear
from ldm.models.layers.modules import ModuleListOf

COPIED = 0.3  # RMS of the features that a decoder copies before its training


@dataclass(frozen=True, kw_only=True)
class DalleDecoderConfig:
    """Shape of the decoder; the defaults are those of DALL·E Mini.

    Args:
        vocabulary: Number of image tokens. The tables have one more row, for the start. Default: 16384.
        length: Number N of tokens of an image. Default: 256.
        width: Width D, that of the encoder. Default: 1024.
        layers: Number of layers. Default: 12.
        heads: Number of heads, a divisor of D. Default: 16.
        inner: Width of the gated linear units. Default: 2730.

    Raises:
        ValueError: If a number is below 1, or D is no multiple of the heads.
    """

    vocabulary: int = 16384
    length: int = 256
    width: int = 1024
    layers: int = 12
    heads: int = 16
    inner: int = 2730

    def __post_init__(self) -> None:
        check_positive(**vars(self))
        check_heads(self.width, self.heads)


@dataclass(kw_only=True, eq=False)
class TokenCache:
    """What the decoder keeps between steps.

    Args:
        layers: Keys and values of each layer.
        mask: True for tokens of the text, bool, shape (B, 1, 1, M).
        shown: What exemplars show in the cell of each token, shape (B, N, D). Default: None.
        length: Number of image tokens whose keys and values are there.
    """

    layers: Sequence[LayerCache]
    mask: Tensor
    shown: Tensor | None = None
    length: int = 0


class DalleDecoder(nn.Module):
    """Causal transformer over image tokens that attends to the states of a text.

    Where exemplars are shown, the input that predicts a token has the embedding of that token's cell of the
    canvas added to it, so that the shown cell need not be searched for by attention.
    """

    def __init__(self, config: DalleDecoderConfig) -> None:
        super().__init__()
        self.config = c = config
        self.embed_tokens = nn.Embedding(c.vocabulary + 1, c.width)
        self.embed_positions = nn.Embedding(c.length, c.width)
        self.layers: ModuleListOf[DalleDecoderLayer] = ModuleListOf(
            DalleDecoderLayer(c.width, c.heads, c.inner) for _ in range(c.layers)
        )
        self.layernorm_embedding = nn.LayerNorm(c.width)
        self.final_ln = nn.LayerNorm(c.width)
        self.lm_head = TokenLinear(c.width, c.vocabulary + 1)

    def forward(self, tokens: Tensor, context: Tensor, mask: Tensor, shown: Tensor | None = None) -> Tensor:
        """Return the logits (B, L, vocabulary + 1) of the tokens that follow each of the given ones.

        Args:
            tokens: The start and the first tokens of images, int64, shape (B, L), L at most N.
            context: States of the texts, shape (B, M, D).
            mask: True for tokens of the texts, bool, shape (B, M).
            shown: What exemplars show in the cell of each token, shape (B, N, D). Default: None.
        """
        x = self._embed(tokens, 0, shown)  # (B, L, D)
        for layer in self.layers:
            x = layer(x, context, mask[:, None, None])
        return self.lm_head(self.final_ln(x))

    def begin(
        self, context: Tensor, mask: Tensor, rows: Tensor | None = None, shown: Tensor | None = None
    ) -> TokenCache:
        """Return an empty cache, for which the keys and values of the texts are computed.

        Args:
            context: States of the texts, shape (T, M, D).
            mask: True for tokens of the texts, bool, shape (T, M).
            rows: Index of the text of each image, int64, shape (B,). None: one image for each text.
            shown: What exemplars show in the cell of each token, shape (B, N, D). Default: None.
        """
        c, device = self.config, context.device
        shape = (len(context if rows is None else rows), c.heads, c.length, c.width // c.heads)
        layers = []
        for layer in self.layers:
            text = layer.encoder_attn.keys_values(context)
            text = text if rows is None else (text[0][rows], text[1][rows])  # (B, H, M, d) each
            keys, values = torch.empty((2, *shape), dtype=text[0].dtype, device=device)
            layers.append(LayerCache(keys, values, *text))
        mask = (mask if rows is None else mask[rows])[:, None, None]  # (B, 1, 1, M)
        return TokenCache(layers=layers, mask=mask, shown=shown)

    def advance(self, tokens: Tensor, cache: TokenCache) -> Tensor:
        """Return the logits (B, vocabulary + 1) of the token that follows, and extend the cache.

        Args:
            tokens: The next tokens, first the start, int64, shape (B, l).
            cache: From `begin`.

        Raises:
            ValueError: If there are more than N tokens.
        """
        end = cache.length + tokens.shape[1]
        if end > self.config.length:
            raise ValueError(f"tokens: expected at most {self.config.length} of an image, got {end}")
        x = self._embed(tokens, cache.length, cache.shown)  # (B, l, D)
        for layer, kept in zip(self.layers, cache.layers, strict=True):
            x = layer.advance(x, kept, cache.length, cache.mask)
        cache.length = end
        return self.lm_head(self.final_ln(x[:, -1]))

    @torch.no_grad()
    def use_codes(self, codes: Tensor) -> float:
        """Begin with copying what is shown: the logits are the distances of codes from the cell of a token.

        The first C features of a cell are latents (`StateEncoder.use_basis`), the next C those of the token
        before, and the layers begin without effect.

        Args:
            codes: Latents of the first K tokens, shape (K, C), K at most the vocabulary and 2·C less than D.

        Returns:
            The factor by which the latents of cells are to be multiplied.

        Raises:
            ValueError: If D is too small.
        """
        (count, width), all_tokens = codes.shape, self.embed_tokens.weight
        if self.config.width <= 2 * width:
            raise ValueError(f"width: expected more than 2·{width}, got {self.config.width}")
        scale = COPIED * float(codes.square().mean().rsqrt())
        codes = scale * codes
        # the other features have mean 0 and a constant length, so that norms change what is copied little
        rest = all_tokens[:, 2 * width :]
        rest = F.normalize(rest - rest.mean(1, keepdim=True)) * self.config.width**0.5
        all_tokens.copy_(F.pad(rest, (2 * width, 0)))
        all_tokens[:count, width : 2 * width] = codes
        self.embed_positions.weight[:, :width] = 0
        self.embed_positions.weight.mul_(0.1)
        self.lm_head.weight.zero_()
        self.lm_head.weight[:count, :width] = codes / COPIED**2
        self.lm_head.weight[:count, 2 * width] = -codes.square().sum(1) / (2 * COPIED**2)
        self.final_ln.weight[2 * width], self.final_ln.bias[2 * width] = 0, 1
        for layer in self.layers:
            for last in (layer.self_attn_layer_norm, layer.encoder_attn_layer_norm, layer.glu.fc2):
                last.weight.zero_()
        return scale

    def _embed(self, tokens: Tensor, at: int, shown: Tensor | None) -> Tensor:
        """Return the embeddings (B, l, D) of tokens (B, l) from position `at` on, with what is shown."""
        end = at + tokens.shape[1]
        positions = torch.arange(at, end, device=tokens.device)  # (l,)
        x = self.embed_tokens(tokens) + self.embed_positions(positions)  # (B, l, D)
        return self.layernorm_embedding(x if shown is None else x + shown[:, at:end])
