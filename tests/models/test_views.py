"""Views: patches in closed form, several exemplars, and the network that looks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from shared_weights import fill

from ldm.diffusion.cond import Cond
from ldm.models.dit import DiT, DiTConfig
from ldm.models.views import (
    Correlation,
    Look,
    Sight,
    View,
    Vote,
    exemplar_planes,
    first_sight,
    sample_patches,
    sample_points,
    token_centres,
)

H, W, Q = 2, 3, 4  # tokens, and pixels of a token's side


def exemplar(height: int = H * Q, width: int = W * Q, k: int = 1) -> torch.Tensor:
    """Return random exemplars, (2, K, 4, height, width)."""
    return torch.rand(2, k, 4, height, width, generator=torch.Generator().manual_seed(0))


def sight(maps: list[float], k: int = 1) -> Sight:
    """Return the sight of tokens that all move their centre by (u, v) and have the same (a, b)."""
    start = torch.cat([token_centres(H, W), torch.zeros(H * W, 2)], dim=-1)
    whole = (start + torch.tensor(maps))[None, :, None].expand(2, H * W, k, 4)
    return Sight(maps=whole, shown=torch.full((2, H * W, k), 50.0))


def canvas(patches: torch.Tensor) -> torch.Tensor:
    """Return the patches of tokens as one image (B, 4, H·q, W·q)."""
    return rearrange(patches, "b (h w) c y x -> b c (h y) (w x)", h=H)


def test_tokens_that_look_at_their_own_places_see_the_exemplar():
    x = exemplar()
    seen = sample_patches(sight([0, 0, 1, 0]), exemplar_planes(x), H, W, Q)
    assert seen.shape == (2, H * W, 4, Q, Q)
    assert torch.allclose(canvas(seen), x[:, 0], atol=1e-5)


def test_a_moved_sight_sees_a_moved_exemplar_that_is_transparent_outside():
    x = exemplar()
    seen = canvas(sample_patches(sight([2 / (W * Q), 1 / (H * Q), 1, 0]), exemplar_planes(x), H, W, Q))
    assert torch.allclose(seen, F.pad(x[:, 0, :, 1:, 2:], (0, 2, 0, 1)), atol=1e-5)


def test_an_exemplar_at_half_size_is_the_mean_of_its_pixels():
    x = exemplar(16, 16)
    centres = token_centres(2, 2)
    maps = torch.cat([centres, torch.ones(4, 1), torch.zeros(4, 1)], dim=-1)[None, :, None].expand(2, 4, 1, 4)
    half = Sight(maps=maps, shown=torch.full((2, 4, 1), 50.0))
    seen = sample_patches(half, exemplar_planes(x), 2, 2, Q)  # 8 pixels for 16
    shown = rearrange(seen, "b (h w) c y x -> b c (h y) (w x)", h=2)
    assert torch.allclose(shown, F.avg_pool2d(x[:, 0], 2), atol=1e-5)


def test_a_quarter_turn_sees_the_exemplar_turned():
    x = exemplar(8, 8)
    centres = token_centres(2, 2)
    dx, dy = (centres - 0.5).unbind(-1)
    maps = torch.stack([0.5 - dy, 0.5 + dx, torch.zeros(4), torch.ones(4)], dim=-1)
    turned = Sight(maps=maps[None, :, None].expand(2, 4, 1, 4), shown=torch.full((2, 4, 1), 50.0))
    seen = sample_patches(turned, exemplar_planes(x), 2, 2, Q)
    shown = rearrange(seen, "b (h w) c y x -> b c (h y) (w x)", h=2)
    assert torch.allclose(shown, x[:, 0].rot90(1, (-2, -1)), atol=1e-5)


def test_exemplars_are_summed_by_their_probabilities_of_being_shown():
    x = exemplar(k=2)
    both = sight([0, 0, 1, 0], k=2)
    shown = both.shown.clone()
    shown[..., 0], shown[..., 1] = 0.0, -50.0  # probabilities 1/2 and 0
    seen = canvas(sample_patches(replace(both, shown=shown), exemplar_planes(x), H, W, Q))
    assert torch.allclose(seen, x[:, 0] / 2, atol=1e-5)


def test_before_training_the_exemplar_fills_the_canvas():
    found = Look(8, 3)(torch.randn(2, H * W, 8), first_sight(2, H, W, 2, torch.device("cpu")))
    assert found.maps.shape == (2, H * W, 2, 4) and found.shown.shape == (2, H * W, 2)
    assert torch.equal(found.maps, sight([0, 0, 1, 0], k=2).maps)
    assert (found.shown == 0).all()


def placed(u: float, v: float, a: float, b: float, k: int = 1) -> torch.Tensor:
    """Return the maps of tokens to which an exemplar is placed: (u, v) is the centre of the canvas."""
    dx, dy = (token_centres(H, W) - 0.5).unbind(-1)
    turned = torch.stack([u + a * dx - b * dy, v + b * dx + a * dy], dim=-1)
    return torch.cat([turned, torch.tensor([a, b]).expand(H * W, 2)], dim=-1)[None, :, None].expand(
        2, -1, k, 4
    )


def test_tokens_of_one_thing_agree_already():
    vote = fill(Vote(8, 3))
    maps = torch.cat([placed(0.4, 0.6, 1.5, 0.3), placed(0.7, 0.2, 0.8, -0.4)], dim=2)
    shown = torch.randn(2, H * W, 2, generator=torch.Generator().manual_seed(0))
    found = vote(torch.randn(2, H * W, 8), Sight(maps=maps, shown=shown), H, W)
    assert torch.allclose(found.maps, maps, atol=1e-6) and torch.equal(found.shown, shown)


def test_the_vote_is_the_mean_of_the_tokens_that_show_the_exemplar():
    vote = Vote(8, 1)
    torch.nn.init.zeros_(vote.to_q.weight)
    torch.nn.init.zeros_(vote.falls)
    first, second = placed(0.4, 0.6, 1.5, 0.3), placed(0.6, 0.4, 1.7, 0.5)
    maps, shown = placed(9.0, 9.0, 9.0, 9.0).clone(), torch.full((2, H * W, 1), -60.0)
    maps[:, 1], maps[:, 4] = first[:, 1], second[:, 4]
    shown[:, [1, 4]] = 60.0
    found = vote(torch.randn(2, H * W, 8), Sight(maps=maps, shown=shown), H, W)
    assert torch.allclose(found.maps, placed(0.5, 0.5, 1.6, 0.4), atol=1e-5)


def test_fits_move_with_where_tokens_look():
    match = fill(Correlation(8, channels=5, slots=2))
    x, planes = torch.randn(2, H * W, 5), exemplar_planes(exemplar(32, 32, 2))
    look = placed(0.5, 0.5, 0.8, 0.1, k=2)
    for level, side in enumerate(match.SIDES):
        layers = planes[1 + level], match.embed_patch[level], match.embed_area[level]
        fits = match.fit(x, look, side, *layers, H, W)
        assert fits.shape == (2, H * W, 2, 2 * 25)
        right = look.clone()  # one step to the right on the canvas
        right[..., 0] += right[..., 2] / (W * side)
        right[..., 1] += right[..., 3] / (W * side)
        moved = match.fit(x, right, side, *layers, H, W)
        places = (2, H * W, 2, 2, 5, 5)
        assert torch.allclose(moved.view(places)[..., :-1], fits.view(places)[..., 1:], atol=1e-5)


def test_a_patch_fits_best_where_it_is():
    """The features of x_t are those of the exemplar's own patch."""
    match = Correlation(8, channels=16, slots=1, heads=1, dim=16)
    planes = exemplar_planes(exemplar(64, 64))
    area, own = match.embed_area[0], match.embed_patch[0]
    torch.nn.init.eye_(own.weight)
    torch.nn.init.zeros_(own.bias)
    torch.nn.init.zeros_(area.bias)
    look = placed(0.5, 0.5, 0.7, 0.0)
    steps = (torch.arange(8) - 3.5) / 8
    at = sample_points(planes[1], look, steps[None] / W, steps[:, None] / H)  # (2, L, 1, 4, 8, 8)
    x = area(at.flatten(0, 2)).view(2, H * W, 16)
    own_length = x.norm(dim=-1)
    fits = match.fit(x, look, 8, planes[1], own, area, H, W)[:, :, 0]  # (2, L, 25)
    assert torch.allclose(fits[..., 12], own_length / 4, rtol=1e-4)  # x · x / (|x| √16)


