"""The conditioner with exemplars: what the condition of a prompt depends on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_exemplars import CELL, SIZE, SLOTS, STYLES, tiny_layout
from tiny_exemplars import tiny_conditioner as conditioner
from torch import Tensor

from ldm.conditioning.conditioner import TextConditioner
from ldm.conditioning.exemplars import ExemplarConditioner
from ldm.conditioning.layouts import LAYOUT_ROWS, LAYOUT_STEPS
from ldm.support.calls import separate_call


def parts(
    prompt: str, seed: int = 0, net: ExemplarConditioner | None = None
) -> tuple[Tensor, list[bool], Tensor]:
    """Return the canvas of each slot, which slots are shown, and the attended text of one prompt."""
    cond = (net or conditioner())([prompt], seeds=[seed])
    assert cond.exemplars is not None and cond.context is not None and cond.context_mask is not None
    canvas = cond.exemplars[0]  # (K, 4, H, W)
    return canvas, [bool(shown) for shown in canvas.flatten(1).any(1)], cond.context[0][cond.context_mask[0]]


def test_things_are_shown_and_the_text_has_slot_words_only():
    canvas, slots, text = parts("a red cat on a blue background")
    other, _, same = parts("a red dog on a blue background")
    assert canvas.shape == (SLOTS, 4, SIZE, SIZE) and slots == [True, False]
    assert torch.equal(text, same)
    assert not torch.allclose(canvas[0], other[0], atol=1e-3)
    assert parts("a cat and a dog")[1] == [True, True] and parts("")[1] == [False, False]
    assert not torch.equal(parts("a blue cat")[2], parts("a red cat")[2])


def test_the_seed_draws_the_layout_and_the_canvas_is_the_latent_s():
    net = conditioner()
    apart = {tuple(parts("fluent cat", seed, net)[0][0, 3].flatten().tolist()) for seed in range(4)}
    assert len(apart) == 4
    cond = net(["a cat"], (6, 8), seeds=[1])
    assert cond.exemplars is not None and cond.exemplars.shape == (1, SLOTS, 4, 6 * CELL, 8 * CELL)


def test_the_seed_chooses_the_style_unless_the_prompt_does():
    net = conditioner()
    chosen = {seed: net.draw_things([net.read("cat")], [seed])[0].images for seed in range(12)}
    assert len({tuple(image.flatten().tolist()) for image in chosen.values()}) == len(STYLES)
    fluent = [net.draw_things([net.read("fluent cat")], [seed])[0].images for seed in range(5)]
    assert all(torch.equal(image, fluent[0]) for image in fluent)


def test_a_batch_is_what_its_prompts_are_alone():
    net = conditioner()
    prompts = ["a cat", "three red cats and a dog on blue", "a cat", "", *["fluent dog"] * 4]
    seeds = [5, 6, 7, 8, 1, 2, 3, 4]
    together = net(prompts, seeds=seeds)
    for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        alone = net([prompt], seeds=[seed])
        length = alone.context.shape[1]
        kept = alone.context_mask[0]
        assert torch.equal(together.context_mask[i, :length], kept)
        assert not together.context_mask[i, length:].any()
        assert torch.allclose(together.context[i, :length][kept], alone.context[0][kept], atol=1e-6)
        assert torch.equal(together.exemplars[i], alone.exemplars[0])


def test_a_call_reads_each_prompt_once_and_draws_layouts_of_one_length_in_one_batch():
    net, reads, rows = conditioner(), [], []
    net.text.tower.register_forward_pre_hook(lambda _, args: reads.append(len(args[0])))
    net.layout.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    long = "a red cat to the left of a dog on a blue, blue, blue, blue, blue background"
    prompts, seeds = ["a cat", long, "a cat", "a dog", ""], [1, 2, 3, 4, 5]
    with separate_call(net):
        made = net(prompts, seeds=seeds)
        assert len(reads) == 4 and rows == [LAYOUT_ROWS] * 2 * LAYOUT_STEPS
        again = net(["a cat"], seeds=[3])
        assert len(reads) == 4 and len(rows) == 2 * LAYOUT_STEPS
    assert torch.equal(again.exemplars[0], made.exemplars[2])
    changed = conditioner()
    changed.layout.embed_in.weight.add_(1)
    for other in (net, changed):
        assert torch.equal(other(["a cat"], seeds=[3]).exemplars[0], again.exemplars[0]) == (other is net)
    assert len(reads) == 5  # outside of a call nothing is kept


def test_one_prompt_has_a_condition_for_each_seed_only_if_it_names_a_thing():
    net = conditioner()
    assert net(["a cat"], seeds=[1, 2, 3]).batch == 3
    assert net([""], seeds=[1, 2, 3]).batch == 1
    with pytest.raises(ValueError, match="2 prompts and 3 seeds"):
        net(["a cat", "a dog"], seeds=[1, 2, 3])


def test_weights_act_on_slot_words_and_blends_mix_exemplars():
    net = conditioner()
    plain, _, text = parts("a cat", 1, net)
    assert torch.equal(parts("a (cat:1)", 1, net)[2], text)
    assert not torch.allclose(parts("a (cat:1.5)", 1, net)[2], text, atol=1e-3)
    blend = parts("a {cat:3|dog}", 1, net)[0][0]  # the same words, thus the same layout, without overlaps
    assert torch.allclose(blend, 0.75 * plain[0] + 0.25 * parts("a dog", 1, net)[0][0], atol=1e-5)


def test_places_are_those_of_the_slot_words():
    found = conditioner().places("a red apple and three (cats:1.2)")
    assert found == [("a", [1]), ("red apple", [2]), ("and", [3]), ("three", [4]), ("cats", [5])]


def test_unknown_words_are_named_and_an_image_of_ones_own_makes_them_known():
    net = conditioner()
    assert net.unknown("a zeppelin on a cat and a dog and an apple") == ["zeppelin", "an", "apple"]
    before = parts("a cat", 3, net)
    net.library.add("zeppelin", torch.rand(4, 16, 16, generator=torch.Generator().manual_seed(5)))
    assert net.unknown("a zeppelin on a cat") == []
    after = parts("a cat", 3, net)
    assert all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context_dim": 8}, "reads a text of width 8, the text tower has 16: expected the same"),
        ({"patch": 2}, "expected of a prior over layouts"),
        ({"in_channels": 4, "out_channels": 4}, "expected of a prior over layouts"),
    ],
)
def test_a_prior_that_does_not_fit_is_refused(changes, message):
    net = conditioner()
    with pytest.raises(ValueError, match=message):
        ExemplarConditioner(net.text, tiny_layout(**changes), net.library, cell=CELL)


def test_a_text_tower_that_does_not_fit_is_refused():
    net = conditioner()
    open_padding = replace(net.text.convention, masked=False)
    text = TextConditioner(net.text.tower, net.text.tokenizer, open_padding, net.grammar)
    with pytest.raises(ValueError, match="the padding of the text tower is not masked"):
        ExemplarConditioner(text, net.layout, net.library, cell=CELL)
    text = TextConditioner(net.text.tower, net.text.tokenizer, net.text.convention)
    with pytest.raises(ValueError, match="does not state the words that it was trained on"):
        ExemplarConditioner(text, net.layout, net.library, cell=CELL)
