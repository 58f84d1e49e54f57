"""CLIP's towers: their invariants, then open_clip's and transformers' outputs on the same random weights, small and at full size."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.config import build, to_dict
from ldm.models.clip import CLIP, CLIPConfig, TextConfig, TextTower, VisionConfig, VisionTower
from ldm.models.clip_pixels import MEAN, STD, prepare

TEXT = TextConfig(vocab_size=310, context_length=20, width=64, layers=3, heads=4, embed_dim=48, activation="gelu", bos_id=298, eot_id=299)
VISION = VisionConfig(image_size=32, patch_size=8, width=96, layers=3, heads=3, mlp_width=288, embed_dim=48, activation="gelu")
FULL: dict[str, tuple[TextConfig, VisionConfig]] = {
    "ViT-L-14-quickgelu": (TextConfig(), VisionConfig()),
    "ViT-H-14": (
        TextConfig(width=1024, layers=24, heads=16, embed_dim=1024, activation="gelu"),
        VisionConfig(width=1280, layers=32, heads=16, embed_dim=1024, activation="gelu"),
    ),
    "ViT-bigG-14": (
        TextConfig(width=1280, layers=32, heads=20, embed_dim=1280, activation="gelu"),
        VisionConfig(width=1664, layers=48, heads=16, mlp_width=8192, embed_dim=1280, activation="gelu"),
    ),
}
# float32 sums in another order, through up to 48 layers: some roundings of 6e-8 a layer
CLOSE = 1e-5


def close(ours: Tensor, theirs: Tensor, tolerance: float = CLOSE) -> None:
    """The largest difference, in units of the peer's root mean square."""
    assert ours.shape == theirs.shape
    rms = theirs.double().square().mean().sqrt()
    assert rms > 1e-3  # else the comparison says nothing
    assert float((ours.double() - theirs.double()).abs().max() / rms) < tolerance


def scaled(name: str, shape: torch.Size, normal: Tensor) -> Tensor:
    """Standard normal numbers as weights that keep signals of order one; gains are about 1."""
    if len(shape) < 2 or "embedding" in name:
        return 0.2 * normal + (1 if "ln_" in name and name.endswith("weight") else 0)
    fan_in = shape[0] if name.endswith(("text_projection", "visual.proj")) or name == "proj" else shape[1:].numel()
    return normal * fan_in**-0.5


def randomize(module: nn.Module, seed: int = 0) -> None:
    """Fill with random weights, gains and biases included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(scaled(name, parameter.shape, torch.randn(parameter.shape, generator=generator)))


def ids_for(config: TextConfig, ends: tuple[int, ...], length: int | None = None, seed: int = 0) -> Tensor:
    """Random ids (B, L) whose end-of-text tokens first stand at ``ends``."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, config.bos_id, (len(ends), length or config.context_length), generator=generator)
    ids[:, 0] = config.bos_id
    ids[torch.arange(len(ends)), torch.tensor(ends)] = config.eot_id
    return ids


@pytest.fixture
def text() -> TextTower:
    tower = TextTower(TEXT).eval().requires_grad_(False)
    randomize(tower)
    return tower


@pytest.fixture
def clip() -> CLIP:
    model = CLIP(CLIPConfig(text=TEXT, vision=VISION)).eval().requires_grad_(False)
    randomize(model)
    return model


# Invariants


def test_states_depend_on_what_stands_before_alone(text):
    ids = ids_for(TEXT, (12, 12))
    ids[1, 13:] = torch.randint(0, 298, (7,))
    ids[1, 9] = (ids[0, 9] + 1) % 298
    ids[1, 10:13] = ids[0, 10:13]
    ids[1, :9] = ids[0, :9]
    out = text(ids)
    assert torch.equal(out.tokens[0, :9], out.tokens[1, :9])
    assert not torch.allclose(out.tokens[0, 9:13], out.tokens[1, 9:13], atol=1e-2)


def test_pooled_does_not_see_padding(text):
    ids = ids_for(TEXT, (7,))
    want = text(ids).pooled
    for pad in (0, TEXT.eot_id, 5):
        ids[:, 8:] = pad
        torch.testing.assert_close(text(ids).pooled, want, rtol=1e-5, atol=1e-6)  # float32 roundings
    torch.testing.assert_close(text(ids[:, :8]).pooled, want, rtol=1e-5, atol=1e-6)


