"""The shapes of adapters of every kind, for a small UNet and text tower."""

from __future__ import annotations

from functools import cache

from torch import nn

from ldm.models.clip.towers import TextConfig
from ldm.models.unet_config import UNetConfig
from ldm.weights.adapters.places import Places
from ldm.weights.parts import build_network

WIDTH, CONTEXT = 32, 16
UNET = UNetConfig(channels=(WIDTH, 64), depth=(1, 0), blocks=1, heads=4, context_dim=CONTEXT)
TEXT = TextConfig(
    width=CONTEXT, layers=1, heads=2, vocab_size=99, context_length=8, embed_dim=None, bos_id=97, eot_id=98
)
BLOCK = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_"
KEYS, SQUARE, CONVOLUTION, NORM = (  # weights (32, 16), (32, 32), (32, 32, 3, 3) and (32,)
    f"{BLOCK}attn2_to_k",
    f"{BLOCK}attn1_to_q",
    "lora_unet_down_blocks_0_resnets_0_conv1",
    "lora_unet_down_blocks_0_resnets_0_norm1",
)
DOTTED = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"

Shapes = dict[str, tuple[int, ...]]


def at(stem: str, **leaves: tuple[int, ...]) -> Shapes:
    """Return the shapes of a module's tensors; two underscores in a name stand for a dot."""
    return {f"{stem}.{leaf.replace('__', '.')}": shape for leaf, shape in leaves.items()}


LORA = {"lora_down__weight": (4, CONTEXT), "lora_up__weight": (WIDTH, 4), "alpha": ()}
KINDS: dict[str, Shapes] = {
    "LoRA": at(KEYS, **LORA),
    "LoRA with a core": at(
        CONVOLUTION,
        lora_down__weight=(4, WIDTH, 1, 1),
        lora_up__weight=(WIDTH, 4, 1, 1),
        lora_mid__weight=(4, 4, 3, 3),
        alpha=(),
    ),
    "DoRA": at(KEYS, **LORA, dora_scale=(WIDTH, 1)),
    "LoHa": at(
        KEYS,
        hada_w1_a=(WIDTH, 4),
        hada_w1_b=(4, CONTEXT),
        hada_w2_a=(WIDTH, 4),
        hada_w2_b=(4, CONTEXT),
        alpha=(),
    ),
    "LoHa with cores": at(
        CONVOLUTION,
        hada_w1_a=(4, WIDTH),
        hada_w1_b=(4, WIDTH),
        hada_w2_a=(4, WIDTH),
        hada_w2_b=(4, WIDTH),
        hada_t1=(4, 4, 3, 3),
        hada_t2=(4, 4, 3, 3),
        alpha=(),
    ),
    "LoKr": at(KEYS, lokr_w1=(4, 4), lokr_w2_a=(8, 2), lokr_w2_b=(2, 4), alpha=()),
    "LoKr with a core": at(
        CONVOLUTION, lokr_w1=(4, 4), lokr_w2_a=(2, 8), lokr_w2_b=(2, 8), lokr_t2=(2, 2, 3, 3), alpha=()
    ),
    "GLoRA": at(
        SQUARE,
        a1__weight=(WIDTH, 4),
        a2__weight=(4, WIDTH),
        b1__weight=(WIDTH, 4),
        b2__weight=(4, WIDTH),
        alpha=(),
    ),
    "OFT": at(KEYS, oft_blocks=(4, 8, 8), alpha=(), rescale=(WIDTH, 1)),
    "BOFT": at(KEYS, oft_blocks=(2, 4, 8, 8), alpha=()),
    "(IA)³": at(KEYS, weight=(CONTEXT,), on_input=()),
    "full": at(KEYS, diff=(WIDTH, CONTEXT)) | at(CONVOLUTION, diff_b=(WIDTH,)),
    "norm": at(NORM, w_norm=(WIDTH,), b_norm=(WIDTH,)),
    "replacement": at(KEYS, set_weight=(WIDTH, CONTEXT)),
}
PEFT: dict[str, Shapes] = {  # by the kinds of peft, in its names
    "LORA": at(f"base_model.model.{DOTTED}", lora_A__weight=(4, CONTEXT), lora_B__weight=(WIDTH, 4)),
    "IA3": at(f"base_model.model.{DOTTED}", ia3_l=(WIDTH, 1)),
    "OFT": at(f"base_model.model.{DOTTED}", oft_R__weight=(2, 28)),
}
EMBEDDINGS: dict[str, Shapes] = {
    "kohya": {"emb_params": (2, CONTEXT)},
    "diffusers": {"<thing>": (CONTEXT,)},
    "A1111": {"string_to_param.*": (2, CONTEXT)},
    "bundled": {"bundle_emb.thing.string_to_param.*": (2, CONTEXT), **KINDS["LoRA"]},
}


@cache
def small_networks() -> dict[str, nn.Module]:
    """Return a UNet and a text tower on the meta device."""
    return {"unet": build_network(UNET), "text": build_network(TEXT)}


@cache
def small_places() -> dict[str, Places]:
    """Return their modules."""
    return {part: Places(part, network) for part, network in small_networks().items()}
