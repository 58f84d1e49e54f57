"""DALL·E Mini's transformers: sizes, the cache, and parity with a reference and with min-dalle."""

from __future__ import annotations

from dataclasses import replace

import dalle_reference
import pytest
import torch
from dalle_peers import min_dalle_models, peer_networks, peer_tokens
from tiny_dalle import DECODER, ENCODER
from torch import Tensor

from ldm.catalog.lookup import find_card
from ldm.models.dalle.decoder import DalleDecoder, DalleDecoderConfig
from ldm.models.dalle.detokenizer import Detokenizer, DetokenizerConfig
from ldm.models.dalle.encoder import DalleEncoder, DalleEncoderConfig, text_mask
from ldm.models.dalle.layers import UNIT_SCALES
from ldm.models.dalle.sampling import super_conditioned
from ldm.weights.parts import build_network, randomise

COUNTS = {  # parameters with the implied scales, as stored, and tensors with the implied scales
    ("dalle-mini", "encoder"): (202_649_584, 202_591_224, 186),
    ("dalle-mini", "decoder"): (235_313_136, 235_242_488, 283),
    ("dalle-mega", "encoder"): (1_110_220_800, 1_110_022_144, 366),
    ("dalle-mega", "decoder"): (1_477_746_688, 1_477_498_880, 559),
}
TEXT = torch.tensor([[0, 2, *[1] * 10], [0, 7, 30, 4, 99, 2, *[1] * 6]])


def networks() -> tuple[DalleEncoder, DalleDecoder]:
    encoder, decoder = randomise(build_network(ENCODER), 1), randomise(build_network(DECODER), 2)
    assert isinstance(encoder, DalleEncoder) and isinstance(decoder, DalleDecoder)
    return encoder, decoder


