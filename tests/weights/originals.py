"""The original layout's keys and shapes, written down a second time: built forwards, as CompVis' constructors register their modules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Shapes = dict[str, tuple[int, ...]]


def affine(name: str, *shape: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": shape} | ({f"{name}.bias": shape[:1]} if bias else {})


def prefixed(prefix: str, *parts: Shapes) -> Shapes:
    return {f"{prefix}{name}": shape for part in parts for name, shape in part.items()}


def resblock(prefix: str, c: int, out: int, emb: int, scale_shift: bool = False) -> Shapes:
    return prefixed(
        prefix, affine("in_layers.0", c), affine("in_layers.2", out, c, 3, 3), affine("emb_layers.1", out * (1 + scale_shift), emb),
        affine("out_layers.0", out), affine("out_layers.3", out, out, 3, 3), affine("skip_connection", out, c, 1, 1) if c != out else {},
    )  # fmt: skip


def attention_block(prefix: str, c: int, context: int | None = None) -> Shapes:
    extra = affine("encoder_kv", 2 * c, context, 1) if context else {}
    return prefixed(prefix, affine("norm", c), affine("qkv", 3 * c, c, 1), affine("proj_out", c, c, 1), extra)


def transformer(prefix: str, c: int, depth: int, context: int, linear: bool, cross_only: bool = False) -> Shapes:
    def attention(name: str, keys: int) -> Shapes:
        inner = {f"{name}.to_{x}.weight": (c, c if x == "q" else keys) for x in "qkv"}
        return inner | affine(f"{name}.to_out.0", c, c)

    ones = () if linear else (1, 1)
    blocks = [
        prefixed(
            f"transformer_blocks.{d}.", attention("attn1", context if cross_only else c), attention("attn2", context),
            *(affine(f"norm{i}", c) for i in (1, 2, 3)), affine("ff.net.0.proj", 8 * c, c), affine("ff.net.2", c, 4 * c),
        )
        for d in range(depth)
    ]  # fmt: skip
    return prefixed(prefix, affine("norm", c), affine("proj_in", c, c, *ones), *blocks, affine("proj_out", c, c, *ones))


@dataclass(frozen=True, kw_only=True)
class UNetSpec:
    ch: int
    mult: Sequence[int]
    attend: Sequence[int]  # down-sampling factors
    context: int | None = None  # None: AttentionBlocks
    depth: Sequence[int] | int = 1  # by level
    n: int = 2
    io: tuple[int, int] = (4, 4)
    linear: bool = False
    scale_shift: bool = False
    updown: bool = False
    adm: int | None = None
    classes: int | None = None
    cross_only: Sequence[bool] = ()
    kv: int | None = None  # width of the context of AttentionBlocks (Karlo)
    mid: bool = True

    def attention(self, prefix: str, c: int, level: int, middle: bool = False) -> Shapes:
        if self.context is None:
            return attention_block(prefix, c, self.kv)
        depth = self.depth if isinstance(self.depth, int) else self.depth[level]
        only = bool(self.cross_only) and not middle and self.cross_only[level]
        return transformer(prefix, c, depth, self.context, self.linear, only)

    def res(self, prefix: str, c: int, out: int) -> Shapes:
        return resblock(prefix, c, out, 4 * self.ch, self.scale_shift)


def unet(spec: UNetSpec) -> Shapes:
    emb, ch, ds, i = 4 * spec.ch, spec.ch, 1, 0
    keys = affine("time_embed.0", emb, ch) | affine("time_embed.2", emb, emb) | affine("input_blocks.0.0", ch, spec.io[0], 3, 3)
    if spec.adm:
        keys |= affine("label_emb.0.0", emb, spec.adm) | affine("label_emb.0.2", emb, emb)
    if spec.classes:
        keys |= {"label_emb.weight": (spec.classes, emb)}
    skips = [ch]
    for level, mult in enumerate(spec.mult):
        for _ in range(spec.n):
            i += 1
            keys |= spec.res(f"input_blocks.{i}.0.", ch, mult * spec.ch)
            ch = mult * spec.ch
            if ds in spec.attend:
                keys |= spec.attention(f"input_blocks.{i}.1.", ch, level)
            skips.append(ch)
        if level < len(spec.mult) - 1:
            i, ds = i + 1, ds * 2
            keys |= spec.res(f"input_blocks.{i}.0.", ch, ch) if spec.updown else affine(f"input_blocks.{i}.0.op", ch, ch, 3, 3)
            skips.append(ch)
    middle = spec.attention("middle_block.1.", ch, len(spec.mult) - 1, middle=True) if spec.mid else {}
    keys |= spec.res("middle_block.0.", ch, ch) | middle | spec.res(f"middle_block.{2 if spec.mid else 1}.", ch, ch)
    i = -1
    for level, mult in reversed(list(enumerate(spec.mult))):
        for j in range(spec.n + 1):
            i, slot = i + 1, 1
            keys |= spec.res(f"output_blocks.{i}.0.", ch + skips.pop(), mult * spec.ch)
            ch = mult * spec.ch
            if ds in spec.attend:
                keys |= spec.attention(f"output_blocks.{i}.1.", ch, level)
                slot = 2
            if level and j == spec.n:
                ds //= 2
                name = f"output_blocks.{i}.{slot}."
                keys |= spec.res(name, ch, ch) if spec.updown else affine(f"{name}conv", ch, ch, 3, 3)
    return keys | affine("out.0", ch) | affine("out.2", spec.io[1], ch, 3, 3)


@dataclass(frozen=True, kw_only=True)
class VAESpec:
    mult: Sequence[int]
    attend: Sequence[int] = ()  # sizes of the feature map for a picture of 256
    z: int = 4
    codes: int | None = None
    mid: bool = True
    ch: int = 128


def vae_block(prefix: str, c: int, out: int) -> Shapes:
    shortcut = affine("nin_shortcut", out, c, 1, 1) if c != out else {}
    convs = affine("conv1", out, c, 3, 3) | affine("conv2", out, out, 3, 3)
    return prefixed(prefix, affine("norm1", c), affine("norm2", out), convs, shortcut)


def vae_attention(prefix: str, c: int) -> Shapes:
    return prefixed(prefix, affine("norm", c), *(affine(x, c, c, 1, 1) for x in ("q", "k", "v", "proj_out")))


def vae(spec: VAESpec) -> Shapes:
    z, last, top = spec.z, len(spec.mult) - 1, spec.mult[-1] * spec.ch
    moments = z if spec.codes else 2 * z

    def mid(prefix: str) -> Shapes:
        attention = vae_attention(f"{prefix}.attn_1.", top) if spec.mid else {}
        return vae_block(f"{prefix}.block_1.", top, top) | attention | vae_block(f"{prefix}.block_2.", top, top)

    keys = affine("encoder.conv_in", spec.ch, 3, 3, 3)
    c = spec.ch
    for i, mult in enumerate(spec.mult):
        for j in range(2):
            keys |= vae_block(f"encoder.down.{i}.block.{j}.", c, mult * spec.ch)
            c = mult * spec.ch
            if 256 >> i in spec.attend:
                keys |= vae_attention(f"encoder.down.{i}.attn.{j}.", c)
        if i < last:
            keys |= affine(f"encoder.down.{i}.downsample.conv", c, c, 3, 3)
    keys |= mid("encoder.mid") | affine("encoder.norm_out", c) | affine("encoder.conv_out", moments, c, 3, 3)
    keys |= affine("decoder.conv_in", c, z, 3, 3) | mid("decoder.mid")
    for i, mult in reversed(list(enumerate(spec.mult))):
        for j in range(3):
            keys |= vae_block(f"decoder.up.{i}.block.{j}.", c, mult * spec.ch)
            c = mult * spec.ch
            if 256 >> i in spec.attend:
                keys |= vae_attention(f"decoder.up.{i}.attn.{j}.", c)
        if i > 0:
            keys |= affine(f"decoder.up.{i}.upsample.conv", c, c, 3, 3)
    keys |= affine("decoder.norm_out", c) | affine("decoder.conv_out", 3, c, 3, 3)
    keys |= affine("quant_conv", moments, moments, 1, 1) | affine("post_quant_conv", z, z, 1, 1)
    return keys | ({"quantize.embedding.weight": (spec.codes, z)} if spec.codes else {})


def bert(*, layers: int = 32, width: int = 1280, inner: int = 512, vocabulary: int = 30522, length: int = 77) -> Shapes:
    keys: Shapes = {"token_emb.weight": (vocabulary, width), "pos_emb.emb.weight": (length, width)}
    for i in range(layers):
        at, ff = f"attn_layers.layers.{2 * i}", f"attn_layers.layers.{2 * i + 1}"
        keys |= {f"{at}.1.to_{x}.weight": (inner, width) for x in "qkv"} | affine(f"{at}.1.to_out", width, inner) | affine(f"{at}.0", width)
        keys |= affine(f"{ff}.0", width) | affine(f"{ff}.1.net.0.0", 4 * width, width) | affine(f"{ff}.1.net.2", width, 4 * width)
    return keys | affine("norm", width) | affine("to_logits", vocabulary, width)
