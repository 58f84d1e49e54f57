"""Texts for a decoder of image tokens: an encoder of ids, or one of a text tower's states and exemplars."""

from __future__ import annotations

import pytest
import torch
from tiny_exemplars import CELL, SIZE, SLOTS, WIDTH, tiny_conditioner

from ldm.conditioning.token_texts import ExemplarTexts, token_texts
from ldm.models.dalle.encoder import DalleEncoder, DalleEncoderConfig, StateEncoder, StateEncoderConfig
from ldm.models.text.byte_bpe import ByteTokenizer

GRID = SIZE // CELL
CONFIG = StateEncoderConfig(text_width=WIDTH, width=12, slots=SLOTS, cell=CELL, layers=1, heads=2, inner=8)


def read() -> ExemplarTexts:
    torch.manual_seed(3)
    return ExemplarTexts(tiny_conditioner(), StateEncoder(CONFIG).eval(), GRID)


def ids() -> DalleEncoder:
    return DalleEncoder(DalleEncoderConfig(vocabulary=260, length=8, width=8, layers=1, heads=1, inner=8))


def test_what_is_read_depends_on_the_text_and_the_seed_and_not_on_the_others_of_the_batch() -> None:
    texts = read()
    alone = texts(["a red cat"], [4])
    together = texts(["a red cat", "a dog to the left of a cat", ""], [4, 5, 6])
    length = int(alone.mask.sum())
    assert alone.shown is not None and together.shown is not None
    assert together.states.shape[::2] == (3, 12) and together.shown.shape == (3, GRID**2, 12)
    assert together.mask.sum(1).tolist()[0] == length and together.rows is None
    assert torch.allclose(alone.states[0, :length], together.states[0, :length], atol=1e-6)
    assert torch.allclose(alone.shown[0], together.shown[0], atol=1e-6)
    other = texts(["a red cat"], [5])
    assert other.shown is not None
    assert torch.equal(other.states, alone.states) and not torch.allclose(other.shown, alone.shown)


def test_cells_are_those_of_the_canvas_in_rows() -> None:
    texts = read()
    canvas = texts.conditioner(["a cat and a dog"], seeds=[1]).exemplars
    assert canvas is not None
    with torch.no_grad():
        cells = texts.encoder.cells(canvas).unflatten(1, (GRID, GRID))
        changed = canvas.clone()
        changed[..., CELL : 2 * CELL, 3 * CELL :] += 1
        differs = (texts.encoder.cells(changed).unflatten(1, (GRID, GRID)) != cells).any(-1)[0]
    assert differs.nonzero().tolist() == [[1, 3]]


def test_cells_begin_as_the_latents_of_the_canvas_on_white() -> None:
    torch.manual_seed(0)
    encoder = StateEncoder(CONFIG)
    weight, bias = torch.randn(6, 3 * CELL**2, 1, 1), torch.randn(6)
    encoder.use_basis(weight, bias, 0.5)
    color, opacity = torch.rand(1, 1, 3, SIZE, SIZE), torch.rand(1, 1, 1, SIZE, SIZE)
    canvas = torch.zeros(1, SLOTS, 4, SIZE, SIZE)
    canvas[:, 1:2] = torch.cat([color * opacity, opacity], dim=2)
    image = 2 * (color * opacity + 1 - opacity)[:, 0] - 1  # (1, 3, S, S) in [−1, 1]
    patches = torch.nn.functional.pixel_unshuffle(image, CELL)
    wanted = 0.5 * torch.nn.functional.conv2d(patches, weight, bias).flatten(2).mT  # (1, N, 6)
    assert torch.allclose(encoder.cells(canvas)[..., :6], wanted, atol=1e-4)


def test_gradients_reach_the_encoder_and_not_the_tower() -> None:
    texts = read()
    states = texts(["a cat"], [0])
    assert states.shown is not None
    (states.states.square().sum() + states.shown.square().sum()).backward()
    assert all(p.grad is not None for p in texts.encoder.parameters())
    assert all(p.grad is None for p in texts.conditioner.parameters())
    assert list(texts.networks()) == ["text", "layout", "encoder"]


def test_without_layers_states_are_projected_and_normed() -> None:
    encoder = StateEncoder(StateEncoderConfig(text_width=16, width=12))
    states, mask = torch.randn(2, 3, 16), torch.ones(2, 3, dtype=torch.bool)
    wanted = encoder.final_ln(encoder.layernorm_embedding(encoder.project(states)))
    assert torch.equal(encoder(states, mask), wanted)


def test_equal_texts_are_encoded_once() -> None:
    texts = token_texts(ids(), ByteTokenizer.spelling(), None, 1)
    read = texts(["a", "b", "a"], [0, 0, 1])
    assert read.rows is not None and read.rows.tolist() == [0, 1, 0]
    assert len(read.states) == len(read.mask) == 2 and read.shown is None


def test_what_does_not_fit_is_refused() -> None:
    spelling, conditioner = ByteTokenizer.spelling(), tiny_conditioner()
    assert token_texts(ids(), spelling, None, 1).cut(["a", "a long text"]) == (8, ["a long text"])
    with pytest.raises(ValueError, match="expected a tokenizer"):
        token_texts(ids(), None, None, 1)
    with pytest.raises(ValueError, match="expected a conditioner"):
        token_texts(StateEncoder(CONFIG), spelling, None, 1)
    for changes in ({"text_width": 20}, {"slots": 1}):
        encoder = StateEncoder(StateEncoderConfig(**{**vars(CONFIG), **changes}))
        with pytest.raises(ValueError, match="is 16 wide and the prior over layouts places 2 things, the"):
            token_texts(encoder, None, conditioner, 1)
    with pytest.raises(ValueError, match="layers"):
        StateEncoderConfig(text_width=16, width=12, layers=-1)
    with pytest.raises(ValueError, match="heads"):
        StateEncoderConfig(text_width=16, width=12, heads=5)
    with pytest.raises(ValueError, match="slots"):
        StateEncoderConfig(text_width=16, width=12, slots=0)
