"""The diffusion prior: published counts and keys, parity of small networks, and invariants."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from diffusers import PriorTransformer
from shared_weights import TOLERANCE, VISIBLE, error, fill

from ldm.catalog.shapes import PRIORS
from ldm.diffusion.cond import Cond
from ldm.diffusion.constraints import clip_x0
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.guidance import cfg
from ldm.diffusion.noise import initial_noise, keyed_noise
from ldm.diffusion.schedule import NoiseSchedule
from ldm.models.unclip.prior import Prior, PriorConfig
from ldm.samplers import SAMPLERS
from ldm.weights.keymap import file_shapes, from_file, to_file
from ldm.weights.parts import build_network, randomise, shapes_of
from ldm.weights.rules.prior import prior_table, with_statistics

COUNTS = {
    "karlo": (1_022_028_544, 256),
    "kandinsky21": (1_022_028_544, 256),
    "kandinsky22": (1_026_225_920, None),
    "dalle2-laion": (249_416_704, 272),
    "dalle2-readme": (101_756_544, 140),
}
SMALL = PriorConfig(embed_dim=24, text_dim=20, length=7, width=32, layers=2, heads=4, head_dim=8)
COSINE = PriorConfig(
    embed_dim=48,
    text_dim=48,
    length=7,
    width=48,
    layers=2,
    heads=3,
    head_dim=40,
    blocks="cosine",
    timesteps=1000,
    normalize="unit",
)


def karlo_keys(c: PriorConfig) -> dict[str, tuple[int, ...]]:
    """Return the keys and shapes of Karlo's file."""
    w, e = c.width, c.embed_dim
    keys: dict[str, tuple[int, ...]] = {"positional_embedding": (1, c.length + 4, w), "prd_emb": (1, 1, w)}
    layers = {
        "time_embed.0": (w, w),
        "time_embed.2": (w, w),
        "text_enc_proj": (w, c.text_dim),
        "text_emb_proj": (w, e),
        "clip_img_proj": (w, e),
        "out_proj": (e, w),
        "final_ln": (w,),
    }
    for i in range(c.layers):
        at = f"transformer.resblocks.{i}"
        layers |= {
            f"{at}.attn.c_qkv": (3 * w, w),
            f"{at}.attn.c_proj": (w, w),
            f"{at}.ln_1": (w,),
            f"{at}.mlp.c_fc": (4 * w, w),
            f"{at}.mlp.c_proj": (w, 4 * w),
            f"{at}.ln_2": (w,),
        }
    for name, shape in layers.items():
        keys |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return keys


def dalle2_keys(c: PriorConfig) -> dict[str, tuple[int, ...]]:
    """Return the keys and shapes of DALLE2-pytorch's network."""
    d, h = c.width, c.heads
    keys = {
        "learned_query": (d,),
        "null_text_encodings": (1, c.length, d),
        "null_text_embeds": (1, 1, d),
        "null_image_embed": (1, d),
        "to_time_embeds.0.weight": (c.timesteps, d),
        "causal_transformer.rel_pos_bias.relative_attention_bias.weight": (32, h),
        "causal_transformer.norm.g": (d,),
        "causal_transformer.project_out.weight": (d, d),
    }
    for i in range(c.layers):
        at = f"causal_transformer.layers.{i}"
        keys |= {
            f"{at}.0.norm.g": (d,),
            f"{at}.0.null_kv": (2, c.head_dim),
            f"{at}.0.to_q.weight": (c.head_dim * h, d),
            f"{at}.0.to_kv.weight": (2 * c.head_dim, d),
            f"{at}.0.rotary_emb.freqs": (16,),
            f"{at}.0.to_out.0.weight": (d, c.head_dim * h),
            f"{at}.0.to_out.1.g": (d,),
            f"{at}.1.0.g": (d,),
            f"{at}.1.1.weight": (8 * d, d),
            f"{at}.1.5.weight": (d, 4 * d),
        }
        if c.norm_mlp:
            keys[f"{at}.1.3.g"] = (4 * d,)
    return keys


def test_every_shape_is_counted():
    assert PRIORS.keys() == COUNTS.keys()


