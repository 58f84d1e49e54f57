"""The networks of a pipeline that optimizations act on."""

from __future__ import annotations

from torch import nn

from ldm.diffusion.denoiser import Denoiser
from ldm.models.dit import DiT
from ldm.models.unet import UNet
from ldm.models.vae import VAEDecoder


def unets(pipe: nn.Module) -> list[UNet]:
    """Return the UNets of a pipeline, or the network itself.

    Raises:
        ValueError: If there is none.
    """
    found = [part for part in pipe.modules() if isinstance(part, UNet)]
    if not found:
        raise ValueError(f"merge and int8 act on a UNet, and the {type(pipe).__name__} has none")
    return found


def reusing_networks(pipe: nn.Module) -> list[UNet | DiT]:
    """Return the UNets of a pipeline and the diffusion transformers of its denoisers, or the network itself.

    A prior over layouts, which is part of the conditioner, is left out: where things lie is decided in its
    few steps.

    Raises:
        ValueError: If there is none.
    """
    found: list[UNet | DiT] = [part for part in pipe.modules() if isinstance(part, UNet)]
    denoisers = [pipe] if isinstance(pipe, DiT) else [p for p in pipe.modules() if isinstance(p, Denoiser)]
    found += [part for denoiser in denoisers for part in denoiser.modules() if isinstance(part, DiT)]
    if not found:
        raise ValueError(
            f"reuse acts on a UNet or a diffusion transformer, and the {type(pipe).__name__} has none"
        )
    return found


def unets_and_decoders(pipe: nn.Module) -> list[UNet | VAEDecoder]:
    """Return the UNets and the autoencoders' decoders of a pipeline, or the network itself.

    Raises:
        ValueError: If there is none.
    """
    found = [part for part in pipe.modules() if isinstance(part, UNet | VAEDecoder)]
    if not found:
        raise ValueError(f"a backend computes UNets and decoders, and the {type(pipe).__name__} has none")
    return found