def test_end_is_the_first_end_token_not_the_largest_id(text):
    ids = ids_for(TEXT, (5, 9))
    want = text(ids).pooled
    ids[:, 11] = TEXT.eot_id  # a second one
    ids[:, 12] = 309  # ids above it, as textual inversion adds
    torch.testing.assert_close(text(ids).pooled, want, rtol=1e-5, atol=1e-6)
    ids[0, 3] = 309
    changed = text(ids)
    at_end = changed.tokens[torch.arange(2), torch.tensor([5, 9])] @ text.text_projection
    torch.testing.assert_close(changed.pooled, at_end, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layer", [-1, -2, -3])
def test_layers_are_those_of_a_shallower_tower(text, layer):
    ids = ids_for(TEXT, (5, 19))
    shallow = TextTower(replace(TEXT, layers=TEXT.layers + 1 + layer)).eval()
    shallow.load_state_dict({key: value for key, value in text.state_dict().items() if key in shallow.state_dict()})
    with torch.no_grad():
        want = shallow(ids).tokens
    out = text(ids, layer=layer)
    assert torch.equal(out.tokens, want)
    assert torch.equal(out.pooled, text(ids).pooled)  # always the last layer's
    bare = text(ids, layer=layer, final_norm=False, pooled=False)
    assert bare.pooled is None
    assert torch.equal(text.ln_final(bare.tokens), want)


def test_mask_hides_tokens_from_the_others(text):
    ids, mask = ids_for(TEXT, (10,)), torch.ones(1, 20, dtype=torch.bool)
    assert torch.equal(text(ids, mask=mask).tokens, text(ids).tokens)
    mask[:, 4] = False
    other = ids.clone()
    other[:, 4] = (ids[:, 4] + 1) % 298
    seen = torch.arange(20) != 4
    assert torch.equal(text(ids, mask=mask).tokens[:, seen], text(other, mask=mask).tokens[:, seen])
    assert not torch.allclose(text(ids).tokens[:, 5:], text(other).tokens[:, 5:], atol=1e-2)


def test_patches_are_all_seen(clip):
    pixels = torch.full((1, 3, 32, 32), 0.5)
    base = clip.encode_image(pixels)
    for row in range(4):
        for column in range(4):
            other = pixels.clone()
            other[..., row * 8 : row * 8 + 8, column * 8 : column * 8 + 8] = 0.9
            assert (clip.encode_image(other) - base).abs().max() > 1e-3


def test_normalized_embeddings_have_length_one(clip):
    ids, pixels = ids_for(TEXT, (5, 9)), torch.rand(2, 3, 40, 36)
    for plain, unit in (
        (clip.encode_text(ids), clip.encode_text(ids, normalize=True)),
        (clip.encode_image(pixels), clip.encode_image(pixels, normalize=True)),
    ):
        torch.testing.assert_close(unit.norm(dim=-1), torch.ones(2))
        torch.testing.assert_close(unit * plain.norm(dim=-1, keepdim=True), plain)


def test_text_tower_is_the_models_own(clip):
    tower = clip.text_tower()
    assert type(tower) is TextTower and tower.config == TEXT
    own = dict(clip.named_parameters())
    assert all(own[name] is parameter for name, parameter in tower.named_parameters())
    assert torch.equal(tower(ids_for(TEXT, (5, 9))).pooled, clip.encode_text(ids_for(TEXT, (5, 9))))


def test_gradients_are_those_of_the_fused_attention(clip):
    """Attention is written out where gradients are wanted: outputs and gradients must be the fused kernel's."""
    ids, pixels = ids_for(TEXT, (5, 9)), torch.rand(2, 3, 32, 32)
    fused = clip.encode_text(ids), clip.encode_image(pixels)
    clip.requires_grad_(True)
    plain = clip.encode_text(ids), clip.encode_image(pixels)
    for a, b in zip(plain, fused, strict=True):
        close(a.detach(), b)
    (plain[0] * plain[1]).sum().backward()
    without = {name for name, parameter in clip.named_parameters() if parameter.grad is None or not parameter.grad.abs().any()}
    assert without == {"logit_scale"}


def test_a_new_model_starts_near_chance():
    torch.manual_seed(0)
    model = CLIP(CLIPConfig(text=TEXT, vision=VISION))
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    with torch.no_grad():
        image = model.encode_image(torch.rand(8, 3, 32, 32), normalize=True)
        words = model.encode_text(ids_for(TEXT, (5,) * 8), normalize=True)
        torch.testing.assert_close(model.logit_scale.exp(), torch.tensor(1 / 0.07))
    assert (image @ words.T).abs().max() < 0.7  # unrelated directions in 48 dimensions: standard deviation 0.14


def test_configurations_survive_yaml():
    config = CLIPConfig(text=TEXT, vision=VISION)
    assert build(CLIPConfig, to_dict(config)) == config


# Pixels


def test_constant_pictures_are_standardised_exactly():
    for shape in ((2, 3, 224, 224), (2, 3, 50, 90), (2, 3, 400, 230)):
        x = prepare(torch.full(shape, 0.25), 224)
        want = torch.tensor([(0.25 - m) / s for m, s in zip(MEAN, STD, strict=True)])
        torch.testing.assert_close(x, want[None, :, None, None].expand(2, 3, 224, 224), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(224, 224), (300, 521), (640, 301), (64, 64), (100, 225)])