@pytest.mark.parametrize("name", PRIORS)
def test_priors_have_the_published_parameters_and_keys(name):
    config, (parameters, keys) = PRIORS[name], COUNTS[name]
    network = build_network(config)
    # learned parameters only: rotary frequencies are in the file, but fixed; mean and standard deviation are
    # in a file of their own, except in diffusers' class, where they are parameters (kandinsky22)
    statistics = 2 * config.embed_dim if name == "kandinsky22" else 0
    assert sum(p.numel() for p in network.parameters() if p.requires_grad) + statistics == parameters
    original = file_shapes(prior_table(config), shapes_of(network))
    own = {key: shape for key, shape in original.items() if key not in ("clip_mean", "clip_std")}
    assert own == (dalle2_keys(config) if config.blocks == "cosine" else karlo_keys(config))
    assert keys is None or len(own) == keys


@pytest.mark.parametrize(("name", "embed"), [("karlo", 768), ("kandinsky22", 1280)])
def test_priors_have_the_keys_of_diffusers(name, embed):
    with torch.device("meta"):
        theirs = PriorTransformer(embedding_dim=embed)
    wanted = {key: tuple(tensor.shape) for key, tensor in theirs.state_dict().items()}
    assert (
        file_shapes(prior_table(PRIORS[name], "diffusers"), shapes_of(build_network(PRIORS[name]))) == wanted
    )


def condition(config: PriorConfig) -> Cond:
    g = torch.Generator().manual_seed(3)
    mask = torch.arange(config.length) < torch.tensor([[config.length], [3]])
    context = torch.randn(2, config.length, config.text_dim, generator=g)
    return Cond(context=context, context_mask=mask, pooled=torch.randn(2, config.embed_dim, generator=g))


def small_peer(config: PriorConfig) -> PriorTransformer:
    with torch.device("meta"):
        theirs = PriorTransformer(
            num_attention_heads=config.heads,
            attention_head_dim=config.head_dim,
            num_layers=config.layers,
            embedding_dim=config.embed_dim,
            num_embeddings=config.length,
        )
    theirs = fill(theirs)
    causal = torch.full((config.length + 4, config.length + 4), -10000.0).triu(1)[None]
    # `fill` allocates the buffer without setting it
    theirs.register_buffer("causal_attention_mask", causal, persistent=False)
    return theirs


def ours_of(theirs: PriorTransformer, config: PriorConfig, layout: str = "diffusers") -> Prior:
    ours = Prior(config)
    state = theirs.state_dict() if layout == "diffusers" else None
    ours.load_state_dict(from_file(prior_table(config, layout), state, shapes_of(ours), source="peer"))
    return ours.eval()


@torch.inference_mode()
def test_a_small_prior_equals_the_peers():
    config = replace(SMALL, text_dim=SMALL.embed_dim)  # the peer has one width for both
    theirs, cond = small_peer(config), condition(config)
    ours = ours_of(theirs, config)
    x, t = (
        torch.randn(2, config.embed_dim, generator=torch.Generator().manual_seed(1)),
        torch.tensor([1.0, 981.0]),
    )
    expected = theirs(x, t, cond.pooled, cond.context, cond.context_mask).predicted_image_embedding
    assert error(ours(x, t, cond), expected) < TOLERANCE
    for other in (
        replace(cond, pooled=cond.pooled.flip(0)),
        replace(cond, context=cond.context.flip(0)),
        replace(cond, context_mask=None),
    ):
        assert error(ours(x, t, other), expected) > VISIBLE
    assert torch.allclose(ours.denormalize(x), theirs.post_process_latents(x))
    # conversion to Karlo's layout, where q, k and v are interleaved by head, and back
    there = to_file(prior_table(config), ours.state_dict())
    again = Prior(config).eval()
    again.load_state_dict(from_file(prior_table(config), there, shapes_of(again), source="x"))
    assert torch.equal(again(x, t, cond), ours(x, t, cond))
    # with rows in the order (q|k|v, channel)
    again.load_state_dict(
        from_file(prior_table(replace(config, heads=1)), there, shapes_of(again), source="x")
    )
    assert error(again(x, t, cond), expected) > VISIBLE


