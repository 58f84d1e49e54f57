"""CLIP's towers (Radford et al. 2021), which embed images and texts in one space.

Module names are those of open_clip.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.models.clip.config import CLIPConfig, TextConfig, VisionConfig
from ldm.models.clip.pixels import prepare
from ldm.models.clip.transformer import Transformer
from ldm.models.meta import on_meta


class TextOutput(NamedTuple):
    """Output of a text tower.

    Attributes:
        tokens: Token states of the chosen layer, shape (B, L, D).
        pooled: End-of-text state of the last layer, projected if the tower has a projection and not
            normalized, shape (B, E); None if it is not computed.
    """

    tokens: Tensor
    pooled: Tensor | None


class VisionOutput(NamedTuple):
    """Output of a vision tower.

    Attributes:
        tokens: Token states of the chosen layer before the final norm, the class token first, shape
            (B, 1 + patches, D).
        pooled: Class-token state of the last layer, projected if the tower has a projection and not
            normalized, shape (B, E).
    """

    tokens: Tensor
    pooled: Tensor


class _TextTransformer(nn.Module):
    """Parameters and computation of the text tower.

    It is the base class of `TextTower` and `CLIP`, because CLIP's text parameters are at the top level.
    """

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

    def _text_output(
        self,
        ids: Tensor,
        eot_id: int,
        *,
        layer: int,
        final_norm: bool,
        mask: Tensor | None,
        pooled: bool,
        learned: Tensor | None = None,
    ) -> TextOutput:
        """Return token states and pooled embedding; the arguments are those of `TextTower.forward`."""
        length, limit = ids.shape[1], len(self.positional_embedding)
        if length > limit:
            raise ValueError(f"ids: {length} tokens, expected at most {limit}")
        causal = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()  # (L, L)
        # (L, L) or (B, 1, L, L)
        attended = causal if mask is None else causal & rearrange(mask, "b l -> b 1 1 l")
        x = self._embedded(ids, learned) + self.positional_embedding[:length]  # (B, L, D)
        chosen, last = self.transformer(x, attended, layer=layer, rest=pooled)  # (B, L, D) each
        tokens = self.ln_final(chosen) if final_norm else chosen  # (B, L, D)
        if not pooled:
            return TextOutput(tokens, None)
        normed = tokens if final_norm and layer == -1 else self.ln_final(last)  # (B, L, D)
        state = normed[torch.arange(len(ids), device=ids.device), first_position(ids, eot_id)]  # (B, D)
        return TextOutput(
            tokens, state if self.text_projection is None else state @ self.text_projection.to(state.dtype)
        )

    def _embedded(self, ids: Tensor, learned: Tensor | None) -> Tensor:
        """Return the embeddings (B, L, D) of ids (B, L), of ids behind the vocabulary from `learned`."""
        if learned is None:
            return self.token_embedding(ids)
        size = self.token_embedding.num_embeddings
        own = ids >= size  # (B, L)
        x = self.token_embedding(ids.masked_fill(own, 0))  # (B, L, D)
        return torch.where(own[..., None], learned[(ids - size).clamp(min=0)].to(x.dtype), x)


def first_position(ids: Tensor, token: int) -> Tensor:
    """Return the first position of a token in each row.

    The position of the largest id, which other implementations take, is wrong if tokens were added above the
    end-of-text token.

    Args:
        ids: Token ids, shape (B, L).
        token: The id that is searched.

    Returns:
        Shape (B,), int64.

    Raises:
        ValueError: If a row does not contain the token.
    """
    found = ids == token  # (B, L)
    if not torch.compiler.is_compiling() and not found.any(dim=1).all():
        rows = (~found.any(dim=1)).nonzero().flatten().tolist()
        raise ValueError(f"ids: no end-of-text token {token} in rows {rows}")
    return found.int().argmax(dim=1)


class TextTower(_TextTransformer):
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
        learned: Tensor | None = None,
    ) -> TextOutput:
        """Return token states and the pooled embedding.

        Args:
            ids: Token ids, shape (B, L).
            layer: The block whose output the tokens are, from −1 (the last) to −layers. Default: −1.
            final_norm: Whether the final norm is applied to the tokens. The pooled state is always normed.
                Default: True.
            mask: True for tokens that are attended to, in addition to the causal mask, bool, shape (B, L).
                The first token must be True. Default: None, all tokens.
            pooled: Whether to compute the pooled embedding. Default: True.
            learned: Embeddings of further ids, which follow those of the vocabulary, shape (N, D). Default:
                None, no further ids.

        Raises:
            ValueError: If L exceeds the context length, a row has no end-of-text token, or `layer` is out of
                range.
        """
        return self._text_output(
            ids,
            self.config.eot_id,
            layer=layer,
            final_norm=final_norm,
            mask=mask,
            pooled=pooled,
            learned=learned,
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
        """Return token states and the pooled embedding.

        Args:
            x: Pixels from `prepare`, shape (B, 3, S, S).
            layer: The block whose output the tokens are, from −1 (the last) to −layers. Default: −1.

        Raises:
            ValueError: If x has another size, or `layer` is out of range.
        """
        size = self.config.image_size
        if x.shape[1:] != (3, size, size):
            raise ValueError(f"pixels: expected (B, 3, {size}, {size}), got {tuple(x.shape)}")
        x = rearrange(self.conv1(x), "b d h w -> b (h w) d")  # (B, patches, D)
        # (B, 1 + patches, D)
        x = torch.cat([self.class_embedding.to(x.dtype).expand(len(x), 1, -1), x], dim=1)
        x = self.ln_pre(x + self.positional_embedding)  # (B, 1 + patches, D)
        chosen, last = self.transformer(x, layer=layer)  # (B, 1 + patches, D) each
        assert last is not None  # the rest of the blocks is computed by default
        state = self.ln_post(last[:, 0])  # (B, D)
        return VisionOutput(chosen, state if self.proj is None else state @ self.proj.to(state.dtype))

    def prepare(self, pixels: Tensor) -> Tensor:
        """Return the input of the tower (B, 3, S, S) for pixels (B, 3, H, W) in [0, 1]; see `prepare`."""
        return prepare(pixels, self.config.image_size, self.config.mean, self.config.std)


class CLIP(_TextTransformer):
    """Both towers, the text tower at the top level and the vision tower as `visual`.

    Attributes:
        logit_scale: Logarithm of the inverse temperature, shape ().
    """

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__(config.text)
        self.config = config
        self.visual = VisionTower(config.vision)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07), dtype=torch.float32))

    def encode_text(self, ids: Tensor, *, normalize: bool = False) -> Tensor:
        """Return the embeddings (B, E) of token ids (B, L), of length 1 if `normalize`."""
        out = self._text_output(
            ids, self.config.text.eot_id, layer=-1, final_norm=True, mask=None, pooled=True
        ).pooled  # (B, E)
        assert out is not None
        return F.normalize(out, dim=-1) if normalize else out

    def encode_image(self, pixels: Tensor, *, normalize: bool = False) -> Tensor:
        """Return the embeddings (B, E) of pixels (B, 3, H, W) in [0, 1], of length 1 if `normalize`."""
        out = self.visual(self.visual.prepare(pixels)).pooled  # (B, E)
        return F.normalize(out, dim=-1) if normalize else out

    def text_tower(self) -> TextTower:
        """Return a `TextTower` that shares the parameters of this model."""
        with on_meta():
            tower = TextTower(self.config.text)
        own = dict(self.named_parameters())
        tower.load_state_dict({name: own[name] for name in tower.state_dict()}, assign=True)
        return tower.train(self.training)
