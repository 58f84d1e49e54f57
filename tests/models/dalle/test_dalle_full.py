"""DALL·E Mini at full size with random weights, against min-dalle: logits, greedy tokens and pixels."""

from __future__ import annotations

import pytest
import torch
from dalle_peers import min_dalle_models, peer_networks, peer_tokens
from torch import nn

from ldm.catalog.lookup import find_card
from ldm.models.dalle.decoder import DalleDecoder
from ldm.models.dalle.detokenizer import Detokenizer, DetokenizerConfig
from ldm.models.dalle.encoder import DalleEncoder, text_mask
from ldm.models.dalle.sampling import super_conditioned
from ldm.weights.parts import build_network, randomise, to_layout

pytestmark = pytest.mark.slow
TOKENS = 12
TEXT = torch.tensor([[0, 2, *[1] * 62], [0, 100, 4000, 50_000, 31, 2, *[1] * 58]])


@torch.no_grad()
def test_logits_and_tokens_equal_min_dalle() -> None:
    min_dalle_models()
    card = find_card("dalle-mini")[0]
    encoder, decoder = (randomise(build_network(card.shapes()[part]), 1) for part in ("encoder", "decoder"))
    assert isinstance(encoder, DalleEncoder) and isinstance(decoder, DalleDecoder)
    tokens, logits = peer_tokens(*peer_networks(encoder, decoder), TEXT, start=16384, length=TOKENS)
    states = encoder(TEXT)
    cache = decoder.begin(states, text_mask(TEXT))
    last = torch.full((2, 1), 16384)
    for i in range(TOKENS):
        own = decoder.advance(last, cache)  # (2, 16385)
        assert (own - logits[i]).abs().max() < 1e-4 * logits[i].square().mean().sqrt()
        token = int(super_conditioned(own[:1, :16384], own[1:, :16384], 16.0)[0].argmax())
        assert token == int(tokens[0, i])
        last = torch.full((2, 1), token)


@torch.no_grad()
def test_pixels_equal_min_dalle() -> None:
    models = min_dalle_models()
    config = find_card("dalle-mini")[0].shapes()["vae"]
    ours = randomise(build_network(DetokenizerConfig(**vars(config))), 2)
    assert isinstance(ours, Detokenizer)
    theirs = models.VQGanDetokenizer()
    state = {key.removeprefix("quantize."): value for key, value in to_layout(ours, "original").items()}
    theirs.load_state_dict(state, strict=True, assign=True)
    for module in theirs.modules():  # taming's and vqgan-jax's constant; torch's default differs
        if isinstance(module, nn.GroupNorm):
            module.eps = 1e-6
    tokens = torch.randint(16384, (1, 256), generator=torch.Generator().manual_seed(3))
    pixels = theirs(False, tokens) / 255  # (256, 256, 3)
    made = ours.decode_indices(tokens.view(1, 16, 16))[0].clamp(0, 1).movedim(0, -1)
    assert (made - pixels).abs().max() < 1e-4 * pixels.square().mean().sqrt()
