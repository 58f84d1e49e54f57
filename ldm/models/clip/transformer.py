"""The transformer that CLIP's towers share; module names are those of open_clip."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.models.clip.config import Activation, TextConfig, VisionConfig
from ldm.models.layers.attention import attend
from ldm.models.layers.modules import ModuleListOf


class PackedSelfAttention(nn.Module):
    """Multi-head self-attention with the weights of q, k and v in one matrix, row blocks in this order."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Return the attention (B, L, D) of x (B, L, D); a mask is broadcastable to (B, H, L, L)."""
        qkv = F.linear(x, self.in_proj_weight.to(x.dtype), self.in_proj_bias.to(x.dtype))  # (B, L, 3·D)
        # (B, H, L, d) each
        q, k, v = rearrange(qkv, "b l (three h d) -> three b h l d", three=3, h=self.heads)
        return self.out_proj(rearrange(attend(q, k, v, mask), "b h l d -> b l (h d)"))


class MLP(nn.Module):
    """Two linear layers with an activation in between.

    Args:
        width: Width of the input and of the output.
        inner: Width in between.
        activation: The activation.
        linear: Class of the layers. Default: `nn.Linear`.
    """

    def __init__(
        self, width: int, inner: int, activation: Activation, *, linear: type[nn.Linear] = nn.Linear
    ) -> None:
        super().__init__()
        self.activation = activation
        self.c_fc = linear(width, inner)
        self.c_proj = linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output (..., width) for x (..., width)."""
        x = self.c_fc(x)  # (..., inner)
        # quick_gelu is the sigmoid approximation of Hendrycks & Gimpel 2016, section 2
        x = F.gelu(x) if self.activation == "gelu" else x * torch.sigmoid(1.702 * x)  # (..., inner)
        return self.c_proj(x)


class CLIPBlock(nn.Module):
    """Self-attention and MLP, each after a layer norm and added to its input."""

    def __init__(self, config: TextConfig | VisionConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.width)
        self.attn = PackedSelfAttention(config.width, config.heads)
        self.ln_2 = nn.LayerNorm(config.width)
        self.mlp = MLP(config.width, config.mlp_width or 4 * config.width, config.activation)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the output (B, L, D) for x (B, L, D); mask as in `PackedSelfAttention`."""
        x = x + self.attn(self.ln_1(x), mask)  # (B, L, D)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """Stack of blocks with OpenAI's initialization, which scales residual branches down with the depth."""

    def __init__(self, config: TextConfig | VisionConfig) -> None:
        super().__init__()
        self.resblocks: ModuleListOf[CLIPBlock] = ModuleListOf(
            CLIPBlock(config) for _ in range(config.layers)
        )
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
        """Return the output of a block and of the last block.

        Args:
            x: Tokens, shape (B, L, D).
            mask: True where a token attends to another, bool, broadcastable to (B, H, L, L). None attends to
                all. Default: None.
            layer: The block, from −1 (the last) to −layers (the first). Default: −1.
            rest: Whether to compute the blocks after it. Default: True.

        Returns:
            The output of the block and of the last one, each (B, L, D); the second is None if it is not
            computed.

        Raises:
            ValueError: If `layer` is out of range.
        """
        depth = len(self.resblocks)
        if not -depth <= layer <= -1:
            raise ValueError(f"layer: expected −1 (the last block) to {-depth} (the first), got {layer}")
        for block in self.resblocks[: depth + 1 + layer]:
            x = block(x, mask)  # (B, L, D)
        chosen = x  # (B, L, D)
        if not rest and layer != -1:
            return chosen, None
        for block in self.resblocks[depth + 1 + layer :]:
            x = block(x, mask)  # (B, L, D)
        return chosen, x