def test_pixels_equal_open_clips_transform(size):
    transform = pytest.importorskip("open_clip.transform").image_transform(224, is_train=False)
    Image = pytest.importorskip("PIL.Image")
    small = torch.rand(1, 3, 9, 11, generator=torch.Generator().manual_seed(0))
    picture = (F.interpolate(small, size, mode="bicubic").clamp(0, 1) * 155 + 50).round().byte()[0]  # far from where PIL clamps in between
    theirs = transform(Image.fromarray(picture.permute(1, 2, 0).numpy()))
    ours = prepare(picture[None].float() / 255, 224)[0]
    levels = (ours - theirs) * torch.tensor(STD)[:, None, None] * 255
    assert levels.abs().max() <= 1.2  # PIL rounds to whole levels after each pass, and the second enlarges by up to 1.25: 0.5 · 1.25 + 0.5


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "uint8"),
        (torch.zeros(3, 32, 32), r"\(3, 32, 32\)"),
        (torch.zeros(1, 4, 32, 32), r"4, 32, 32"),
        (torch.full((1, 3, 32, 32), -1.0), r"\[0, 1\], got \[-1"),
        (torch.full((1, 3, 32, 32), 2.0), r"got \[2, 2\]"),
        (torch.full((1, 3, 32, 32), torch.nan), "nan"),
    ],
)
def test_wrong_pixels(clip, pixels, message):
    with pytest.raises(ValueError, match=message):
        clip.encode_image(pixels)


# Misuse


def test_wrong_ids(text):
    with pytest.raises(ValueError, match="21 tokens, expected at most 20"):
        text(ids_for(TEXT, (5,), length=21))
    ids = ids_for(TEXT, (5, 5))
    ids[1, 5] = 0
    with pytest.raises(ValueError, match=r"299 in rows \[1\]"):
        text(ids)
    for layer in (0, -4):
        with pytest.raises(ValueError, match=f"layer.*{layer}"):
            text(ids_for(TEXT, (5,)), layer=layer)


def test_wrong_image_size(clip):
    with pytest.raises(ValueError, match="32, 32.*40"):
        clip.visual(torch.zeros(1, 3, 40, 40))


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (TEXT, {"heads": 5}, "64.*5 heads"),
        (TEXT, {"layers": 0}, "layers"),
        (TEXT, {"eot_id": 310}, "eot_id.*310"),
        (TEXT, {"bos_id": -1}, "bos_id"),
        (TEXT, {"embed_dim": 0}, "embed_dim"),
        (VISION, {"patch_size": 64}, "patch_size 64"),
        (VISION, {"std": (0.1, 0.0, 0.1)}, "std"),
    ],
)
def test_impossible_configurations(config, change, message):
    with pytest.raises(ValueError, match=message):
        replace(config, **change)


def test_towers_must_share_a_space():
    with pytest.raises(ValueError, match="48 and vision 64"):
        CLIPConfig(text=TEXT, vision=replace(VISION, embed_dim=64))
    with pytest.raises(ValueError, match="embed_dim"):
        CLIPConfig(text=replace(TEXT, embed_dim=None), vision=replace(VISION, embed_dim=None))


# Against open_clip


