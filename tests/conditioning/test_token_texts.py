"""Texts for a decoder of image tokens: an encoder of ids, or one of a text tower's states."""

from __future__ import annotations

import pytest
import torch

from ldm.conditioning.conditioner import TextConditioner
from ldm.conditioning.token_texts import TowerTexts, token_texts
from ldm.models.clip.towers import TextConfig, TextTower
from ldm.models.dalle.encoder import DalleEncoder, DalleEncoderConfig, StateEncoder, StateEncoderConfig
from ldm.models.text.bpe import Tokenizer
from ldm.models.text.byte_bpe import ByteTokenizer
from ldm.weights.formats.ldm_folder import EMOJI_TEXT

CONFIG = StateEncoderConfig(text_width=16, width=12, layers=1, heads=2, inner=8)


def tower() -> TextConditioner:
    torch.manual_seed(0)
    tokenizer = Tokenizer([*range(512), *Tokenizer().encode("a red apple on the left")])
    config = TextConfig(
        vocab_size=len(tokenizer),
        context_length=12,
        width=16,
        layers=1,
        heads=2,
        embed_dim=8,
        bos_id=tokenizer.bos_id,
        eot_id=tokenizer.eot_id,
    )
    return TextConditioner(TextTower(config), tokenizer, EMOJI_TEXT).eval()


def read() -> TowerTexts:
    return TowerTexts(tower(), StateEncoder(CONFIG).eval())


def test_states_depend_on_the_text_and_not_on_the_others_of_the_batch() -> None:
    texts = read()
    alone, together = texts(["red apple"]), texts(["red apple", "a red apple on the left", ""])
    length = int(alone.mask.sum())
    assert alone.states.shape == (1, length, 12) and together.states.shape[0] == 3
    assert together.mask.sum(1).tolist() == [length, 8, 2]
    assert torch.allclose(alone.states[0], together.states[0, :length], atol=1e-6)
    assert not torch.allclose(alone.states[0], texts(["apple red"]).states[0], atol=1e-3)


def test_gradients_reach_the_encoder_and_not_the_tower() -> None:
    texts = read()
    texts(["red apple"]).states.square().sum().backward()
    assert texts.encoder.project.weight.grad is not None
    assert all(p.grad is None for p in texts.tower.parameters())
    assert texts.networks().keys() == {"text", "encoder"} and texts.width == 12


def test_without_layers_states_are_projected_and_normed() -> None:
    encoder = StateEncoder(StateEncoderConfig(text_width=16, width=12))
    states, mask = torch.randn(2, 3, 16), torch.ones(2, 3, dtype=torch.bool)
    wanted = encoder.final_ln(encoder.layernorm_embedding(encoder.project(states)))
    assert torch.equal(encoder(states, mask), wanted)


def test_what_does_not_fit_is_refused() -> None:
    ids = DalleEncoder(DalleEncoderConfig(vocabulary=260, length=8, width=8, layers=1, heads=1, inner=8))
    spelling = ByteTokenizer.spelling()
    assert token_texts(ids, spelling, None).cut(["a", "a long text"]) == (8, ["a long text"])
    with pytest.raises(ValueError, match="expected a tokenizer"):
        token_texts(ids, None, None)
    with pytest.raises(ValueError, match="expected a text tower"):
        token_texts(StateEncoder(CONFIG), spelling, None)
    with pytest.raises(ValueError, match="16 wide, the encoder reads 20"):
        token_texts(StateEncoder(StateEncoderConfig(text_width=20, width=8)), None, tower())
    with pytest.raises(ValueError, match="layers"):
        StateEncoderConfig(text_width=16, width=12, layers=-1)
    with pytest.raises(ValueError, match="heads"):
        StateEncoderConfig(text_width=16, width=12, heads=5)
