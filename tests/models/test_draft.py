"""The draft of the latent: shapes, growth, agreement with a known part, and its use by the networks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny_latent_diffusion import tiny_model

from ldm.conditioning.conditioner import TextConditioner
from ldm.models.draft import Draft, DraftConfig
from ldm.speed.optimization import optimize


def test_a_draft_has_the_latents_shape_and_other_sizes_are_interpolated():
    draft = Draft(DraftConfig(embed_dim=6, width=5, channels=3, size=4))
    embedding = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    own = draft(embedding)
    assert own.shape == (2, 3, 4, 4) and torch.equal(own, draft(embedding, (4, 4)))
    wide = draft(embedding, (4, 12))
    assert wide.shape == (2, 3, 4, 12)
    assert torch.allclose(
        wide[..., 1::3], own, atol=1e-6
    )  # the middle one of three new columns has the center of the old column


def test_the_number_of_hidden_layers_is_configurable():
    narrow, deep = (
        Draft(DraftConfig(embed_dim=6, width=5, layers=layers, channels=1, size=2)) for layers in (1, 3)
    )
    assert {key.split(".")[0] for key in narrow.state_dict()} == {"fc1", "fc2"}
    assert {key for key in deep.state_dict() if key.startswith("hidden")} == {
        f"hidden.{i}.{kind}" for i in (0, 1) for kind in ("weight", "bias")
    }
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    by_hand = deep.fc2(F.gelu(deep.hidden[1](F.gelu(deep.hidden[0](F.gelu(deep.fc1(x)))))))
    assert torch.allclose(deep(x), by_hand.view(3, 1, 2, 2))


@pytest.mark.parametrize("layers", [1, 3])
def test_a_widened_draft_computes_the_same_function_and_its_units_learn(layers: int):
    draft = Draft(DraftConfig(embed_dim=6, width=5, layers=layers, channels=1, size=2))
    wide = draft.grown(replace(draft.config, width=9))
    assert wide.config == DraftConfig(embed_dim=6, width=9, layers=layers, channels=1, size=2)
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(wide(x), draft(x), atol=1e-6)
    wide(x).square().sum().backward()
    assert wide.fc2.weight.grad[:, 5:].abs().min() > 0
    for other in ({"width": 4}, {"width": 9, "channels": 2}):
        with pytest.raises(
            ValueError,
            match="this draft is .*width=5.* expected a larger width, or finish where it is None, got .*",
        ):
            draft.grown(replace(draft.config, **other))


def finished(seed: int = 0, **config: int) -> Draft:
    """Return a draft whose convolutions do not vanish."""
    torch.manual_seed(seed)
    draft = Draft(DraftConfig(finish=7, **config))
    for p in draft.finish.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return draft


def test_a_finish_starts_at_zero_and_can_be_added_to_a_draft():
    draft = Draft(DraftConfig(embed_dim=6, width=5, channels=2, size=4))
    grown = draft.grown(replace(draft.config, width=9, finish=7))
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(grown(x), draft(x), atol=1e-6)
    grown(x).square().sum().backward()
    assert grown.finish.conv_out.weight.grad.abs().min() > 0
    with pytest.raises(ValueError, match="finish where it is None"):
        grown.grown(replace(grown.config, finish=None))
    with pytest.raises(ValueError, match="finish: expected at least 1, got 0"):
        DraftConfig(embed_dim=6, finish=0)


def test_the_embedding_scales_and_shifts_the_channels_of_the_finish():
    finish = finished(embed_dim=6, channels=2, size=4).finish
    x, e = torch.randn(3, 2, 4, 4), torch.randn(3, 6)
    film = finish.film(e)
    for i in range(3):  # each sample with weights that its embedding scales
        scale_in, shift_in, scale, shift = film[i].chunk(4)
        h = F.conv2d(x[i : i + 1], finish.conv_in.weight * (1 + scale_in)[:, None, None, None], padding=1)
        h = F.gelu(h + (finish.conv_in.bias * (1 + scale_in) + shift_in)[:, None, None])
        h = F.conv2d(h, finish.conv.weight * (1 + scale)[:, None, None, None], padding=1)
        h = F.gelu(h + (finish.conv.bias * (1 + scale) + shift)[:, None, None])
        assert torch.allclose(finish(x, e)[i : i + 1], x[i : i + 1] + finish.conv_out(h), atol=1e-5)


def test_the_conditioner_concatenates_the_draft_of_each_prompt_at_the_requested_size():
    text = tiny_model().text
    cond = text(["a red apple", ""], (8, 12))
    assert cond.concat.shape == (2, 4, 8, 12) and cond.context.shape[0] == 2
    assert torch.allclose(cond.concat, text.draft(cond.pooled, (8, 12)))
    assert not torch.allclose(cond.concat[0], cond.concat[1])
    plain = TextConditioner(text.tower, text.tokenizer, text.convention)
    assert plain(["a red apple"]).concat is None


def test_invalid_numbers_are_refused():
    with pytest.raises(ValueError, match="width: expected at least 1, got 0"):
        DraftConfig(embed_dim=6, width=0)
    text = tiny_model().text
    with pytest.raises(ValueError, match="embeddings 6 wide, the text tower's are 16"):
        TextConditioner(text.tower, text.tokenizer, text.convention, draft=Draft(DraftConfig(embed_dim=6)))


def test_a_draft_agrees_with_the_known_part():
    torch.manual_seed(0)
    draft = Draft(DraftConfig(embed_dim=16, width=64, channels=2, size=8))
    text = torch.randn(3, 16)
    truth = draft(text + 0.3 * torch.randn(3, 16)).detach()
    hole = torch.zeros(3, 1, 8, 8)
    hole[..., 4:] = 1

    def error(x, part):
        return (x - truth)[..., part].square().flatten(1).mean(1)

    plain = draft(text).detach()
    shown, hidden = slice(0, 4), slice(4, 8)
    # values inside the hole are not read
    got = draft.agreeing(text, torch.where(hole > 0, torch.full_like(truth, 7.0), truth), hole, tie=0.001)
    assert bool((error(got, shown) < 0.3 * error(plain, shown)).all())
    assert float(error(got, hidden).mean()) < float(error(plain, hidden).mean())
    tied = draft.agreeing(text, truth, hole, tie=1e6, ridge=1e9)
    assert torch.allclose(tied, plain, atol=2e-2)  # close to the text's draft, up to the last step of Adam
    alone = draft.agreeing(text[1:2], truth[1:2], hole[1:2], tie=0.001)
    assert torch.allclose(
        alone, got[1:2], atol=1e-3
    )  # samples are independent; products of another batch size round differently
    assert all(p.grad is None for p in draft.parameters())


def test_a_finished_draft_agrees_by_the_jacobian_of_its_convolutions():
    draft = finished(embed_dim=4, width=24, channels=2, size=6)
    text, hidden = torch.randn(1, 4), torch.randn(24)
    unit = 1e-3

    def moved(by: torch.Tensor) -> torch.Tensor:
        begun = draft._unfinished(text) + (draft.fc2.weight @ by).view(1, 2, 6, 6)
        return draft.finish(begun, text).detach()

    step = (moved(unit * hidden) - moved(-unit * hidden)).flatten() / (2 * unit)
    assert torch.allclose(
        draft._jacobian(text) @ hidden, step, atol=2e-3
    )  # float32 rounding divided by the step: 1e-7·10/1e-3
    truth = moved(0.3 * hidden)
    hole = torch.zeros(1, 1, 6, 6)
    hole[..., 3:] = 1
    drawn = draft.agreeing(text, truth, hole, steps=0, ridge=0.01)
    errors = [float(((x - truth).square() * hole).sum()) for x in (draft(text).detach(), drawn)]
    assert errors[1] < 0.6 * errors[0], errors


@pytest.mark.parametrize("finish", [None, 7])
def test_a_draft_of_packed_layers_agrees_as_the_plain_one_does(finish: int | None):
    torch.manual_seed(0)
    draft = (
        Draft(DraftConfig(embed_dim=4, width=24, channels=2, size=6, finish=finish))
        .requires_grad_(False)
        .eval()
    )
    text, known, hole = torch.randn(2, 4), torch.randn(2, 2, 6, 6), torch.zeros(2, 1, 6, 6)
    hole[..., 3:] = 1
    plain = draft.agreeing(text, known, hole)
    optimize(draft)
    draft(text)  # weights are packed at the first call
    assert torch.allclose(draft.agreeing(text, known, hole), plain, atol=1e-5)
    with torch.inference_mode():
        draft(text)
        assert torch.allclose(draft.agreeing(text, known, hole), plain, atol=1e-5)


def test_the_hidden_layer_adds_what_the_embedding_does_not_determine():
    torch.manual_seed(0)
    draft = Draft(DraftConfig(embed_dim=4, width=24, channels=2, size=6))
    text = torch.randn(2, 4)
    hidden = F.gelu(draft.fc1(text)) + torch.randn(2, 24)
    truth = draft.fc2(hidden).view(2, 2, 6, 6).detach()
    hole = torch.zeros(2, 1, 6, 6)
    hole[0, ..., 3:], hole[1, :, :4] = 1, 1
    by_text = draft.agreeing(text, truth, hole, ridge=1e9)
    drawn = draft.agreeing(text, truth, hole, ridge=0.1)
    errors = [((x - truth).square() * hole).sum() / hole.sum() for x in (draft(text), by_text, drawn)]
    assert errors[2] < 0.6 * errors[1] < 0.6 * errors[0], errors
    # without steps of e it is ridge regression of the hidden layer on the known part, for each sample
    still = draft.agreeing(text, truth, hole, steps=0, ridge=0.5)
    for i in range(2):
        seen = (hole[i].expand(2, -1, -1) == 0).flatten()
        weight = draft.fc2.weight.detach()
        noise = 0.5 * weight[seen].square().sum(1).mean()
        gram = weight[seen].T @ weight[seen] + noise * torch.eye(24)
        moved = torch.linalg.solve(gram, weight[seen].T @ (truth - draft(text).detach())[i].flatten()[seen])
        assert torch.allclose(
            still[i].flatten(), draft(text).detach()[i].flatten() + weight @ moved, atol=1e-5
        )
    open_all = torch.ones(2, 1, 6, 6)
    open_all[0] = hole[0]
    assert torch.allclose(
        draft.agreeing(text, truth, open_all)[1], draft(text).detach()[1], atol=1e-5
    )  # without a known part it is the draft of the text
