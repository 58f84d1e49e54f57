"""Gradient checkpointing: blocks whose inner activations are computed again in the backward pass.

The memory of a training step is that of one block and of the blocks' inputs (Chen et al. 2016); the time
grows by about a third.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ldm.models.clip.transformer import CLIPBlock
from ldm.models.dit import DiTBlock
from ldm.models.layers.attention import joined_now, only_joined
from ldm.models.layers.resblock import ResBlock
from ldm.models.layers.transformer import TransformerBlock

BLOCKS = (ResBlock, TransformerBlock, DiTBlock, CLIPBlock)


def recompute_blocks(network: nn.Module) -> int:
    """Let the residual, transformer and attention blocks of a network compute their activations again.

    Results and gradients stay the same. Call it once.

    Args:
        network: The network, which is changed in place.

    Returns:
        The number of blocks.
    """
    blocks = [block for block in network.modules() if isinstance(block, BLOCKS)]
    for block in blocks:
        # the class is looked up in each call, as `ldm.speed` may exchange it
        block.__dict__["forward"] = functools.partial(_recomputed, block)
    return len(blocks)


def _recomputed(block: nn.Module, *args: Any, **options: Any) -> Any:  # Any: those of the block's forward
    forward = type(block).forward
    if not torch.is_grad_enabled():
        return forward(block, *args, **options)
    joined = joined_now()  # what the backward pass has to compute again too
    return checkpoint(
        forward,
        block,
        *args,
        use_reentrant=False,
        context_fn=lambda: (nullcontext(), only_joined(joined)),
        **options,
    )
