"""Keys and shapes of the original (CompVis) layout, derived independently of ldm's key maps.

They are built in the order in which CompVis' constructors register their modules.
"""

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
        prefix,
        affine("in_layers.0", c),
        affine("in_layers.2", out, c, 3, 3),
        affine("emb_layers.1", out * (1 + scale_shift), emb),
        affine("out_layers.0", out),
        affine("out_layers.3", out, out, 3, 3),
        affine("skip_connection", out, c, 1, 1) if c != out else {},
    )


def attention_block(prefix: str, c: int, context: int | None = None) -> Shapes:
    extra = affine("encoder_kv", 2 * c, context, 1) if context else {}
    return prefixed(prefix, affine("norm", c), affine("qkv", 3 * c, c, 1), affine("proj_out", c, c, 1), extra)


def transformer(
    prefix: str, c: int, depth: int, context: int, linear: bool, cross_only: bool = False
) -> Shapes:
    def attention(name: str, keys: int) -> Shapes:
        inner = {f"{name}.to_{x}.weight": (c, c if x == "q" else keys) for x in "qkv"}
        return inner | affine(f"{name}.to_out.0", c, c)

    ones = () if linear else (1, 1)
    blocks = [
        prefixed(
            f"transformer_blocks.{d}.",
            attention("attn1", context if cross_only else c),
            attention("attn2", context),
            *(affine(f"norm{i}", c) for i in (1, 2, 3)),
            affine("ff.net.0.proj", 8 * c, c),
            affine("ff.net.2", c, 4 * c),
        )
        for d in range(depth)
    ]
    return prefixed(
        prefix, affine("norm", c), affine("proj_in", c, c, *ones), *blocks, affine("proj_out", c, c, *ones)
    )


@dataclass(frozen=True, kw_only=True)
class UNetSpec:
    ch: int
    mult: Sequence[int]
    attend: Sequence[int]  # downsampling factors with attention
    context: int | None = None  # width of the context; None for AttentionBlocks
    depth: Sequence[int] | int = 1  # number of transformer blocks, per level or for all
    n: int = 2
    io: tuple[int, int] = (4, 4)
    linear: bool = False
    scale_shift: bool = False
    updown: bool = False
    adm: int | None = None
    classes: int | None = None
    cross_only: Sequence[bool] = ()
    kv: int | None = None  # width of the context in AttentionBlocks (Karlo)
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
    keys = (
        affine("time_embed.0", emb, ch)
        | affine("time_embed.2", emb, emb)
        | affine("input_blocks.0.0", ch, spec.io[0], 3, 3)
    )
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
            keys |= (
                spec.res(f"input_blocks.{i}.0.", ch, ch)
                if spec.updown
                else affine(f"input_blocks.{i}.0.op", ch, ch, 3, 3)
            )
            skips.append(ch)
    middle = spec.attention("middle_block.1.", ch, len(spec.mult) - 1, middle=True) if spec.mid else {}
    keys |= (
        spec.res("middle_block.0.", ch, ch)
        | middle
        | spec.res(f"middle_block.{2 if spec.mid else 1}.", ch, ch)
    )
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
    attend: Sequence[int] = ()  # sizes of the feature maps with attention, for an image of 256×256
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
        return (
            vae_block(f"{prefix}.block_1.", top, top) | attention | vae_block(f"{prefix}.block_2.", top, top)
        )

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


def bert(
    *, layers: int = 32, width: int = 1280, inner: int = 512, vocabulary: int = 30522, length: int = 77
) -> Shapes:
    keys: Shapes = {"token_emb.weight": (vocabulary, width), "pos_emb.emb.weight": (length, width)}
    for i in range(layers):
        at, ff = f"attn_layers.layers.{2 * i}", f"attn_layers.layers.{2 * i + 1}"
        keys |= (
            {f"{at}.1.to_{x}.weight": (inner, width) for x in "qkv"}
            | affine(f"{at}.1.to_out", width, inner)
            | affine(f"{at}.0", width)
        )
        keys |= (
            affine(f"{ff}.0", width)
            | affine(f"{ff}.1.net.0.0", 4 * width, width)
            | affine(f"{ff}.1.net.2", width, 4 * width)
        )
    return keys | affine("norm", width) | affine("to_logits", vocabulary, width)


SD = {"ch": 320, "mult": (1, 2, 4, 4), "attend": (1, 2, 4)}
XL = {
    "ch": 320,
    "mult": (1, 2, 4),
    "attend": (2, 4),
    "context": 2048,
    "depth": (0, 2, 10),
    "linear": True,
    "adm": 2816,
}