def test_no_gradient_passes_to_the_sight_before():
    view = fill(View(8, channels=5, slots=2, pixels=Q))
    before = first_sight(2, H, W, 2, torch.device("cpu"))
    before = Sight(maps=before.maps.clone().requires_grad_(), shown=before.shown.clone().requires_grad_())
    x, patches = torch.randn(2, H * W, 8), torch.randn(2, H * W, 5)
    out, sight = view(x, patches, before, exemplar_planes(exemplar(k=2)), H, W)
    (out.square().sum() + sight.maps.sum() + sight.shown.sum()).backward()
    assert before.maps.grad is None and before.shown.grad is None
    assert view.correlation.embed_area[0].weight.grad.abs().max() > 0 and view.vote.falls.grad.abs().max() > 0


SHAPE = {"in_channels": 3, "out_channels": 3, "width": 16, "depth": 2, "head_dim": 8, "context_dim": 6}
CONFIG = DiTConfig(**SHAPE, views=(0, 1), cell=2)


def inputs() -> tuple[torch.Tensor, torch.Tensor, Cond]:
    g = torch.Generator().manual_seed(1)
    cond = Cond(context=torch.randn(2, 5, 6, generator=g), exemplars=exemplar(16, 16, 2))
    return torch.randn(2, 3, 4, 4, generator=g), torch.rand(2, generator=g) * 1000, cond