def published_attention(state: dict[str, torch.Tensor], x: torch.Tensor, heads: int) -> torch.Tensor:
    """Return Karlo's attention: rows are (head, q|k|v, channel), and q and k are both scaled by d^(−1/4)."""
    qkv = x @ state["c_qkv.weight"].T + state["c_qkv.bias"]
    b, n, width = qkv.shape
    q, k, v = qkv.view(b, n, heads, -1).split(width // heads // 3, dim=-1)
    scale = q.shape[-1] ** -0.25
    scores = torch.einsum("bthc,bshc->bhts", q * scale, k * scale)
    scores = scores + torch.full((n, n), float("-inf")).triu(1)
    out = torch.einsum("bhts,bshc->bthc", scores.softmax(-1), v).reshape(b, n, -1)
    return out @ state["c_proj.weight"].T + state["c_proj.bias"]


@torch.inference_mode()
def test_karlos_interleaved_rows_are_read_as_its_attention_reads_them():
    ours = randomise(build_network(SMALL))
    there = to_file(prior_table(SMALL), ours.state_dict())
    state = {
        key.removeprefix("transformer.resblocks.1.attn."): value
        for key, value in there.items()
        if "resblocks.1.attn" in key
    }
    x = torch.randn(2, 9, SMALL.width, generator=torch.Generator().manual_seed(5))
    causal = torch.ones(9, 9, dtype=torch.bool).tril()[None]
    assert (
        error(ours.transformer.blocks[1].attn1(x, mask=causal), published_attention(state, x, SMALL.heads))
        < TOLERANCE
    )


@torch.inference_mode()
@pytest.mark.parametrize("cosine_sim", [True, False])
def test_cosine_blocks_equal_the_published_program(cosine_sim):
    module = pytest.importorskip("dalle2_pytorch.dalle2_pytorch", reason="the peer is not installed")
    net = module.DiffusionPriorNetwork(
        dim=48, num_timesteps=1000, max_text_len=7, depth=2, dim_head=40, heads=3, normformer=True
    )
    generator = torch.Generator().manual_seed(0)
    for name, p in net.named_parameters():
        if "freqs" not in name:
            p.uniform_(-1.0, 1.0, generator=generator).mul_(0.2 if p.ndim > 1 else 0.5).add_(
                1.0 if name.endswith(".g") else 0.0
            )
    for attention, _ in net.causal_transformer.layers:
        attention.cosine_sim, attention.scale = cosine_sim, 16 if cosine_sim else 40**-0.5
    config = replace(COSINE, cosine_sim=cosine_sim)
    ours = Prior(config).eval()
    ours.load_state_dict(from_file(prior_table(config), net.state_dict(), shapes_of(ours), source="peer"))
    cond, x, t = condition(config), torch.randn(2, 48, generator=generator), torch.tensor([3, 977])
    # the program detects padding by zeros
    zeroed = torch.where(cond.context_mask[..., None], cond.context, 0.0)
    expected = net.eval()(x, t, text_embed=cond.pooled, text_encodings=zeroed)
    assert error(ours(x, t.float(), cond), expected) < TOLERANCE
    other = Prior(replace(config, cosine_sim=not cosine_sim)).eval()
    other.load_state_dict(ours.state_dict())
    assert error(other(x, t.float(), cond), expected) > VISIBLE
    nothing = net(x, t, text_embed=cond.pooled, text_encodings=zeroed, text_cond_drop_prob=1.0)
    assert error(ours(x, t.float(), ours.unconditional(2)), nothing) < TOLERANCE


@pytest.mark.parametrize("config", [SMALL, COSINE], ids=["plain", "cosine"])
@torch.inference_mode()
def test_only_the_last_token_attends_to_everything(config):
    """The transformer is causal: a token does not change the outputs of earlier ones."""
    net = randomise(build_network(config))
    x = torch.randn(1, 9, config.width, generator=torch.Generator().manual_seed(0))
    changed = x.clone()
    changed[:, 5:] = -changed[:, 5:]  # not a shift, which the norms would remove
    a, b = net.transformer(x, None), net.transformer(changed, None)
    assert torch.allclose(a[:, :5], b[:, :5], atol=1e-5) and not torch.allclose(a[:, 5:], b[:, 5:], atol=1e-2)


@torch.inference_mode()
def test_padding_after_the_text_is_masked():
    net, cond = randomise(build_network(SMALL)), condition(SMALL)
    x, t = torch.randn(2, 24, generator=torch.Generator().manual_seed(0)), torch.tensor([500.0, 500.0])
    noisy = torch.where(cond.context_mask[..., None], cond.context, torch.full_like(cond.context, 9.0))
    assert torch.allclose(
        net(x, t, cond), net(x, t, replace(cond, context=noisy)), atol=1e-5
    )  # float32 rounding of two layers


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp_2m"])
@torch.inference_mode()
def test_the_samplers_work_on_vectors(sampler):
    """As in Karlo, guidance is on x0 and clamped; the x0 of the last step is the result."""
    net, cond = randomise(build_network(SMALL)), condition(SMALL)
    denoiser = Denoiser(net, NoiseSchedule.cosine(), "x0")
    fn = clip_x0(cfg(denoiser, cond, cond[[1, 0]], 4.0), denoiser.schedule, 0.5)
    grid = TimeGrid.make(denoiser.schedule, 5, spacing="linspace")
    seen = []
    x = SAMPLERS[sampler](
        fn,
        initial_noise([0, 1], (24,)),
        grid,
        noise=keyed_noise([0, 1]),
        on_step=lambda i, x, d: seen.append(d.x0),
    )
    assert x.shape == (2, 24) and torch.allclose(x, seen[-1], atol=1e-6)
    assert max(float(x0.abs().max()) for x0 in seen) <= 0.5 and float(seen[0].abs().max()) == 0.5


def test_denormalization_inverts_normalization():
    e = torch.randn(3, 24)
    net = Prior(SMALL)
    net.clip_mean, net.clip_std = torch.randn(1, 24), torch.rand(1, 24) + 0.5
    assert torch.allclose(net.denormalize(net.normalize(e)), e, atol=1e-6)
    unit = Prior(COSINE)
    e = torch.randn(3, 48)
    assert torch.allclose(unit.normalize(e).norm(dim=1), torch.full((3,), math.sqrt(48)))
    assert torch.allclose(unit.denormalize(unit.normalize(e)), e / e.norm(dim=1, keepdim=True), atol=1e-6)


def test_missing_or_exchanged_statistics_are_refused():
    mean, std = torch.randn(24), torch.rand(24) + 0.5
    assert with_statistics({}, (mean, std))["clip_std"].shape == (1, 24)
    with pytest.raises(ValueError, match="ViT-L-14_stats.th"):
        with_statistics({}, None)
    with pytest.raises(ValueError, match="exchanged"):
        with_statistics({}, (std, mean))
    state = to_file(prior_table(SMALL), randomise(build_network(SMALL)).state_dict())
    without = {key: value for key, value in state.items() if key not in ("clip_mean", "clip_std")}
    with pytest.raises(ValueError, match="clip_mean"):  # a folder without statistics
        from_file(prior_table(SMALL), without, shapes_of(build_network(SMALL)), source="x")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks": "gpt"}, "blocks"),
        ({"normalize": "none"}, "normalize"),
        ({"heads": 0}, "heads: expected at least 1"),
        ({"blocks": "cosine"}, "expected one width"),
    ],
)
def test_invalid_configurations_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)


def test_conditions_that_do_not_fit_are_named():
    net, cond, t = Prior(SMALL), condition(SMALL), torch.zeros(2)
    with pytest.raises(ValueError, match=r"embeddings 24 wide, got x_t of shape \(2, 25\)"):
        net(torch.zeros(2, 25), t, cond)
    with pytest.raises(ValueError, match=r"Cond.pooled of shape \(B, 24\), got None"):
        net(torch.zeros(2, 24), t, replace(cond, pooled=None))
    with pytest.raises(ValueError, match=r"Cond.context of shape \(B, 7, 20\)"):
        net(torch.zeros(2, 24), t, Cond(context=torch.zeros(2, 7, 21), pooled=cond.pooled))
