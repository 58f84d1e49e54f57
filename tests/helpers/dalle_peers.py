"""The peers of DALL·E Mini: min-dalle and DALL-E from PyPI, where they are installed."""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from ldm.models.dalle.decoder import DalleDecoder
from ldm.models.dalle.encoder import DalleEncoder


def min_dalle_models() -> ModuleType:
    """Return min_dalle.models, or skip; what importing it changes of PyTorch's settings is set back."""
    grad, threads = torch.is_grad_enabled(), torch.get_num_threads()
    try:
        return pytest.importorskip("min_dalle.models", reason="min-dalle is not installed")
    finally:
        torch.set_grad_enabled(grad)
        torch.set_num_threads(threads)


def dall_e() -> ModuleType:
    """Return the package dall_e, or skip the test."""
    package = pytest.importorskip("dall_e", reason="DALL-E is not installed")
    importlib.import_module("dall_e.encoder")
    return package


def peer_networks(encoder: DalleEncoder, decoder: DalleDecoder) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Return min-dalle's encoder and decoder with the weights of ours."""
    models, text, image = min_dalle_models(), encoder.config, decoder.config
    theirs = models.DalleBartEncoder(
        layer_count=text.layers,
        embed_count=text.width,
        attention_head_count=text.heads,
        text_vocab_count=text.vocabulary,
        text_token_count=text.length,
        glu_embed_count=text.inner,
        device="cpu",
    )
    drawing = models.DalleBartDecoder(
        image_vocab_count=image.vocabulary,
        embed_count=image.width,
        attention_head_count=image.heads,
        glu_embed_count=image.inner,
        layer_count=image.layers,
        device="cpu",
    )
    theirs.load_state_dict(encoder.state_dict(), strict=True, assign=True)
    state = decoder.state_dict()
    # its decoder has room for 256 tokens
    state["embed_positions.weight"] = F.pad(state["embed_positions.weight"], (0, 0, 0, 256 - image.length))
    drawing.load_state_dict(state, strict=True, assign=True)
    return theirs.eval(), drawing.eval()


def peer_tokens(
    encoder: torch.nn.Module,
    decoder: torch.nn.Module,
    text: torch.Tensor,
    *,
    start: int,
    length: int,
    top_k: int = 1,
    factor: float = 16.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tokens (1, length) that min-dalle's loop draws, and the logits (length, 2, V) of both rows.

    Args:
        encoder: Its encoder.
        decoder: Its decoder.
        text: Ids of the empty text and of the prompt, shape (2, M).
        start: Token before the first one.
        length: Number of tokens.
        top_k: Number of tokens that it draws from. Default: 1.
        factor: Factor of super-conditioning. Default: 16.
    """
    settings = torch.tensor([1.0, top_k, factor])
    state, mask = encoder(text), text.not_equal(1)[:, None, None, :]
    kept = torch.zeros(decoder.layer_count, 4, 256, decoder.embed_count)
    tokens, logits = [torch.tensor([[start]])], []
    decoder.lm_head.register_forward_hook(lambda module, args, output: logits.append(output[:, -1].clone()))
    for i in range(length):
        new, kept = decoder.sample_tokens(
            settings=settings,
            attention_mask=mask,
            encoder_state=state,
            attention_state=kept,
            prev_tokens=tokens[-1],
            token_index=torch.tensor([i]),
        )
        tokens.append(new[:, None])
    return torch.cat(tokens[1:], dim=1), torch.stack(logits)
