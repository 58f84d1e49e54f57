"""CLIP's towers: invariants, preparation of pixels, and errors."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from clip_towers import TEXT, VISION, close, ids_for, randomize

from ldm.models.clip.pixels import MEAN, STD, prepare
from ldm.models.clip.towers import CLIP, CLIPConfig, TextTower
from ldm.support.config import build, to_dict


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


def test_states_depend_only_on_earlier_tokens(text):
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
        torch.testing.assert_close(text(ids).pooled, want, rtol=1e-5, atol=1e-6)  # float32 rounding
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
    shallow.load_state_dict(
        {key: value for key, value in text.state_dict().items() if key in shallow.state_dict()}
    )
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


def test_every_patch_changes_the_embedding(clip):
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
    """With gradients attention is computed without the fused kernel, which must not change the outputs."""
    ids, pixels = ids_for(TEXT, (5, 9)), torch.rand(2, 3, 32, 32)
    fused = clip.encode_text(ids), clip.encode_image(pixels)
    clip.requires_grad_(True)
    plain = clip.encode_text(ids), clip.encode_image(pixels)
    for a, b in zip(plain, fused, strict=True):
        close(a.detach(), b)
    (plain[0] * plain[1]).sum().backward()
    without = {
        name
        for name, parameter in clip.named_parameters()
        if parameter.grad is None or not parameter.grad.abs().any()
    }
    assert without == {"logit_scale"}


def test_a_new_model_starts_near_chance():
    torch.manual_seed(0)
    model = CLIP(CLIPConfig(text=TEXT, vision=VISION))
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    with torch.no_grad():
        image = model.encode_image(torch.rand(8, 3, 32, 32), normalize=True)
        words = model.encode_text(ids_for(TEXT, (5,) * 8), normalize=True)
        torch.testing.assert_close(model.logit_scale.exp(), torch.tensor(1 / 0.07))
    assert (
        image @ words.T
    ).abs().max() < 0.7  # unrelated directions in 48 dimensions: standard deviation 0.14


def test_configurations_survive_yaml():
    config = CLIPConfig(text=TEXT, vision=VISION)
    assert build(CLIPConfig, to_dict(config)) == config


def test_copies_are_independent(clip):
    other = copy.deepcopy(clip)
    with torch.no_grad():
        other.ln_final.weight.zero_()
    assert clip.ln_final.weight.any()


# Pixels


def test_constant_images_are_standardized_exactly():
    for shape in ((2, 3, 224, 224), (2, 3, 50, 90), (2, 3, 400, 230)):
        x = prepare(torch.full(shape, 0.25), 224)
        want = torch.tensor([(0.25 - m) / s for m, s in zip(MEAN, STD, strict=True)])
        torch.testing.assert_close(x, want[None, :, None, None].expand(2, 3, 224, 224), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(224, 224), (300, 521), (640, 301), (64, 64), (100, 225)])
def test_pixels_equal_open_clips_transform(size):
    transform = pytest.importorskip("open_clip.transform").image_transform(224, is_train=False)
    Image = pytest.importorskip("PIL.Image")
    small = torch.rand(1, 3, 9, 11, generator=torch.Generator().manual_seed(0))
    # values far from those that PIL clamps between its passes
    image_u8 = (F.interpolate(small, size, mode="bicubic").clamp(0, 1) * 155 + 50).round().byte()[0]
    theirs = transform(Image.fromarray(image_u8.permute(1, 2, 0).numpy()))
    ours = prepare(image_u8[None].float() / 255, 224)[0]
    levels = (ours - theirs) * torch.tensor(STD)[:, None, None] * 255
    assert (
        levels.abs().max() <= 1.2
    )  # PIL rounds after each pass, and the second amplifies by up to 1.25: 0.5 · 1.25 + 0.5


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


# Errors


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
