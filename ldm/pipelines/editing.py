"""Pictures of pictures: variations, the way between two, enlarging in windows, inversion and back, editing by
inversion."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.conditioning.image_embedding import slerp
from ldm.diffusion.guidance import lerp
from ldm.diffusion.interfaces import Denoised, DenoiseFn
from ldm.diffusion.joint import denoise_both
from ldm.diffusion.noise import keyed_normal
from ldm.images.canvas import pad_to_multiple
from ldm.images.pixels import ImageInput, to_pixels
from ldm.images.result import Images
from ldm.pipelines.attention_control import SourceAttention, align
from ldm.pipelines.call import Call
from ldm.pipelines.conditions import Pair, between_conditions, conditions, expanded_pair
from ldm.pipelines.replayable import replayable
from ldm.samplers.invert import NOISIEST, ddim_invert, edict, edict_invert
from ldm.samplers.ode.ddim import ddim

if TYPE_CHECKING:
    from ldm.pipelines.latent import LatentDiffusion

LOW_NOISE = 2**62  # the keyed draw that noises an upscaler's input: none that a sampler makes


@dataclass(frozen=True, kw_only=True, eq=False)
class Inverted:
    """Pictures led back to noise: the denoiser that did it, the states of one track or two, the call of the
    way back, and the pictures' size."""

    call: Call
    there: DenoiseFn
    tracks: Sequence[Tensor]
    frame: tuple[int, int]

    @property
    def size(self) -> tuple[int, int]:
        """(h, w) of the states."""
        return self.tracks[0].shape[-2], self.tracks[0].shape[-1]


