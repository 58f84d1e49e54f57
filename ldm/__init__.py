"""Latent diffusion from scratch: text in, image out.

`ldm.load().text_to_image("a red apple", n=4).save("apples.png")` writes four images.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ldm.support.processor import limit_libraries
from ldm.support.version import __version__

limit_libraries()  # before PyTorch is imported

_PUBLIC = {  # public name → module below ldm that defines it
    "Cond": "diffusion.cond",
    "Denoised": "diffusion.interfaces",
    "NoiseSchedule": "diffusion.schedule",
    "TimeGrid": "diffusion.grid",
    "Denoiser": "diffusion.denoiser",
    "cfg": "diffusion.guidance",
    "SAMPLERS": "samplers",
    "Images": "images.result",
    "Control": "pipelines.control.control_use",
    "LatentDiffusion": "pipelines.latent",
    "UnCLIP": "pipelines.unclip",
    "DalleMini": "pipelines.dalle.pipeline",
    "list_models": "registry.names",
    "load": "registry.loading",
    "save": "registry.saving",
    "register": "registry.names",
    "trace": "analysis.tracing",
    "optimize": "speed.optimization",
}
__all__ = ["__version__", *_PUBLIC]

if TYPE_CHECKING:
    from ldm.analysis.tracing import trace
    from ldm.diffusion.cond import Cond
    from ldm.diffusion.denoiser import Denoiser
    from ldm.diffusion.grid import TimeGrid
    from ldm.diffusion.guidance import cfg
    from ldm.diffusion.interfaces import Denoised
    from ldm.diffusion.schedule import NoiseSchedule
    from ldm.images.result import Images
    from ldm.pipelines.control.control_use import Control
    from ldm.pipelines.dalle.pipeline import DalleMini
    from ldm.pipelines.latent import LatentDiffusion
    from ldm.pipelines.unclip import UnCLIP
    from ldm.registry.loading import load
    from ldm.registry.names import list_models, register
    from ldm.registry.saving import save
    from ldm.samplers import SAMPLERS
    from ldm.speed.optimization import optimize


def __getattr__(name: str) -> Any:  # the type of a public name is in the imports above
    """Import a public name on first access, so that `import ldm` does not import torch."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'ldm' has no attribute {name!r}")
    value = getattr(import_module(f"ldm.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the names of the package, including public names that are not imported yet."""
    return sorted(set(globals()) | set(__all__))