def test_a_network_with_views_depends_on_each_exemplar_and_each_sample_is_its_own():
    net, (x, t, cond) = fill(DiT(CONFIG)), inputs()
    out = net(x, t, cond)
    for i in range(2):
        assert torch.allclose(net(x[i : i + 1], t[i : i + 1], cond[i : i + 1])[0], out[i], atol=1e-5)
        changed = cond.exemplars.clone()
        changed[:, i] = 0
        assert not torch.allclose(net(x, t, replace(cond, exemplars=changed)), out, atol=1e-3)


def test_gradients_reach_where_tokens_look():
    net, (x, t, cond) = fill(DiT(CONFIG)), inputs()
    net(x, t, cond).square().sum().backward()
    for view in net.views:
        grad = view.look.proj_out.weight.grad.view(2, 5, -1)
        assert (grad.abs().amax(-1) > 0).all()


@pytest.mark.parametrize(
    ("exemplars", "config", "message"),
    [
        (None, CONFIG, r"takes up to 2 exemplars: Cond.exemplars has shape None"),
        (torch.zeros(2, 3, 4, 8, 8), CONFIG, r"takes up to 2 exemplars: .*\(2, 3, 4, 8, 8\)"),
        (torch.zeros(2, 2, 3, 8, 8), CONFIG, r"expected \(B, K, 4, S, S\)"),
        (torch.zeros(2, 2, 4, 8, 8), DiTConfig(**SHAPE), r"takes no exemplars"),
    ],
)
def test_other_exemplars_are_refused(exemplars, config, message):
    net, (x, t, cond) = DiT(config), inputs()
    with pytest.raises(ValueError, match=message):
        net(x, t, replace(cond, exemplars=exemplars))


@pytest.mark.parametrize("views", [(2,), (-1,), (1, 0), (1, 1)])
def test_other_blocks_are_refused(views):
    with pytest.raises(ValueError, match="expected rising numbers of blocks, 0 to 1"):
        DiTConfig(**SHAPE, views=views)


def test_exemplars_keep_their_precision():
    cond = Cond(context=torch.zeros(1, 2, 3), exemplars=torch.rand(1, 1, 4, 8, 8))
    moved = cond.to(dtype=torch.bfloat16)
    assert moved.context.dtype == torch.bfloat16 and torch.equal(moved.exemplars, cond.exemplars)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_views_on_cuda_are_those_of_the_cpu():
    net, (x, t, cond) = fill(DiT(CONFIG)), inputs()
    expected = net(x, t, cond)
    found = net.cuda()(x.cuda(), t.cuda(), cond.to("cuda")).cpu()
    assert torch.allclose(found, expected, atol=1e-3)