# name: (specification, number of parameters, number of keys (None: not published), options of the attention
# heads, kind of the diffusers network)
UNETS: dict[str, tuple[UNetSpec, int | None, int | None, dict[str, int], str]] = {
    "sd1": (UNetSpec(**SD, context=768), 859_520_964, 686, {}, "cond"),
    "sd1-inpaint": (UNetSpec(**SD, context=768, io=(9, 4)), 859_535_364, 686, {}, "cond"),
    "instruct-pix2pix": (UNetSpec(**SD, context=768, io=(8, 4)), 859_532_484, 686, {}, "cond"),
    "sd2": (UNetSpec(**SD, context=1024, linear=True), 865_910_724, 686, {}, "cond"),
    "sd2-inpaint": (UNetSpec(**SD, context=1024, linear=True, io=(9, 4)), 865_925_124, 686, {}, "cond"),
    "sd2-depth": (UNetSpec(**SD, context=1024, linear=True, io=(5, 4)), 865_913_604, 686, {}, "cond"),
    "unclip-h": (UNetSpec(**SD, context=1024, linear=True, adm=2048), 870_173_124, 690, {}, "unclip"),
    "unclip-l": (UNetSpec(**SD, context=1024, linear=True, adm=1536), 869_517_764, 690, {}, "unclip"),
    "x4": (
        UNetSpec(
            ch=256,
            mult=(1, 2, 2, 4),
            attend=(2, 4, 8),
            context=1024,
            linear=True,
            io=(7, 4),
            classes=1000,
            cross_only=(True, True, True, False),
        ),
        473_398_020,
        687,
        {},
        "cond",
    ),
    "sdxl": (UNetSpec(**XL), 2_567_463_684, 1680, {}, "xl"),
    "sdxl-inpaint": (UNetSpec(**XL, io=(9, 4)), 2_567_478_084, 1680, {}, "xl"),
    "sdxl-refiner": (
        UNetSpec(ch=384, mult=(1, 2, 4, 4), attend=(2, 4), context=1280, depth=4, linear=True, adm=2560),
        2_259_526_660,
        1220,
        {},
        "xl",
    ),
    "text2img-large": (UNetSpec(**SD, context=1280), 872_300_484, 686, {}, "cond"),
    "text2img256": (
        UNetSpec(ch=192, mult=(1, 2, 3, 5), attend=(2, 4, 8), context=640, io=(3, 3)),
        403_623_939,
        None,
        {},
        "cond",
    ),
    "cin256": (
        UNetSpec(ch=256, mult=(1, 2, 4), attend=(1, 2, 4), context=512),
        394_984_196,
        None,
        {},
        "cond",
    ),
    "cin256-v2": (
        UNetSpec(ch=192, mult=(1, 2, 3, 5), attend=(2, 4, 8), context=512, io=(3, 3)),
        400_920_579,
        None,
        {},
        "cond",
    ),
    "layout2img": (
        UNetSpec(ch=128, mult=(1, 2, 3, 4), attend=(2, 4, 8), context=512, depth=3, io=(3, 3)),
        246_277_379,
        None,
        {},
        "cond",
    ),
    "rdm": (
        UNetSpec(ch=448, mult=(1, 2, 3, 4), attend=(1, 2, 4), context=768, io=(16, 16)),
        1_335_480_400,
        None,
        {},
        "cond",
    ),
    "celebahq": (
        UNetSpec(ch=224, mult=(1, 2, 3, 4), attend=(2, 4, 8), io=(3, 3)),
        274_056_163,
        368,
        {"head_dim": 32},
        "plain",
    ),
    "bsr_sr": (
        UNetSpec(ch=160, mult=(1, 2, 2, 4), attend=(8, 16), io=(6, 3)),
        113_622_563,
        306,
        {"head_dim": 32},
        "plain",
    ),
    "semantic": (
        UNetSpec(ch=128, mult=(1, 4, 8), attend=(8, 16, 32), io=(6, 3)),
        215_229_315,
        None,
        {"heads": 8},
        "plain",
    ),
    "lsun_churches": (
        UNetSpec(ch=192, mult=(1, 2, 2, 4, 4), attend=(1, 2, 4, 8), scale_shift=True, updown=True),
        294_966_916,
        520,
        {"heads": 8},
        "plain",
    ),
    "inpainting_big": (
        UNetSpec(ch=256, mult=(1, 2, 3, 4), attend=(2, 4, 8), updown=True, io=(7, 3)),
        387_245_827,
        416,
        {"heads": 8},
        "plain",
    ),
    "karlo-decoder": (
        UNetSpec(
            ch=320,
            mult=(1, 2, 3, 4),
            attend=(2, 4, 8),
            n=3,
            io=(3, 6),
            kv=1536,
            scale_shift=True,
            updown=True,
        ),
        885_439_686,
        None,
        {"head_dim": 64},
        "karlo",
    ),
    "karlo-sr": (
        UNetSpec(ch=320, mult=(1, 2, 3, 4), attend=(), n=3, io=(6, 3), updown=True, mid=False),
        691_579_523,
        408,
        {},
        "plain",
    ),
}
VAES: dict[str, tuple[VAESpec, int, int]] = {
    "kl-f4": (VAESpec(mult=(1, 2, 4), z=3), 55_312_063, 204),
    "kl-f8": (VAESpec(mult=(1, 2, 4, 4)), 83_653_863, 248),
    "kl-f16": (VAESpec(mult=(1, 1, 2, 2, 4), attend=(16,), z=16), 69_610_963, 342),
    "kl-f32": (VAESpec(mult=(1, 1, 2, 2, 4, 4), attend=(16, 8), z=64), 103_880_131, 436),
    "x4": (VAESpec(mult=(1, 2, 4), z=4), 55_325_927, 204),
    "vq-f4": (VAESpec(mult=(1, 2, 4), z=3, codes=8192), 55_322_782, 205),
    "vq-f4-noattn": (VAESpec(mult=(1, 2, 4), z=3, codes=8192, mid=False), 53_219_486, 185),
    "vq-f8": (VAESpec(mult=(1, 2, 2, 4), attend=(32,), z=4, codes=16384), 67_717_295, 299),
    "vq-f8-n256": (VAESpec(mult=(1, 2, 2, 4), attend=(32,), z=4, codes=256), 67_652_783, 299),
    "vq-f16": (VAESpec(mult=(1, 1, 2, 2, 4), attend=(16,), z=8, codes=16384), 69_593_371, 343),
    "vqgan-imagenet-f16-16384": (
        VAESpec(mult=(1, 1, 2, 2, 4), attend=(16,), z=256, codes=16384),
        76_073_859,
        343,
    ),
}