def peer_clip(config: CLIPConfig) -> Any:
    """open_clip's model of the same shape."""
    open_clip = pytest.importorskip("open_clip")
    text, vision = config.text, config.vision
    return open_clip.CLIP(
        text.embed_dim,
        dict(image_size=vision.image_size, patch_size=vision.patch_size, width=vision.width, layers=vision.layers,
             head_width=vision.width // vision.heads, mlp_ratio=(vision.mlp_width or 4 * vision.width) / vision.width),
        dict(context_length=text.context_length, vocab_size=text.vocab_size, width=text.width, heads=text.heads, layers=text.layers),
        quick_gelu=text.activation == "quick_gelu",
    ).eval()  # fmt: skip


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
@pytest.mark.parametrize("shape", ["plain", "wide heads", "odd patches"])
def test_small_models_equal_open_clip(activation, shape):
    text, vision = replace(TEXT, vocab_size=300, activation=activation), replace(VISION, activation=activation)
    if shape == "wide heads":
        text, vision = replace(text, heads=2), replace(vision, width=208, heads=2, mlp_width=1024)
    if shape == "odd patches":
        vision = replace(vision, image_size=35, patch_size=8)  # the last 3 rows and columns are in no patch
    config = CLIPConfig(text=text, vision=vision)
    model, peer = CLIP(config).eval(), peer_clip(config)
    randomize(model)
    peer.load_state_dict(model.state_dict())  # strict: the names are equal
    ids, pixels = ids_for(text, (5, 9, 19, 1)), torch.rand(4, 3, vision.image_size, vision.image_size)
    x = model.visual.prepare(pixels)
    with torch.no_grad():
        close(model.encode_text(ids), peer.encode_text(ids))
        close(model.encode_image(pixels), peer.encode_image(x))
        inner = peer.forward_intermediates(x, ids, normalize_intermediates=False, image_output_extra_tokens=True)
        tower = model.text_tower()
        for layer in (-1, -2, -3):
            close(tower(ids, layer=layer, final_norm=False).tokens, inner["text_intermediates"][layer])
            close(model.visual(x, layer=layer).tokens[:, :1], inner["image_intermediates_prefix"][layer])


def test_gradients_equal_open_clip():
    config = CLIPConfig(text=replace(TEXT, vocab_size=300), vision=VISION)
    model, peer = CLIP(config), peer_clip(config)
    randomize(model)
    peer.load_state_dict(model.state_dict())
    ids, pixels = ids_for(config.text, (5, 9)), torch.rand(2, 3, 32, 32)
    (model.encode_text(ids, normalize=True) * model.encode_image(pixels, normalize=True)).sum().backward()
    (peer.encode_text(ids, normalize=True) * peer.encode_image(model.visual.prepare(pixels), normalize=True)).sum().backward()
    theirs = dict(peer.named_parameters())
    for name, parameter in model.named_parameters():
        if name != "logit_scale":
            assert parameter.grad is not None
            close(1e3 * parameter.grad, 1e3 * theirs[name].grad, tolerance=1e-3)  # sums that cancel, scaled above the floor of `close`


def test_small_models_equal_transformers():
    """Hidden states by number, and the end found by id with other ids above it."""
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPTextConfig(
        vocab_size=310, max_position_embeddings=20, hidden_size=64, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        projection_dim=48, hidden_act="gelu", bos_token_id=298, eos_token_id=299, pad_token_id=0,
    )  # fmt: skip
    peer = transformers.CLIPTextModelWithProjection(config).eval()
    from ldm.weights.clip_rules import to_clip

    tower = TextTower(TEXT).eval()
    randomize(peer)
    tower.load_state_dict(to_clip(tower, peer.state_dict(), source="peer"))
    ids = ids_for(TEXT, (5, 19, 3))
    ids[0, 2] = 305
    mask = torch.arange(20) <= torch.tensor([5, 19, 3])[:, None]
    with torch.no_grad():
        for m in (None, mask):
            theirs = peer(ids, attention_mask=None if m is None else m.long(), output_hidden_states=True)
            ours = tower(ids, mask=m)
            close(ours.pooled, theirs.text_embeds)
            close(ours.tokens, theirs.last_hidden_state)
            close(tower(ids, mask=m, layer=-2, final_norm=False).tokens, theirs.hidden_states[-2])


# At full size


@pytest.mark.parametrize(("name", "count", "keys"), [
    ("ViT-L-14-quickgelu", 427_616_513, 446), ("ViT-H-14", 986_109_441, 686), ("ViT-bigG-14", 2_539_567_105, 974),
])  # fmt: skip
def test_published_sizes(name, count, keys):
    text, vision = FULL[name]
    with torch.device("meta"):
        model = CLIP(CLIPConfig(text=text, vision=vision))
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert len(model.state_dict()) == keys


@pytest.mark.parametrize(("config", "count"), [
    (TextConfig(embed_dim=None), 123_060_480), (TextConfig(), 123_650_304), (FULL["ViT-bigG-14"][0], 694_659_840),
    (replace(FULL["ViT-bigG-14"][0], embed_dim=None), 693_021_440), (replace(FULL["ViT-H-14"][0], layers=23, embed_dim=None), 340_387_840),
    (FULL["ViT-H-14"][0], 354_032_641 - 1), (VisionConfig(), 303_966_208), (FULL["ViT-H-14"][1], 632_076_800),
    (FULL["ViT-bigG-14"][1], 1_844_907_264),
])  # fmt: skip
def test_published_sizes_of_towers(config, count):
    """Section 4's counts; its 354,032,641 for ViT-H's text part has logit_scale, which no tower holds."""
    with torch.device("meta"):
        tower = TextTower(config) if isinstance(config, TextConfig) else VisionTower(config)
    assert sum(parameter.numel() for parameter in tower.parameters()) == count


def fill(module: nn.Module) -> dict[str, Tensor]:
    """Random weights for a module on meta: slices of one pool of numbers at different places, which is quick at two thousand million."""
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(1_000_003, generator=generator)
    state = {}
    for i, (name, shape) in enumerate((key, value.shape) for key, value in module.state_dict().items()):
        values = scaled(name, shape, pool.roll(7919 * i))  # scaled before it is repeated: one pass over the memory
        state[name] = values.repeat(-(-shape.numel() // len(pool)))[: shape.numel()].view(shape)
    return state


@pytest.fixture
def freed() -> Iterator[None]:
    """Gigabytes go back before the next test takes as many."""
    yield
    gc.collect()


@pytest.mark.parametrize("name", FULL)
@torch.no_grad()
def test_text_towers_equal_open_clip_at_full_size(name, freed):
    transformer = pytest.importorskip("open_clip.transformer")
    config = FULL[name][0]
    with torch.device("meta"):
        tower = TextTower(config).eval()
        peer = transformer.TextTransformer(
            width=config.width, heads=config.heads, layers=config.layers, output_dim=config.embed_dim, output_tokens=True,
            act_layer=transformer.QuickGELU if config.activation == "quick_gelu" else nn.GELU,
        ).eval()  # fmt: skip
    state = fill(tower)
    tower.load_state_dict(state, assign=True)
    peer.load_state_dict(state, assign=True)  # the same memory
    peer.attn_mask = torch.full((77, 77), -torch.inf).triu(1)  # a buffer, left on meta
    inner: list[Tensor] = []
    peer.transformer.resblocks[-2].register_forward_hook(lambda module, args, out: inner.append(out))
    ids = ids_for(config, (11,))
    ids[:, 12:] = 0
    pooled, tokens = peer(ids)
    ours = tower(ids, layer=-2, final_norm=False)
    close(ours.tokens, inner[0])
    close(ours.pooled, pooled)
    if name == "ViT-L-14-quickgelu":  # the one whose last layer a published model reads
        close(tower(ids, pooled=False).tokens, tokens)


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
@torch.no_grad()
def test_vision_towers_equal_open_clip_at_full_size(name, freed):
    transformer = pytest.importorskip("open_clip.transformer")
    config = FULL[name][1]
    with torch.device("meta"):
        tower = VisionTower(config).eval()
        peer = transformer.VisionTransformer(
            image_size=224, patch_size=14, width=config.width, layers=config.layers, heads=config.heads, output_dim=config.embed_dim,
            mlp_ratio=(config.mlp_width or 4 * config.width) / config.width,
            act_layer=transformer.QuickGELU if config.activation == "quick_gelu" else nn.GELU,
        ).eval()  # fmt: skip
    state = fill(tower)
    tower.load_state_dict(state, assign=True)
    peer.load_state_dict(state, assign=True)
    x = prepare(torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0)), 224)
    close(tower(x).pooled, peer(x))


def test_copies_are_independent(clip):
    other = copy.deepcopy(clip)
    with torch.no_grad():
        other.ln_final.weight.zero_()
    assert clip.ln_final.weight.any()
