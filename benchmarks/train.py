"""Measure a training step of a UNet of 13 million parameters against the same architecture in diffusers.

    python benchmarks/train.py --json train.json
    python benchmarks/train.py --profile  # the operators that take the time on each side

The step is that of `ldm.training` on both sides: autocast to bfloat16 if the processor supports it, forward,
backward, clipping, AdamW. ldm's network is prepared by `for_training`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from common import bar_here, measure, parser, report

from ldm.diffusion.cond import Cond
from ldm.models.unet import UNet, UNetConfig
from ldm.speed.optimization import for_training
from ldm.support.device import fast_dtype
from ldm.training.run import read_training_config

CONFIGS = Path(__file__).parents[1] / "configs"


def peer(c: UNetConfig) -> Any:
    """Return the same architecture built from diffusers' parts."""
    from diffusers import UNet2DConditionModel
    from diffusers.models.unets.unet_2d_blocks import UNetMidBlock2D

    down = tuple("CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in c.depth)
    heads = [c.split(level)[0] if c.depth[level] else 1 for level in range(len(c.channels))]
    net = UNet2DConditionModel(
        in_channels=c.in_channels,
        out_channels=c.out_channels,
        block_out_channels=c.channels,
        down_block_types=down,
        up_block_types=tuple(name.replace("Down", "Up") for name in reversed(down)),
        layers_per_block=c.blocks,
        cross_attention_dim=c.context_dim,
        attention_head_dim=heads,
        transformer_layers_per_block=[max(depth, 1) for depth in c.depth],
        use_linear_projection=c.linear_projection,
        resnet_time_scale_shift="scale_shift" if c.scale_shift else "default",
        mid_block_type="UNetMidBlock2D",
        class_embed_type="projection",
        projection_class_embeddings_input_dim=c.pooled_dim,
    )
    assert not c.mid_depth  # UNet2DConditionModel gives such a middle one residual block, ldm two
    net.mid_block = UNetMidBlock2D(
        c.channels[-1],
        4 * c.channels[0],
        num_layers=1,
        add_attention=False,
        resnet_eps=1e-5,
        resnet_time_scale_shift="scale_shift" if c.scale_shift else "default",
    )
    return net


def step(net: torch.nn.Module, predict: Any, target: torch.Tensor, dtype: torch.dtype) -> Any:
    """Return one training step as a function."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)

    def run() -> None:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = (predict().float() - target).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def profile(run: Any, steps: int = 5, most: int = 12) -> None:
    """Print the operators that take most of a step's time."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as recorded

    with recorded(activities=[ProfilerActivity.CPU]) as record:
        for _ in range(steps):
            run()
    rows = sorted(record.key_averages(), key=lambda row: -row.self_cpu_time_total)
    total = sum(row.self_cpu_time_total for row in rows)
    for row in rows[:most]:
        print(
            f"  {row.key:<58} {row.self_cpu_time_total / steps / 1e3:8.1f} ms"
            f" {100 * row.self_cpu_time_total / total:6.1f} %"
        )
    print(f"  {'all':<58} {total / steps / 1e3:8.1f} ms")


def main() -> None:
    options = parser(__doc__.splitlines()[0], repeats=9)
    options.add_argument("--batch", type=int, default=32)
    options.add_argument("--latent", type=int, default=16, help="side of the latent")
    options.add_argument("--tokens", type=int, default=12)
    options.add_argument("--profile", action="store_true", help="also print the operators that take the time")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    config = read_training_config(CONFIGS / "emoji-unet" / "unet.yaml")[1].model
    torch.manual_seed(0)
    ours, theirs = for_training(UNet(config)).train(), peer(config).train()
    counts = [sum(p.numel() for p in net.parameters()) for net in (ours, theirs)]
    if counts[0] != counts[1]:
        raise RuntimeError(f"not the same architecture: {counts[0]} and {counts[1]} parameters")
    b, dtype = args.batch, fast_dtype("cpu")
    x, target = (
        torch.randn(b, config.in_channels, args.latent, args.latent),
        torch.randn(b, config.out_channels, args.latent, args.latent),
    )
    t, context, pooled = (
        torch.randint(0, 1000, (b,)),
        torch.randn(b, args.tokens, config.context_dim),
        torch.randn(b, config.pooled_dim),
    )
    mask = torch.arange(args.tokens).expand(b, -1) < torch.randint(4, args.tokens + 1, (b, 1))
    cond = Cond(context=context, context_mask=mask, pooled=pooled)
    sides = {
        "ldm": step(ours, lambda: ours(x, t.float(), cond), target, dtype),
        "diffusers": step(
            theirs,
            lambda: theirs(x, t, context, class_labels=pooled, encoder_attention_mask=mask).sample,
            target,
            dtype,
        ),
    }
    seconds = measure(sides, args.repeats, args.clock)
    settings = {
        "batch": b,
        "latent": args.latent,
        "dtype": str(dtype).removeprefix("torch."),
        "parameters": counts[0],
    }
    for name, run in sides.items() if args.profile else ():
        print(name)
        profile(run)
    report("training step", settings, seconds, args, bars={"diffusers": bar_here(avx512=0.72, avx2=0.80)})


if __name__ == "__main__":
    main()