def error(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest difference in units of the RMS of the other result."""
    return float((ours - theirs).abs().max() / theirs.square().mean().sqrt())


@pytest.mark.parametrize(("name", "part"), COUNTS)
def test_published_sizes(name: str, part: str) -> None:
    network = build_network(find_card(name)[0].shapes()[part])
    sizes = {key: p.numel() for key, p in network.named_parameters()}
    scales = tuple(f"{each}.weight" for each in UNIT_SCALES)
    stored = sum(size for key, size in sizes.items() if not key.endswith(scales))
    assert (sum(sizes.values()), stored, len(sizes)) == COUNTS[name, part]


def test_size_of_the_detokenizer() -> None:
    config = find_card("dalle-mini")[0].shapes()["vae"]
    detokenizer = build_network(DetokenizerConfig(**vars(config)))
    assert isinstance(detokenizer, Detokenizer)
    counts = [sum(p.numel() for p in module.parameters()) for module in (detokenizer, detokenizer.decoder)]
    assert counts == [46_709_891, 42_449_795] and len(detokenizer.state_dict()) == 197
    with pytest.raises(ValueError, match="no encoder"):
        detokenizer.encode(torch.zeros(1, 3, 16, 16))


@pytest.mark.parametrize("config", [DalleEncoderConfig, DalleDecoderConfig])
def test_wrong_sizes_are_refused(config: type) -> None:
    with pytest.raises(ValueError, match="heads"):
        config(width=10, heads=3)
    with pytest.raises(ValueError, match="layers"):
        config(layers=0)


@torch.no_grad()
def test_the_networks_equal_the_reference() -> None:
    encoder, decoder = networks()
    states, mask = encoder(TEXT), text_mask(TEXT)
    sizes = {"layers": ENCODER.layers, "heads": ENCODER.heads}
    expected = dalle_reference.encode(TEXT, encoder.state_dict(), **sizes)
    assert error(states, expected) < 1e-5
    tokens = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(0))
    theirs = dalle_reference.decode(tokens, expected, mask, decoder.state_dict(), **sizes)
    assert error(decoder(tokens, states, mask), theirs) < 1e-5


@torch.no_grad()
def test_padding_changes_nothing() -> None:
    encoder, _ = networks()
    states = encoder(TEXT)
    assert torch.allclose(encoder(TEXT[1:, :6]), states[1:, :6], atol=1e-5)


@torch.no_grad()
def test_the_cache_equals_whole_sequences() -> None:
    encoder, decoder = networks()
    states, mask = encoder(TEXT), text_mask(TEXT)
    tokens = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(1))
    whole = decoder(tokens, states, mask)  # (2, 16, 65)
    cache = decoder.begin(states, mask)
    steps = torch.stack([decoder.advance(tokens[:, i : i + 1], cache) for i in range(16)], dim=1)
    assert error(steps, whole) < 1e-5
    again = decoder.begin(states, mask)  # several tokens at once
    assert error(decoder.advance(tokens[:, :5], again), whole[:, 4]) < 1e-5
    assert error(decoder.advance(tokens[:, 5:9], again), whole[:, 8]) < 1e-5
    with pytest.raises(ValueError, match="at most 16"):
        decoder.advance(tokens, again)


@torch.no_grad()
def test_what_is_shown_enters_at_its_token() -> None:
    encoder, decoder = networks()
    tokens, states, mask = torch.arange(32).view(2, 16), encoder(TEXT), text_mask(TEXT)
    shown = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(5))
    whole = decoder(tokens, states, mask, shown)
    cache = decoder.begin(states, mask, shown=shown)
    parts = [tokens[:, :5], *tokens[:, 5:].split(1, dim=1)]
    steps = torch.stack([decoder.advance(part, cache) for part in parts], dim=1)
    assert error(steps, whole[:, 4:]) < 1e-5
    assert error(decoder(tokens, states, mask, torch.zeros_like(shown)), decoder(tokens, states, mask)) == 0
    shown[:, 9] += 1
    differs = (decoder(tokens, states, mask, shown) != whole).any(-1)
    assert differs[:, 9:].all() and not differs[:, :9].any()


@torch.no_grad()
def test_a_decoder_that_begins_with_codes_copies_what_is_shown() -> None:
    decoder = DalleDecoder(replace(DECODER, width=64))
    codes = torch.randn(64, 8, generator=torch.Generator().manual_seed(5))
    scale = decoder.use_codes(codes)
    tokens = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(6))
    shown = torch.nn.functional.pad(scale * codes[tokens], (0, 56))
    read = torch.cat([torch.full((2, 1), 64), tokens[:, :-1]], dim=1)
    states, mask = torch.randn(2, 3, 64), torch.ones(2, 3, dtype=torch.bool)
    assert torch.equal(decoder(read, states, mask, shown).argmax(-1), tokens)
    with pytest.raises(ValueError, match="width: expected more than 2·32"):
        decoder.use_codes(torch.randn(64, 32))


@torch.no_grad()
def test_rows_share_the_keys_of_their_text() -> None:
    encoder, decoder = networks()
    states, mask, rows = encoder(TEXT), text_mask(TEXT), torch.tensor([1, 0, 1])
    tokens = torch.tensor([[64], [64], [64]])
    shared = decoder.advance(tokens, decoder.begin(states, mask, rows))
    assert error(shared, decoder.advance(tokens, decoder.begin(states[rows], mask[rows]))) < 1e-5
    assert torch.equal(shared[0], shared[2])


def test_gradients_reach_every_parameter() -> None:
    encoder, decoder = networks()
    for network in (encoder, decoder):
        network.requires_grad_(True)
    tokens = torch.arange(32).view(2, 16)
    decoder(tokens, encoder(TEXT), text_mask(TEXT)).square().mean().backward()
    unused = {"embed_positions.weight", "embed_tokens.weight"}
    for network in (encoder, decoder):
        for name, p in network.named_parameters():
            assert p.grad is not None and (name in unused or bool(p.grad.any())), name


@torch.no_grad()
def test_logits_and_greedy_tokens_equal_min_dalle() -> None:
    min_dalle_models()
    encoder = randomise(build_network(ENCODER), 3)
    decoder = randomise(build_network(replace(DECODER, length=40)), 4)
    assert isinstance(encoder, DalleEncoder) and isinstance(decoder, DalleDecoder)
    theirs = peer_networks(encoder, decoder)
    assert error(encoder(TEXT), theirs[0](TEXT)) < 1e-4
    tokens, logits = peer_tokens(*theirs, TEXT, start=64, length=32)
    cache = decoder.begin(encoder(TEXT), text_mask(TEXT))
    last, drawn = torch.tensor([[64], [64]]), []
    for i in range(32):
        own = decoder.advance(last, cache)  # (2, 65)
        assert error(own, logits[i]) < 1e-4
        drawn.append(int(super_conditioned(own[:1], own[1:], 16.0)[0].argmax()))
        last = torch.tensor([drawn[-1:]] * 2)
    assert drawn == tokens[0].tolist()
