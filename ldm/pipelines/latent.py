"""Latent diffusion: text to picture by a text tower, a denoiser in latent space, and a decoder (Rombach et al. 2022)."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.cards import ModelCard
from ldm.config import nearest, to_dict
from ldm.conventions import Convention, get_convention
from ldm.denoiser import Denoiser
from ldm.grid import TimeGrid
from ldm.guidance import cfg
from ldm.images import Images, check_seeds
from ldm.models.conditioner import TextConditioner
from ldm.models.vae import AutoencoderKL
from ldm.noise import initial_noise
from ldm.samplers import get_sampler
from ldm.types import Denoised, OnStep


class UnknownWords(UserWarning):
    """A prompt has words that the model has never seen."""


class LatentDiffusion(nn.Module):
    """A latent diffusion model, ready to sample: ``vae``, ``text``, ``denoiser`` (``.net``, ``.schedule``, ``.prediction``), ``latent_scale``, ``card``.

    ``origin``: what a recipe says of the weights (their hashes).
    """

    def __init__(
        self, *, vae: AutoencoderKL, text: TextConditioner, denoiser: Denoiser, latent_scale: float, card: ModelCard,
        origin: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.vae = vae
        self.text = text
        self.denoiser = denoiser
        self.latent_scale = latent_scale
        self.card = card
        self.origin = dict(origin or {})

    @property
    def device(self) -> torch.device:
        """Where the denoiser computes."""
        return next(self.denoiser.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What the denoiser computes in; the sampler's state is float32."""
        return next(self.denoiser.parameters()).dtype

    @torch.no_grad()
    def text_to_image(
        self,
        prompt: str | Sequence[str],
        *,
        negative: str = "",
        n: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        sampler: str | None = None,
        convention: str | Convention | Mapping[str, Any] | None = None,
        spacing: str | None = None,
        grid: TimeGrid | Sequence[float] | Mapping[str, Sequence[float]] | None = None,
        seed: int | Sequence[int] = 0,
        height: int | None = None,
        width: int | None = None,
        latents: Tensor | None = None,
        progress: bool = True,
        on_step: OnStep | None = None,
        **sampler_options: Any,
    ) -> Images:
        """Pictures of a prompt, or of several: ``n`` (default 1) of each.

        ``steps``, ``guidance``, ``sampler``, ``height`` and ``width``: None for what the card says. ``convention``: diffusers, compvis, sgm or k,
        whose grids, start and noise are followed in place of the card's. ``spacing``: another one of `TimeGrid.make`. ``grid`` replaces steps and
        spacing: one of one's own, or a list of falling timesteps. ``seed``: picture i has seed s + i, or a sequence with one for each. ``latents``
        (B, C, h, w): standard normal noise to start from, in place of the seeds'. ``guidance`` 1 is the conditional model alone, 0 the
        unconditional; an empty prompt is unconditional too. Decoded values outside [0, 1] are clamped.

        Raises ValueError for a size that the autoencoder cannot hold, no pictures or no steps, an unknown sampler or option. Warns with
        `UnknownWords` where a prompt has words the model has never seen.
        """
        defaults = self.card.defaults
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        count = check_count(n) * len(prompts)
        if not prompts or not all(isinstance(p, str) for p in prompts):
            raise ValueError(f"prompt: expected a text or several, got {prompt!r}")
        name = sampler or defaults.sampler
        rules = self.card.grids() if convention is None else get_convention(convention)
        solve, options = get_sampler(name), {**rules.options.get(name, {}), **sampler_options}
        check_options(name, sampler_options)
        laid = self._lay(rules, name, steps, spacing, grid)
        scale = defaults.guidance if guidance is None else float(guidance)
        h, w = height or defaults.height, width or defaults.width
        seeds = check_seeds(seed, count)
        _, start = rules.begin(laid, self._noise(seeds, h, w, latents))
        self._warn(*prompts, negative)

        prompts = [p for p in prompts for _ in range(count // len(prompts))]
        size = (start.shape[-2], start.shape[-1])
        fn = cfg(self._denoiser(rules), self.text(prompts, size), self.text([negative], size), scale)
        with progress_bar(len(laid), progress) as bar:
            hook = both_hooks(on_step, lambda *_: bar.update())
            x = solve(fn, start, laid, noise=rules.noise(seeds, laid, name, **options), on_step=hook, **options)
        said = {"convention": convention, "spacing": spacing, "grid": None if grid is None else laid.to_dict()}
        recipe = {
            "task": "text_to_image", "prompt": prompts if len(set(prompts)) > 1 else prompts[0], "negative": negative, "n": count if len(set(prompts)) == 1 else None,
            "seed": list(seeds), "steps": len(laid), "guidance": scale, "sampler": name, "height": h, "width": w, **sampler_options,
            **{key: value for key, value in said.items() if value is not None},
        }  # fmt: skip
        return Images(tensor=self.decode(x), seeds=seeds, prompts=tuple(prompts), recipe=self._recipe(recipe, replayable=latents is None and on_step is None))

    def _lay(self, rules: Convention, sampler: str, steps: int | None, spacing: str | None, grid: Any) -> TimeGrid:
        """The caller's grid, or the convention's with the caller's spacing."""
        schedule = self.denoiser.schedule
        if grid is None:
            changes = {} if spacing is None else {"spacing": spacing}
            return rules.grid(schedule, self.card.defaults.steps if steps is None else steps, sampler, **changes)
        if isinstance(grid, Mapping):
            grid = TimeGrid.from_dict(schedule, grid)
        laid = grid if isinstance(grid, TimeGrid) else TimeGrid.explicit(schedule, grid)
        if spacing is not None or steps not in (None, len(laid)):
            raise ValueError(f"grid says all of its {len(laid)} steps: leave spacing ({spacing!r}) and steps ({steps!r}) out")
        return laid

    def _denoiser(self, rules: Convention) -> Denoiser:
        """The denoiser as the convention has its network see t."""
        own = self.denoiser
        if own.quantize or not rules.quantize:
            return own
        return Denoiser(own.net, own.schedule, own.prediction, learned_var=own.learned_var, quantize=True)

    def _noise(self, seeds: Sequence[int], h: int, w: int, latents: Tensor | None) -> Tensor:
        """The standard normal noise of each picture, (B, C, h/f, w/f) float32 on the device."""
        factor, channels = self.vae.config.factor, self.vae.config.latent_channels
        for side, value in (("height", h), ("width", w)):
            if value < factor or value % factor:
                near = max(factor, round(value / factor) * factor)
                raise ValueError(f"{side} {value}: expected a multiple of {factor}, the autoencoder's factor; the nearest is {near}")
        shape = (channels, h // factor, w // factor)
        if latents is None:
            latents = initial_noise(seeds, shape)
        elif latents.shape != (len(seeds), *shape):
            raise ValueError(f"latents have shape {tuple(latents.shape)}, expected {(len(seeds), *shape)}")
        return latents.to(self.device, torch.float32)

    def encode(self, x: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1] → scaled latents (B, C, H/f, W/f) float32: the posterior's mean."""
        x = (2 * x - 1).to(self.device, next(self.vae.parameters()).dtype)
        return self.vae.encode(x).mode().float() * self.latent_scale

    def decode(self, z: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) → pictures (B, 3, H, W) float32 in [0, 1] on the CPU; values outside are clamped, NaN stays to be found."""
        x = self.vae.decode((z / self.latent_scale).to(next(self.vae.parameters()).dtype))
        return ((x.float() + 1) / 2).clamp(0, 1).cpu()

    def _warn(self, *prompts: str) -> None:
        unknown = list(dict.fromkeys(word for prompt in prompts for word in self.text.unknown(prompt)))
        if unknown:
            words = ", ".join(repr(word) for word in unknown)
            warnings.warn(f"{self.card.name} has never seen {words}: the picture may not show it", UnknownWords, stacklevel=3)

    def _recipe(self, task: Mapping[str, Any], *, replayable: bool) -> dict[str, Any]:
        import platform

        from ldm import __version__

        made_with = {"ldm": __version__, "torch": torch.__version__, "python": platform.python_version(), "threads": torch.get_num_threads()}
        where = {"device": str(self.device), "dtype": str(self.dtype).removeprefix("torch.")}
        return {"model": self.card.name, **to_dict(task), **where, "replayable": replayable, "weights": self.origin, "versions": made_with}


def check_count(n: int | None) -> int:
    """n, or 1 for None; ValueError if it is not a number of pictures."""
    if n is None:
        return 1
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise ValueError(f"n: expected a number of pictures of at least 1, got {n!r}")
    return n


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """ValueError for an option that the sampler does not take."""
    parameters = inspect.signature(get_sampler(name)).parameters
    known = [key for key in parameters if key not in ("denoise", "x", "grid", "noise", "on_step")]
    for key in options:
        if key not in known:
            raise ValueError(f"sampler {name!r} has no option {key!r}; {nearest(key, known) if known else 'it has none'}")


def both_hooks(first: OnStep | None, second: Any) -> OnStep:
    """A hook that calls both; the first may return a new x."""

    def hook(i: int, x: Tensor, d: Denoised) -> Tensor | None:
        second(i, x, d)
        return None if first is None else first(i, x, d)

    return hook


def progress_bar(total: int, shown: bool) -> Any:
    """A bar on standard error, on a terminal only."""
    from tqdm import tqdm

    return tqdm(total=total, unit="step", leave=False, disable=None if shown else True)
