"""unCLIP, the model behind DALL·E 2: text → image embedding → picture → larger picture (Ramesh et al.
2022)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ldm.catalog.unclip_cards import UnCLIPCard, upsampler_name
from ldm.conditioning.clip import ClipPair
from ldm.conditioning.image_embedding import ImageEmbedding, slerp
from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.interfaces import DenoiseFn, OnStep
from ldm.images.pixels import ImageInput, to_pixels
from ldm.images.result import Images
from ldm.models.safety import SafetyChecker
from ldm.models.unclip.embedding_codes import EmbeddingCodes, truncate
from ldm.pipelines.call import Call, all_hooks, warn_unknown
from ldm.pipelines.conditions import Watcher, cut
from ldm.pipelines.recipe import stamp
from ldm.pipelines.replayable import replayable
from ldm.pipelines.stages.autoregressive import AutoregressiveStage
from ldm.pipelines.stages.decoder import DecoderStage
from ldm.pipelines.stages.prior import PriorStage
from ldm.pipelines.stages.upsampler import UpsamplerStage
from ldm.pipelines.tasks.rerank import rerank
from ldm.pipelines.unclip_options import decoders, held, options_of, priors, told
from ldm.pipelines.unclip_painting import UnCLIPPainting
from ldm.pipelines.windows import Crop, windowed
from ldm.samplers.invert import NOISIEST

Finish = Callable[[Tensor], Tensor]
UPSAMPLER_OPTIONS = ("steps", "guidance", "sampler", "latents", "height", "width")


class UnCLIP(UnCLIPPainting, nn.Module):
    """An unCLIP model, ready to sample: ``clip``, ``prior`` (None: no texts, unless an embedding is given),
    ``decoder``, ``upsamplers``, ``card``.

    ``origin``: what a recipe says of the weights. ``safety``: what looks at every picture made; None, the
    default, for nothing. ``watchers``: what is told of every run of the decoder (`ldm.trace`).
    """

    def __init__(
        self,
        *,
        clip: ClipPair,
        prior: PriorStage | AutoregressiveStage | None,
        decoder: DecoderStage,
        upsamplers: Sequence[UpsamplerStage] = (),
        card: UnCLIPCard,
        origin: Mapping[str, Any] | None = None,
        safety: SafetyChecker | None = None,
    ) -> None:
        super().__init__()
        for part, name in (("CLIP", clip.name), ("prior", prior and prior.clip), ("decoder", decoder.clip)):
            if name is not None and name != card.clip:
                raise ValueError(
                    f"{card.name!r} runs on embeddings of {card.clip!r}, its {part} on those of {name!r}: two"
                    " CLIPs share no space"
                )
        widths = {"CLIP": clip.width, "decoder": decoder.width} | (
            {} if prior is None else {"prior": prior.net.config.embed_dim}
        )
        if len(set(widths.values())) > 1:
            raise ValueError(f"{card.name!r}: expected embeddings of one width, got {widths}")
        self.clip, self.prior, self.decoder, self.card = clip, prior, decoder, card
        self.upsamplers: Any = nn.ModuleList(upsamplers)
        self.origin = dict(origin or {})
        self.safety = safety
        self.watchers: list[Watcher] = []

    @property
    def device(self) -> torch.device:
        """Where the decoder computes."""
        return self.decoder.device

    @property
    def dtype(self) -> torch.dtype:
        """What the decoder computes in; the samplers' states are float32."""
        return next(self.decoder.denoiser.parameters()).dtype

    def networks(self) -> dict[str, nn.Module]:
        """The networks by the name of their part: "decoder", and what else there is of "text", "vision",
        "prior", "noise", "words", "vae", "upsampler" and "upsampler-last"."""
        own = self.decoder.text if self.decoder.text is not self.clip.text else None
        found = {
            "text": self.clip.text and self.clip.text.tower,
            "vision": self.clip.vision,
            "prior": self.prior and self.prior.net,
            "decoder": self.decoder.denoiser.net,
            "noise": self.decoder.augmentation,
            "vae": self.decoder.space.vae,
        }
        for k, stage in enumerate(self.upsamplers):
            found |= {
                upsampler_name(k): stage.denoiser.net,
                upsampler_name(k, last=True): stage.last and stage.last.net,
            }
        found |= {} if own is None else {"words": next(iter(own.networks().values()))}
        return {part: network for part, network in found.items() if network is not None}

    def text_to_image(
        self,
        prompt: str | Sequence[str],
        *,
        negative: str | Sequence[str] = "",
        n: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        sampler: str | None = None,
        grid: TimeGrid | None = None,
        seed: int | Sequence[int] = 0,
        height: int | None = None,
        width: int | None = None,
        latents: Tensor | None = None,
        candidates: int = 1,
        embedding: ImageEmbedding | None = None,
        progress: bool = True,
        on_step: OnStep | None = None,
        **options: Any,
    ) -> Images:
        """Pictures of a prompt, or of several: ``n`` (default 4) of each.

        ``candidates``: embeddings the prior makes for each picture, of which the one with the largest dot
        product with the text's is taken. ``embedding``: image embeddings, one or one for each picture, in
        place of the prior's. ``steps``, ``guidance``, ``sampler``, ``grid``, ``latents`` and ``on_step`` are
        the decoder's; the prior's are ``prior_steps``, ``prior_guidance``, ``prior_sampler`` and
        ``prior_latents``, the upsamplers' ``upsampler_steps``, ``upsampler_sampler`` and
        ``upsampler_latents``. ``upsample`` False leaves the decoder's picture. ``noise_level``: of Stable
        unCLIP's embedding, 0 to 999. Others are options of the decoder's sampler.

        Raises ValueError for an embedding of another CLIP or width, a model without a prior, and as
        `LatentDiffusion.text_to_image`.
        """
        call = self._settle(
            prompt,
            negative=negative,
            n=n,
            steps=steps,
            guidance=guidance,
            sampler=sampler,
            grid=grid,
            seed=seed,
            height=height,
            width=width,
            latents=latents,
            progress=progress,
            on_step=on_step,
            **decoders(options),
        )
        given = embedding is not None
        if embedding is None:
            asked = {
                "negative": call.negative,
                "seed": call.seeds,
                "candidates": candidates,
                "progress": progress,
            }
            embedding = self.imagine(call.prompts, **{**priors(options), **asked})
        facts = {"candidates": candidates, **told(options)}
        return self._decode(
            "text_to_image",
            call,
            embedding,
            options,
            facts,
            replayable=call.replayable and not given and not held(options),
        )

    @replayable
    def variations(
        self,
        image: ImageInput,
        *,
        n: int | None = None,
        prompt: str = "",
        invert: bool = False,
        eta: float = 1.0,
        **options: Any,
    ) -> Images:
        """``n`` pictures (default 4) of a picture's embedding; options as in `text_to_image`.

        ``invert``: begin from the noise that DDIM leads to the picture from, so that the embedding and it
        (the paper's bipartite latent, section 3.1) hold all of it; then ``eta`` in [0, 1] says how much is
        varied, 0 reconstructs it. The size is then the picture's, the steps are 50 unless said, each solved
        backwards by ``iterations`` (4), and the upsamplers rest. ValueError for a model without a vision
        tower.
        """
        pixels = to_pixels(image)
        embedding = self.clip.image_embedding(pixels)
        if len(pixels) != 1:
            raise ValueError(f"image: expected one picture, got {len(pixels)}")
        if not invert:
            return self._decode(
                "variations",
                self._settle(prompt, n=n, **decoders(options)),
                embedding,
                options,
                told(options),
            )
        latents, call = self._inverted(pixels, embedding, prompt, n=n, eta=eta, **options)
        call = replace(call, latents=latents.expand(len(call.seeds), *latents.shape[1:]))
        return self._decode(
            "variations", call, embedding, {**options, "upsample": False}, {"invert": True, **told(options)}
        )

    @replayable
    def reconstruct(self, image: ImageInput, **options: Any) -> Images:
        """A picture from its embedding and its inverted noise: `variations` that vary nothing."""
        return self.variations(image, **{"n": 1, **options, "invert": True, "eta": 0.0})

    @replayable
    def interpolate(
        self,
        a: Any,
        b: Any,
        *,
        n: int = 8,
        seed: int = 0,
        prompt: str = "",
        invert: bool = False,
        **options: Any,
    ) -> Images:
        """``n`` pictures from a to b, each a text or a picture, both included: on the arc between their
        embeddings (section 3.2).

        The noise is that of one seed all along; with ``invert`` (of two pictures of one size) it goes from
        one's inverted noise to the other's. Text is ``prompt`` everywhere. Options as in `text_to_image`.
        """
        if not isinstance(n, int) or isinstance(n, bool) or n < 2:
            raise ValueError(f"n: expected at least 2 pictures from a to b, got {n!r}")
        ends = [self.embed(side, seed=seed, **priors(options)) for side in (a, b)]
        w = torch.linspace(0, 1, n)
        path = replace(ends[0], vector=slerp(ends[0].vector, ends[1].vector.to(ends[0].vector.device), w))
        call = self._settle([prompt] * n, n=1, seed=[seed] * n, **decoders(options))
        if invert:
            noises = []
            for side, end in zip((a, b), ends, strict=True):
                latents, call = self._inverted(
                    to_pixels(side), end, [prompt] * n, n=1, eta=0.0, seed=[seed] * n, **options
                )
                noises.append(latents)
            if noises[0].shape != noises[1].shape:
                raise ValueError(
                    f"invert: expected two pictures of one size, got noises of {tuple(noises[0].shape)} and"
                    f" {tuple(noises[1].shape)}"
                )
            call, options = (
                replace(call, latents=slerp(noises[0], noises[1], w.to(noises[0].device))),
                {
                    **options,
                    "upsample": False,
                },
            )
        return self._decode("interpolate", call, path, options, {"invert": invert, **told(options)})

    @replayable
    def text_difference(
        self,
        image: ImageInput,
        source: str,
        target: str,
        *,
        n: int = 8,
        most: float = 0.5,
        seed: int = 0,
        invert: bool = True,
        **options: Any,
    ) -> Images:
        """``n`` pictures from a picture (the first) towards what ``target`` has that ``source`` has not
        (section 3.3).

        The embedding turns towards the difference of both texts' embeddings, at length 1, by up to ``most``
        of the arc (the paper: 0.25 to 0.5); with ``invert`` from the picture's inverted noise. Options as in
        `text_to_image`.
        """
        if not 0 <= most <= 1:
            raise ValueError(f"most: expected a part of the arc in [0, 1], got {most}")
        pixels = to_pixels(image)
        start = self.clip.image_embedding(pixels)
        texts = self.clip.text_embedding([source, target]).unit().vector
        if torch.allclose(texts[0], texts[1], atol=1e-6):
            raise ValueError(
                f"source and target: {source!r} and {target!r} have one embedding, so there is no direction"
                " between them"
            )
        direction = torch.nn.functional.normalize((texts[1] - texts[0])[None], dim=-1).to(start.vector.device)
        length = start.vector.norm(dim=1, keepdim=True)
        path = replace(start, vector=slerp(start.vector, direction * length, torch.linspace(0, most, n)))
        call = self._settle([""] * n, n=1, seed=[seed] * n, **decoders(options))
        if invert:
            latents, call = self._inverted(pixels, start, [""] * n, n=1, eta=0.0, seed=[seed] * n, **options)
            call, options = (
                replace(call, latents=latents.expand(n, *latents.shape[1:])),
                {
                    **options,
                    "upsample": False,
                },
            )
        facts = {"source": source, "target": target, "most": most, "invert": invert, **told(options)}
        return self._decode("text_difference", call, path, options, facts)

    @replayable
    def truncated(
        self,
        image: ImageInput,
        codes: EmbeddingCodes,
        components: Sequence[int],
        *,
        seed: int = 0,
        **options: Any,
    ) -> Images:
        """Pictures of an embedding of which only the first principal components are kept, a number for each
        (figure 7).

        ``codes``: fitted to embeddings of this CLIP (`EmbeddingCodes.fit`). One seed for all. Options as in
        `text_to_image`.
        """
        whole = self.clip.image_embedding(to_pixels(image))
        parts = torch.cat([truncate(whole.vector.cpu(), k, codes) for k in components])
        call = self._settle([""] * len(parts), n=1, seed=[seed] * len(parts), **decoders(options))
        return self._decode(
            "truncated",
            call,
            replace(whole, vector=parts),
            options,
            {"components": list(components), **told(options)},
        )

    def rerank(self, prompt: str | Sequence[str], *, of: int = 16, keep: int = 4, **options: Any) -> Images:
        """``of`` pictures of each prompt made, the ``keep`` most similar to it by CLIP returned, best
        first."""
        return rerank(self.text_to_image(prompt, n=of, **options), self.clip, keep=keep)

    @torch.no_grad()
    def imagine(
        self,
        prompt: str | Sequence[str],
        *,
        n: int = 1,
        negative: str | Sequence[str] = "",
        seed: int | Sequence[int] = 0,
        candidates: int = 1,
        progress: bool = True,
        **options: Any,
    ) -> ImageEmbedding:
        """The prior's image embeddings of prompts, ``n`` of each; options as in `text_to_image`, of which it
        takes those of the prior."""
        if self.prior is None:
            raise ValueError(
                f"{self.card.name!r} has no prior: give an embedding, or call variations with a picture"
            )
        if strangers := [name for name in options if not name.startswith("prior_")]:
            raise ValueError(f"options {strangers} are none of the prior's, which begin with 'prior_'")
        own = options_of("prior", options, self.prior.options)
        call = self.prior.settle(
            list(prompt) if not isinstance(prompt, str) else prompt,
            n=n,
            negative=negative,
            seed=seed,
            progress=progress,
            **own,
        )
        return self.prior(self.clip, call, candidates=candidates)

    def embed(self, what: str | ImageInput, *, seed: int = 0, **options: Any) -> ImageEmbedding:
        """The embedding (1, E) of a text, by the prior, or of a picture, by CLIP. A path is a picture only as
        a `Path`."""
        if isinstance(what, str):
            return self.imagine(what, seed=seed, **options)
        found = self.clip.image_embedding(to_pixels(what))
        if len(found) != 1:
            raise ValueError(f"expected one text or one picture, got {len(found)} pictures")
        return found

    # What all tasks share.

    def _settle(self, prompt: Any, *, n: int | None = None, **options: Any) -> Call:
        call = self.decoder.settle(prompt, n=self.card.pictures if n is None else n, **options)
        self.decoder.shape(call)
        if self.clip.text is not None:
            warn_unknown(self.card.name, self.clip.text, (*call.prompts, *call.negatives), stacklevel=4)
        return call

    def _guided(
        self,
        call: Call,
        embedding: ImageEmbedding,
        noise_level: int,
        concat: Tensor | None = None,
        window: int | None = None,
    ) -> DenoiseFn:
        """The decoder under guidance, with channels beside the latent; ``window``: the side, in pixels, of
        what it sees at a time, None for all."""
        nothing = self.clip.black() if self.card.no_image == "black" else None
        pair = self.decoder.conditions(embedding, nothing, call, noise_level=noise_level)
        if concat is not None:
            wide = concat.expand(len(call.seeds), *concat.shape[1:])
            pair = (replace(pair[0], concat=wide), replace(pair[1], concat=wide))
        size = self.decoder.shape(call)[1:]
        tile = max(size) if window is None else max(1, window // self.decoder.space.factor)
        if tile >= max(size):
            return self.decoder.guided(*pair, call.guidance)

        def make(part: Crop) -> DenoiseFn:
            return self.decoder.guided(cut(pair[0], part, size), cut(pair[1], part, size), call.guidance)

        return windowed(make, tile, overlap=tile // 2)

    @torch.no_grad()
    def _inverted(
        self, pixels: Tensor, embedding: ImageEmbedding, prompt: Any, *, eta: float, **options: Any
    ) -> tuple[Tensor, Call]:
        """The noise (1, C, h, w) that DDIM leads to a picture from, and the call that begins there; without
        guidance, unless that is asked for."""
        asked = {name: value for name, value in decoders(options).items() if value is not None}
        if asked.get("sampler", "ddim") != "ddim":
            raise ValueError(f"sampler {asked['sampler']!r}: inversion runs ddim backwards; leave it out")
        own = {
            "steps": 50,
            **asked,
            "sampler": "ddim",
            "height": pixels.shape[-2],
            "width": pixels.shape[-1],
            "eta": eta,
        }
        call = self._settle(prompt, **{"guidance": 1.0, **own})
        call = call.over(call.grid.from_ratio(NOISIEST))
        one = replace(call, prompts=call.prompts[:1], seeds=call.seeds[:1], guidance=1.0)
        fn = self._guided(one, embedding, options.get("noise_level", 0))
        z = self.decoder.space.encode(pixels, self.decoder.device)
        return self.decoder.invert(fn, z, call.grid, iterations=options.get("iterations", 4)), call

    @torch.no_grad()
    def _decode(
        self,
        task: str,
        call: Call,
        embedding: ImageEmbedding,
        options: Mapping[str, Any],
        facts: Mapping[str, Any],
        *,
        replayable: bool = False,
        concat: Tensor | None = None,
        wrap: Any = None,
        finish: Finish | None = None,
        window: int | None = None,
    ) -> Images:
        """The pictures of embeddings, with their recipe; ``finish``: what is done to them before they are
        enlarged."""
        for watcher in self.watchers:
            watcher.begin(call)
        fn = self._guided(call, embedding, options.get("noise_level", 0), concat, window)
        hook = all_hooks(call.on_step, *(watcher.step for watcher in self.watchers))
        x = self.decoder.run(
            fn if wrap is None else wrap(fn),
            self.decoder.start(call, self.decoder.shape(call)),
            call,
            hook=hook,
        )
        pixels = self.decoder.space.decode(x) if finish is None else finish(self.decoder.space.decode(x))
        if options.get("upsample", True):
            for k, stage in enumerate(self.upsamplers):
                own = options_of("upsampler", options, UPSAMPLER_OPTIONS)
                own = (
                    own
                    if k == 0
                    else {name: value for name, value in own.items() if name in ("steps", "sampler")}
                )
                own = {
                    "height": _grown(stage, pixels, 0, self),
                    "width": _grown(stage, pixels, 1, self),
                    **own,
                }
                pixels = stage(
                    pixels,
                    stage.settle(list(call.prompts), seed=call.seeds, progress=call.progress, **own),
                    tile=options.get("tile"),
                )
        flagged = None
        if self.safety is not None:
            flagged = self.safety(pixels)
            pixels = self.safety.hide(pixels, flagged)
        said = {**call.recipe(task), **facts}
        recipe = stamp(
            self.card.name,
            said,
            device=self.device,
            dtype=self.dtype,
            origin=self.origin,
            replayable=replayable,
        )
        images = Images(
            tensor=pixels,
            seeds=call.seeds,
            prompts=tuple(map(str, call.prompts)),
            recipe=recipe,
            flagged=flagged,
        )
        for watcher in self.watchers:
            watcher.end(images)
        return images


def _grown(stage: UpsamplerStage, pixels: Tensor, side: int, model: UnCLIP) -> int:
    """The side of the enlarged picture: as many times larger as the card's sizes say."""
    cards = [model.card.decoder, *(upsampler.card for upsampler in model.upsamplers)]
    before = cards[[id(upsampler) for upsampler in model.upsamplers].index(id(stage))].defaults
    return pixels.shape[-2 + side] * stage.card.defaults.height // before.height
