"""CLIP's towers equal those of open_clip and transformers with the same weights, small and at full size."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from clip_towers import FULL, TEXT, VISION, close, ids_for, randomize, scaled
from torch import Tensor, nn

from ldm.models.clip.pixels import prepare
from ldm.models.clip.towers import CLIP, CLIPConfig, TextConfig, TextTower, VisionConfig, VisionTower


def peer_clip(config: CLIPConfig) -> Any:
    """Return open_clip's model of the same shape."""
    open_clip = pytest.importorskip("open_clip")
    text, vision = config.text, config.vision
    return open_clip.CLIP(
        text.embed_dim,
        {
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "width": vision.width,
            "layers": vision.layers,
            "head_width": vision.width // vision.heads,
            "mlp_ratio": (vision.mlp_width or 4 * vision.width) / vision.width,
        },
        {
            "context_length": text.context_length,
            "vocab_size": text.vocab_size,
            "width": text.width,
            "heads": text.heads,
            "layers": text.layers,
        },
        quick_gelu=text.activation == "quick_gelu",
    ).eval()


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
@pytest.mark.parametrize("shape", ["plain", "wide heads", "odd patches"])
def test_small_models_equal_open_clip(activation, shape):
    text, vision = (
        replace(TEXT, vocab_size=300, activation=activation),
        replace(VISION, activation=activation),
    )
    if shape == "wide heads":
        text, vision = replace(text, heads=2), replace(vision, width=208, heads=2, mlp_width=1024)
    if shape == "odd patches":
        vision = replace(vision, image_size=35, patch_size=8)  # the last 3 rows and columns are in no patch
    config = CLIPConfig(text=text, vision=vision)
    model, peer = CLIP(config).eval(), peer_clip(config)
    randomize(model)
    peer.load_state_dict(model.state_dict())  # strict, so the names are equal
    ids, pixels = ids_for(text, (5, 9, 19, 1)), torch.rand(4, 3, vision.image_size, vision.image_size)
    x = model.visual.prepare(pixels)
    with torch.no_grad():
        close(model.encode_text(ids), peer.encode_text(ids))
        close(model.encode_image(pixels), peer.encode_image(x))
        inner = peer.forward_intermediates(
            x, ids, normalize_intermediates=False, image_output_extra_tokens=True
        )
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
    (
        peer.encode_text(ids, normalize=True)
        * peer.encode_image(model.visual.prepare(pixels), normalize=True)
    ).sum().backward()
    theirs = dict(peer.named_parameters())
    for name, parameter in model.named_parameters():
        if name != "logit_scale":
            assert parameter.grad is not None
            # sums that cancel are scaled above the absolute tolerance of `close`
            close(1e3 * parameter.grad, 1e3 * theirs[name].grad, tolerance=1e-3)


def test_small_models_equal_transformers():
    """Hidden states of several layers, and an end token that is not the largest id."""
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPTextConfig(
        vocab_size=310,
        max_position_embeddings=20,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        projection_dim=48,
        hidden_act="gelu",
        bos_token_id=298,
        eos_token_id=299,
        pad_token_id=0,
    )
    peer = transformers.CLIPTextModelWithProjection(config).eval()
    from ldm.weights.rules.clip import to_clip

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


@pytest.mark.parametrize(
    ("name", "count", "keys"),
    [
        ("ViT-L-14-quickgelu", 427_616_513, 446),
        ("ViT-H-14", 986_109_441, 686),
        ("ViT-bigG-14", 2_539_567_105, 974),
    ],
)
def test_published_sizes(name, count, keys):
    text, vision = FULL[name]
    with torch.device("meta"):
        model = CLIP(CLIPConfig(text=text, vision=vision))
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert len(model.state_dict()) == keys


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (TextConfig(embed_dim=None), 123_060_480),
        (TextConfig(), 123_650_304),
        (FULL["ViT-bigG-14"][0], 694_659_840),
        (replace(FULL["ViT-bigG-14"][0], embed_dim=None), 693_021_440),
        (replace(FULL["ViT-H-14"][0], layers=23, embed_dim=None), 340_387_840),
        (FULL["ViT-H-14"][0], 354_032_641 - 1),
        (VisionConfig(), 303_966_208),
        (FULL["ViT-H-14"][1], 632_076_800),
        (FULL["ViT-bigG-14"][1], 1_844_907_264),
    ],
)
def test_published_sizes_of_towers(config, count):
    """The published 354,032,641 of ViT-H's text part include logit_scale, which no tower has."""
    with torch.device("meta"):
        tower = TextTower(config) if isinstance(config, TextConfig) else VisionTower(config)
    assert sum(parameter.numel() for parameter in tower.parameters()) == count


def fill(module: nn.Module) -> dict[str, Tensor]:
    """Return random weights for a module on the meta device: slices of one pool of numbers, which is fast."""
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(1_000_003, generator=generator)
    state = {}
    for i, (name, shape) in enumerate((key, value.shape) for key, value in module.state_dict().items()):
        # scaling before repeating takes one pass over the memory
        values = scaled(name, shape, pool.roll(7919 * i))
        state[name] = values.repeat(-(-shape.numel() // len(pool)))[: shape.numel()].view(shape)
    return state


@pytest.fixture
def freed() -> Iterator[None]:
    """Free gigabytes of memory after the test."""
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
            width=config.width,
            heads=config.heads,
            layers=config.layers,
            output_dim=config.embed_dim,
            output_tokens=True,
            act_layer=transformer.QuickGELU if config.activation == "quick_gelu" else nn.GELU,
        ).eval()
    state = fill(tower)
    tower.load_state_dict(state, assign=True)
    peer.load_state_dict(state, assign=True)  # shares the memory
    peer.attn_mask = torch.full((77, 77), -torch.inf).triu(1)  # a buffer, which is still on the meta device
    inner: list[Tensor] = []
    peer.transformer.resblocks[-2].register_forward_hook(lambda module, args, out: inner.append(out))
    ids = ids_for(config, (11,))
    ids[:, 12:] = 0
    pooled, tokens = peer(ids)
    ours = tower(ids, layer=-2, final_norm=False)
    close(ours.tokens, inner[0])
    close(ours.pooled, pooled)
    if name == "ViT-L-14-quickgelu":  # published models read its last layer
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
            image_size=224,
            patch_size=14,
            width=config.width,
            layers=config.layers,
            heads=config.heads,
            output_dim=config.embed_dim,
            mlp_ratio=(config.mlp_width or 4 * config.width) / config.width,
            act_layer=transformer.QuickGELU if config.activation == "quick_gelu" else nn.GELU,
        ).eval()
    state = fill(tower)
    tower.load_state_dict(state, assign=True)
    peer.load_state_dict(state, assign=True)
    x = prepare(torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0)), 224)
    close(tower(x).pooled, peer(x))