class Editing:
    """The tasks of `LatentDiffusion` that begin from a picture, or lie between two."""

    @replayable
    def variations(
        self: LatentDiffusion,
        image: ImageInput,
        *,
        n: int = 4,
        prompt: str | Sequence[str] = "",
        strength: float = 0.6,
        **options: Any,
    ) -> Images:
        """``n`` pictures that begin from a picture: `image_to_image` at a strength, with a prompt or without;
        options as there.

        A model that drafts the latent from the text takes the picture's own latent for the draft where there
        is no prompt.
        """
        pixels, call, finish = self._with_picture(prompt, image, {**options, "n": n})
        draft = None if any(call.prompts) else self._itself(pixels)
        return self._sample("variations", call, given=pixels, strength=strength, draft=draft, finish=finish)

    @replayable
    def interpolate(
        self: LatentDiffusion,
        a: Any,
        b: Any,
        *,
        n: int = 8,
        prompt: str = "",
        seed: int = 0,
        steps: int | None = None,
        **options: Any,
    ) -> Images:
        """``n`` pictures from a to b, both included; options as in `text_to_image`.

        Two texts: straight lines between their conditions, under the noise of one seed. Two whole numbers:
        the arc between the noise of these seeds, under ``prompt``. Two pictures of one size (a path as a
        `Path`): the arc between what they are inverted to, as in `reconstruct`, under ``prompt``, so that the
        ends are the pictures as the autoencoder gives them. TypeError for a text and a number, and the like.
        """
        if not isinstance(n, int) or isinstance(n, bool) or n < 2:
            raise ValueError(f"n: expected at least 2 pictures from a to b, got {n!r}")
        kinds = [
            (
                str
                if isinstance(end, str)
                else int
                if isinstance(end, int) and not isinstance(end, bool)
                else Path
            )
            for end in (a, b)
        ]
        if kinds[0] is not kinds[1]:
            raise TypeError(
                f"a and b: expected two texts, two seeds, or two pictures, got {type(a).__name__} and"
                f" {type(b).__name__}"
            )
        w = torch.linspace(0, 1, n)
        options = {**options, "seed": [seed] * n}
        if kinds[0] is str:
            call = self._settle([a] * (n - 1) + [b], steps=steps, **options)
            ends = replace(call, prompts=(a, b), seeds=(seed, seed))

            def on_the_way(size: tuple[int, int]) -> Pair:
                cond, uncond = conditions(self.card, self.text, ends, size)
                return between_conditions(cond[:1], cond[1:], w), uncond[:1]

            about = {"prompt": [a, b], "n": n}
            images = self._sample("interpolate", call, tell=on_the_way, about=about)
            return replace(
                images,
                prompts=tuple(
                    f"{a} → {b}, {part:.2f}" if 0 < part < 1 else (a, b)[part == 1] for part in w.tolist()
                ),
            )
        if kinds[0] is int:
            call = self._settle([prompt] * n, steps=steps, **{**options, "seed": [a] * (n - 1) + [b]})
            noise = slerp(*(self._noise(replace(call, seeds=(end,))) for end in (a, b)), w.to(self.device))
            return self._sample("interpolate", replace(call, latents=noise), about={"seed": [a, b], "n": n})
        return self._between_pictures(
            a, b, w, prompt, {**options, **({} if steps is None else {"steps": steps})}
        )

    @torch.no_grad()
    def _between_pictures(
        self: LatentDiffusion,
        a: ImageInput,
        b: ImageInput,
        w: Tensor,
        prompt: str,
        options: Mapping[str, Any],
    ) -> Images:
        """Pictures on the arcs between the states that two are inverted to; without a prompt, a model that
        drafts has their latents' mean for one."""
        sides = [to_pixels(a), to_pixels(b)]
        if sides[0].shape != sides[1].shape or len(sides[0]) != 1:
            raise ValueError(
                f"a and b: expected two pictures of one size, got {[tuple(side.shape) for side in sides]}"
            )
        ends = torch.cat(sides)
        two = self._inverted(
            ends, prompt, prompt, True, 1, 1.0, {"guidance": 1.0, **options, "seed": options["seed"][:2]}
        )
        call = replace(two.call, prompts=(prompt,) * len(w), seeds=tuple(options["seed"]))
        arcs = [slerp(track[:1], track[1:], w.to(track)) for track in two.tracks]
        draft = None if prompt else self._itself(ends)
        if draft is not None:
            draft = (torch.lerp(draft[0][:1], draft[0][1:], w.to(draft[0]).view(-1, 1, 1, 1)), draft[1])
        return self._back(
            "interpolate",
            replace(two, call=call, tracks=arcs),
            self._plain(call, arcs[0], draft),
            {"n": len(w)},
        )

    @replayable
    @torch.no_grad()
    def reconstruct(
        self: LatentDiffusion,
        image: ImageInput,
        *,
        prompt: str = "",
        exact: bool = True,
        iterations: int = 4,
        **options: Any,
    ) -> Images:
        """A picture from the noise that it is inverted to: there and back, at guidance 1; 50 steps unless
        said.

        ``exact``: two coupled tracks, which are undone exactly (EDICT, Wallace et al. 2022); else DDIM, whose
        every step backwards is solved by ``iterations``. What is lost is what the autoencoder loses, and with
        ``exact`` False what the iteration leaves.
        """
        inverted = self._inverted(image, prompt, prompt, exact, iterations, 1.0, {"guidance": 1.0, **options})
        return self._back("reconstruct", inverted, inverted.there, {"exact": exact})

    @replayable
    @torch.no_grad()
    def edit(
        self: LatentDiffusion,
        source: str,
        prompt: str,
        *,
        image: ImageInput | None = None,
        cross: float | None = None,
        within: float | None = None,
        emphasis: Mapping[str, float] | None = None,
        strength: float = 0.8,
        exact: bool = True,
        iterations: int = 4,
        **options: Any,
    ) -> Images:
        """A picture that ``source`` describes, changed into what ``prompt`` says; options as in
        `text_to_image`.

        Without an ``image``, it is what the seed makes of the source. With one, that is inverted under the
        source, at guidance 1, and sampled from there: ``exact`` and ``iterations`` as in `reconstruct`, 50
        steps unless said; ``strength`` in (0, 1] is the part of the grid that is gone back and forth, less of
        it keeping more of the picture. Attention holds the picture together (Prompt-to-Prompt, Hertz et al.
        2022): for a share ``cross`` of the run, attention to the words that both texts have, or that stand
        for each other, is the source's; for a share ``within``, attention between positions is. None: 0.8 and
        0.4 without an image, else 0. ``emphasis``: attend so many times as much to a word of the prompt.
        """
        cross, within = (
            usual if share is None else share
            for share, usual in ((cross, 0.8 * (image is None)), (within, 0.4 * (image is None)))
        )
        for name, share in (("cross", cross), ("within", within)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name}: expected a share of the run in [0, 1], got {share}")
        led, about = (
            bool(cross or within or emphasis),
            {
                "source": source,
                "cross": cross,
                "within": within,
                "emphasis": dict(emphasis or {}),
            },
        )
        if image is None:
            call = self._settle(prompt, **options)
            noise = self._noise(call) * call.rules.start_scale(call.grid)
            with self._led(call, source, noise, cross, within, emphasis or {}) as (pair, fn):
                x = self._run(fn, torch.cat([noise, noise]), pair)[len(noise) :]
            return self._images("edit", call, x, about)
        about = {**about, "strength": strength, "exact": exact}
        inverted = self._inverted(image, source, prompt, exact, iterations, strength, options)
        if not led:
            return self._back("edit", inverted, self._told(inverted.call, inverted.size), about)
        with self._led(
            inverted.call, source, inverted.tracks[0], cross, within, emphasis or {}, given=True
        ) as (_, fn):
            return self._back(
                "edit", replace(inverted, tracks=[torch.cat([x, x]) for x in inverted.tracks]), fn, about
            )

    @contextmanager
    def _led(
        self: LatentDiffusion,
        call: Call,
        source: str,
        x: Tensor,
        cross: float,
        within: float,
        emphasis: Mapping[str, float],
        *,
        given: bool = False,
    ) -> Iterator[tuple[Call, DenoiseFn]]:
        """The call of a source and of its pictures behind it, and its denoiser, led by the source's
        attention; the source of a ``given`` picture is not guided."""
        if not hasattr(self.text, "places"):
            raise ValueError(
                f"{self.card.name!r} does not read words that can be found again, so attention cannot be"
                " controlled: cross=0, within=0"
            )
        n = len(call.seeds)
        negative = call.negative if isinstance(call.negative, str) else call.negative * 2
        pair = replace(
            call,
            prompts=(source,) * n + tuple(map(str, call.prompts)),
            negative=negative,
            seeds=call.seeds * 2,
        )
        cond, uncond = expanded_pair(
            conditions(self.card, self.text, pair, (x.shape[-2], x.shape[-1])), 2 * n
        )
        assert cond.context is not None
        if len(set(call.prompts)) > 1:
            raise ValueError(f"prompt: expected one text to change the source into, got {list(call.prompts)}")
        alignment = align(
            self.text.places(source), self.text.places(str(call.prompts[0])), cond.context.shape[1], emphasis
        )
        control = SourceAttention(alignment=alignment, pictures=n, cross=cross, within=within)
        scale = torch.full((2 * n, 1, 1, 1), call.guidance, device=self.device)
        if given:
            scale[:n] = 1.0
        denoiser = self._as_seen(call)

        def fn(x_t: Tensor, t: Tensor) -> Denoised:
            with_words, without = denoise_both(denoiser, x_t, t, cond, uncond)
            return lerp(without, with_words, scale.to(x_t.dtype))

        with control.over(self.denoiser.net):
            yield pair, control.watch(fn, call.grid.t)

    def _inverted(
        self: LatentDiffusion,
        image: ImageInput,
        source: str,
        prompt: str,
        exact: bool,
        iterations: int,
        strength: float,
        options: Mapping[str, Any],
    ) -> Inverted:
        """A picture inverted under one prompt without guidance, and the call of the way back under
        another."""
        if not 0 < strength <= 1:
            raise ValueError(f"strength: expected more than 0 and at most 1, got {strength}")
        pixels = to_pixels(image)
        frame = (pixels.shape[-2], pixels.shape[-1])
        pixels = pad_to_multiple(pixels, self.multiple)
        call = self._invertible({"prompt": [prompt] * len(pixels), **options}, pixels)
        call = call.over(call.grid.tail(strength))
        z = self.encode(pixels).double()  # what two tracks amplify, rounding begins
        there = self._plain(
            replace(call, prompts=(source,) * len(pixels)), z, None if source else self._itself(pixels)
        )
        tracks = (
            list(edict_invert(there, z, z, call.grid))
            if exact
            else [ddim_invert(there, z, call.grid, iterations=iterations)]
        )
        return Inverted(call=call, there=there, tracks=tracks, frame=frame)

    def _back(
        self: LatentDiffusion, task: str, inverted: Inverted, fn: DenoiseFn, about: Mapping[str, Any]
    ) -> Images:
        """The pictures that a denoiser leads to from inverted ones; of a batch that has their sources before
        them, those behind."""
        call, tracks, (h, w) = inverted.call, inverted.tracks, inverted.frame
        x = edict(fn, *tracks, call.grid)[0] if len(tracks) == 2 else ddim(fn, tracks[0], call.grid)
        return self._images(task, call, x[-len(call.seeds) :].float(), about, lambda made: made[..., :h, :w])

    def _invertible(self: LatentDiffusion, options: Mapping[str, Any], pixels: Tensor) -> Call:
        """The call of an inversion: DDIM over 50 steps unless said, which begin where x/alpha still holds the
        picture (see `NOISIEST`)."""
        if options.get("sampler") not in (None, "ddim"):
            raise ValueError(f"sampler {options['sampler']!r}: inversion runs ddim backwards; leave it out")
        own = {
            "steps": 50,
            **{key: value for key, value in options.items() if key != "prompt"},
            "sampler": "ddim",
        }
        call = self._of_size(options["prompt"], pixels, own, (pixels.shape[-2], pixels.shape[-1]))[1]
        return call.over(call.grid.from_ratio(NOISIEST))

    def _plain(
        self: LatentDiffusion, call: Call, x: Tensor, draft: tuple[Tensor, Tensor] | None
    ) -> DenoiseFn:
        """The denoiser of a call without guidance, for states of x's size."""
        return self._told(replace(call, guidance=1.0), (x.shape[-2], x.shape[-1]), draft=draft)

    def _itself(self: LatentDiffusion, pixels: Tensor) -> tuple[Tensor, Tensor] | None:
        """The pictures' own latents and no hole in them, as a draft; None for a model that does not draft."""
        if getattr(self.text, "draft", None) is None:
            return None
        z = self.encode(pad_to_multiple(pixels, self.multiple))
        return z, torch.zeros_like(z[:1, :1])

    @replayable
    def upscale(
        self: LatentDiffusion,
        image: ImageInput,
        prompt: str | Sequence[str] = "",
        *,
        factor: int | None = None,
        strength: float = 0.3,
        noise_level: int = 20,
        window: int | None = None,
        **options: Any,
    ) -> Images:
        """A picture enlarged; options as in `text_to_image`.

        By a model that is given the small picture: by the autoencoder's factor (4). ``noise_level``: the
        timestep that it is first noised to, 0 to 349 (of models that are told it; others get the picture
        itself). By any other model: enlarged ``factor`` times (2 unless said, bicubic), then `image_to_image`
        at a ``strength``. ``window``: the side in pixels of what the network sees at a time, half of which
        the windows share (Bar-Tal et al. 2023); None for the model's own side, or for the whole picture in a
        model of the first kind.
        """
        small = to_pixels(image)
        if self.card.concat not in ("lowres", "lowres-noised"):
            if self.card.concat is not None:
                self._needs("lowres", "lowres-noised")
            return self._enlarge(small, prompt, 2 if factor is None else factor, strength, window, options)
        low = 2 * small.to(self.device) - 1
        own = self.vae.config.factor
        if factor not in (None, own):
            raise ValueError(f"factor {factor}: {self.card.name!r} enlarges {own} times")
        call = self._settle(
            prompt, **{**options, "height": own * low.shape[-2], "width": own * low.shape[-1]}
        )
        extra: dict[str, Tensor] = {"concat": low}
        if self.card.concat == "lowres-noised":
            if not 0 <= noise_level < 350:
                raise ValueError(f"noise_level: expected 0 to 349, got {noise_level}")
            noise = torch.stack([keyed_normal(seed, LOW_NOISE, low.shape[1:]) for seed in call.seeds]).to(
                self.device
            )
            low = low.expand(len(call.seeds), -1, -1, -1)
            extra = {
                "concat": self.denoiser.schedule.add_noise(low, noise_level, noise),
                "pooled": torch.full((len(low),), noise_level),
            }
        return self._sample("upscale", call, extra=extra, window=window, about={"noise_level": noise_level})

    def _enlarge(
        self: LatentDiffusion,
        small: Tensor,
        prompt: Any,
        factor: int,
        strength: float,
        window: int | None,
        options: Mapping[str, Any],
    ) -> Images:
        """A picture enlarged by interpolation, and made sharp by `image_to_image` in windows."""
        if not isinstance(factor, int) or isinstance(factor, bool) or factor < 2:
            raise ValueError(f"factor: expected a whole number of at least 2, got {factor!r}")
        size = (factor * small.shape[-2], factor * small.shape[-1])
        large = F.interpolate(small, size, mode="bicubic", antialias=True).clamp(0, 1)
        pixels, call, finish = self._with_picture(prompt, large, options)
        side = max(self.card.defaults.height, self.card.defaults.width) if window is None else window
        about = {"factor": factor, "window": side}
        return self._sample(
            "upscale",
            call,
            given=pixels,
            strength=strength,
            draft=self._itself(pixels),
            window=side,
            finish=finish,
            about=about,
        )
