"""The conditioner with exemplars: what the condition of a prompt depends on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_exemplars import SLOTS, STYLES, TOKENS, WIDTH
from tiny_exemplars import tiny_conditioner as conditioner

from ldm.conditioning.conditioner import TextConditioner
from ldm.conditioning.exemplar_library import ExemplarLibrary
from ldm.conditioning.exemplars import ExemplarConditioner
from ldm.models.exemplars import ExemplarConfig, ExemplarEncoder


def parts(prompt: str, seed: int = 0, net: ExemplarConditioner | None = None):
    """Return the tokens of each slot, the attended slots, and the attended text of one prompt."""
    cond = (net or conditioner())([prompt], seeds=[seed])
    tokens, text = cond.context[0].split([SLOTS * TOKENS, cond.context.shape[1] - SLOTS * TOKENS])
    mask = cond.context_mask[0]
    slots = [bool(mask[i * TOKENS]) for i in range(SLOTS)]
    return tokens.view(SLOTS, TOKENS, WIDTH), slots, text[mask[SLOTS * TOKENS :]]


def test_things_are_shown_and_the_text_has_slot_words_only():
    tokens, slots, text = parts("a red cat on a blue background")
    other, _, same = parts("a red dog on a blue background")
    assert slots == [True, False]
    assert torch.equal(text, same)
    assert not torch.allclose(tokens[0], other[0], atol=1e-3)
    assert parts("a cat and a dog")[1] == [True, True] and parts("")[1] == [False, False]
    assert not torch.equal(parts("a blue cat")[2], parts("a red cat")[2])


def test_the_seed_chooses_the_style_unless_the_prompt_does():
    net = conditioner()
    fluent = parts("fluent cat", 0, net)[0][0]
    assert all(torch.equal(parts("fluent cat", seed, net)[0][0], fluent) for seed in range(5))
    seen = {tuple(parts("cat", seed, net)[0][0].flatten().tolist()) for seed in range(12)}
    assert len(seen) == len(STYLES)


def test_a_batch_is_what_its_prompts_are_alone():
    net = conditioner()
    prompts, seeds = ["a cat", "three red cats and a dog on blue", "a cat", ""], [5, 6, 7, 8]
    together = net(prompts, seeds=seeds)
    for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        alone = net([prompt], seeds=[seed])
        length = alone.context.shape[1]
        kept = alone.context_mask[0]
        assert torch.equal(together.context_mask[i, :length], kept)
        assert not together.context_mask[i, length:].any()
        assert torch.allclose(together.context[i, :length][kept], alone.context[0][kept], atol=1e-6)


def test_one_prompt_has_a_condition_for_each_seed_only_if_it_names_a_thing():
    net = conditioner()
    assert net(["a cat"], seeds=[1, 2, 3]).batch == 3
    assert net([""], seeds=[1, 2, 3]).batch == 1
    with pytest.raises(ValueError, match="2 prompts and 3 seeds"):
        net(["a cat", "a dog"], seeds=[1, 2, 3])


def test_weights_and_blends_act_on_slot_words_and_exemplars():
    net = conditioner()
    plain, _, text = parts("a cat", 0, net)
    weighted, _, heavier = parts("a (cat:1.5)", 0, net)
    assert torch.equal(weighted, plain) and not torch.allclose(heavier, text, atol=1e-3)
    assert torch.equal(parts("a (cat:1)", 0, net)[2], text)
    blend = parts("a {cat:3|dog}", 0, net)[0][0]
    expected = 0.75 * plain[0] + 0.25 * parts("a dog", 0, net)[0][0]
    assert torch.allclose(blend, expected, atol=1e-6)


def test_places_are_the_exemplars_tokens_and_the_slot_word():
    net = conditioner()
    found = net.places("a red apple and three (cats:1.2)")
    text = SLOTS * TOKENS
    assert found == [
        ("a", [text + 1]),
        ("red apple", [0, 1, 2, 3, text + 2]),
        ("and", [text + 3]),
        ("three", [text + 4]),
        ("cats", [4, 5, 6, 7, text + 5]),
    ]


def test_unknown_words_are_named_and_an_image_of_ones_own_makes_them_known():
    net = conditioner()
    assert net.unknown("a zeppelin on a cat and a dog and an apple") == ["zeppelin", "an", "apple"]
    before = parts("a cat", 3, net)
    net.library.add("zeppelin", torch.rand(4, 16, 16, generator=torch.Generator().manual_seed(5)))
    assert net.unknown("a zeppelin on a cat") == []
    after = parts("a cat", 3, net)
    assert all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))


def test_parts_that_do_not_fit_are_refused():
    net = conditioner()
    narrow = ExemplarEncoder(ExemplarConfig(size=16, patch=8, cell=4, components=5, width=8, head_dim=8))
    with pytest.raises(ValueError, match="exemplar tokens are 8 wide, the text's are 16"):
        ExemplarConditioner(net.text, narrow, net.library)
    with pytest.raises(ValueError, match="the encoder reads 16 pixels, the library has 32"):
        ExemplarConditioner(net.text, net.encoder, ExemplarLibrary([], {}, size=32))
    open_padding = replace(net.text.convention, masked=False)
    text = TextConditioner(net.text.tower, net.text.tokenizer, open_padding, net.grammar)
    with pytest.raises(ValueError, match="the padding of the text tower is not masked"):
        ExemplarConditioner(text, net.encoder, net.library)
    text = TextConditioner(net.text.tower, net.text.tokenizer, net.text.convention)
    with pytest.raises(ValueError, match="does not state the words that it was trained on"):
        ExemplarConditioner(text, net.encoder, net.library)
