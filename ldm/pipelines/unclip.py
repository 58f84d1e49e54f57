"""unCLIP, the model behind DALL·E 2: text → image embedding → image → larger image (Ramesh et al. 2022)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ldm.catalog.unclip_cards import UnCLIPCard, upsampler_name
from ldm.conditioning.clip import ClipPair
from ldm.conditioning.exemplars import ExemplarConditioner
from ldm.conditioning.image_embedding import ImageEmbedding
from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.interfaces import OnStep
from ldm.images.pixels import ImageInput, to_pixels
from ldm.images.result import Images
from ldm.models.safety import SafetyChecker
from ldm.pipelines.base import BasePipeline
from ldm.pipelines.call import Call, named_options
from ldm.pipelines.checks import check_option, check_unit_interval, warn_unknown_words
from ldm.pipelines.conditions import Pair, expanded_pair
from ldm.pipelines.layouts import fitted_conditions, known_of
from ldm.pipelines.protocol import Begun, Request
from ldm.pipelines.replayable import replayable
from ldm.pipelines.stages.autoregressive import AutoregressiveStage
from ldm.pipelines.stages.decoder import DecoderStage
from ldm.pipelines.stages.prior import PriorStage
from ldm.pipelines.stages.stage import Stage
from ldm.pipelines.stages.upsampler import UpsamplerStage
from ldm.pipelines.tasks.deferred import defer
from ldm.pipelines.tasks.interpolate import embedding_interpolate
from ldm.pipelines.tasks.reconstruct import embedding_reconstruct
from ldm.pipelines.tasks.rerank import best_by_clip
from ldm.pipelines.tasks.text_difference import text_difference
from ldm.pipelines.tasks.truncated import truncated
from ldm.pipelines.tasks.variations import embedding_variations
from ldm.pipelines.unclip_options import SHARED, decoder_options, options_of, other_options, prior_options
from ldm.support.calls import in_separate_call
from ldm.support.scalars import python_scalar, python_scalars


class UnCLIP(BasePipeline):
    """An unCLIP model, ready to sample.

    Args:
        clip: The towers of CLIP.
        prior: Texts → image embeddings; None: the model takes embeddings and images only.
        decoder: Image embeddings → images.
        upsamplers: Images → larger images, from small to large.
        card: The model's card.
        origin: Hashes of the weights, for recipes.
        safety: Safety checker, applied to all images. Default: no check.

    Raises:
        ValueError: If the parts are of different CLIPs, or take embeddings of different widths.
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
        super().__init__(origin=origin, safety=safety, text=decoder.text)
        for part, name in (("CLIP", clip.name), ("prior", prior and prior.clip), ("decoder", decoder.clip)):
            if name is not None and name != card.clip:
                raise ValueError(
                    f"{card.name!r} runs on embeddings of {card.clip!r}, its {part} on those of {name!r}: two"
                    " CLIPs share no space"
                )
        widths = {"CLIP": clip.width, "decoder": decoder.width}
        widths |= {} if prior is None else {"prior": prior.net.config.embed_dim}
        if len(set(widths.values())) > 1:
            raise ValueError(f"{card.name!r}: expected embeddings of one width, got {widths}")
        self.clip, self.prior, self.decoder, self.card = clip, prior, decoder, card
        self.upsamplers = nn.ModuleList(upsamplers)

    @property
    def name(self) -> str:
        """Name of the model, from its card."""
        return self.card.name

    @property
    def stage(self) -> Stage:
        """The decoder's diffusion, which makes the image."""
        return replace(self.decoder.stage, name=self.name, concat=self.card.concat, guide=self.guide)

    def networks(self) -> dict[str, nn.Module]:
        """Return the networks by part.

        The parts are "decoder" and, where there are such, "text", "vision", "prior", "noise", "words",
        "layout", "vae", "upsampler" and "upsampler-last" (then "upsampler2", …).
        """
        own = self.decoder.text if self.decoder.text is not self.clip.text else None
        found: dict[str, nn.Module | None] = {
            "text": self.clip.text and self.clip.text.tower,
            "vision": self.clip.vision,
            "prior": self.prior and self.prior.net,
            "decoder": self.decoder.denoiser.net,
            "noise": self.decoder.augmentation,
            "vae": self.decoder.space.vae,
        }
        for k, stage in enumerate(self._upsamplers()):
            found[upsampler_name(k)] = stage.denoiser.net
            found[upsampler_name(k, last=True)] = stage.last and stage.last.net
        if own is not None:
            found["words"], *others = own.networks().values()
            found["layout"] = next(iter(others), None)
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
        seed: int | Sequence[int] | None = 0,
        height: int | None = None,
        width: int | None = None,
        latents: Tensor | None = None,
        candidates: int = 1,
        embedding: ImageEmbedding | None = None,
        progress: bool = True,
        on_step: OnStep | None = None,
        **options: Any,
    ) -> Images:
        """Draw images of a prompt, or of several.

        Args:
            prompt: One prompt or several.
            negative: What to guide away from: one text for all images, or one for each prompt or each image.
            n: Number of images of each prompt. Default: the card's (4).
            steps, guidance, sampler, grid, latents, on_step: The decoder's; see
                `LatentDiffusion.text_to_image`.
            seed: Image i has seed `seed` + i; or a sequence with one seed for each image; None: random
                seeds, which the recipe states.
            height, width: Size of the decoder's image in pixels. Default: the card's.
            candidates: Number of embeddings that the prior makes for each image, of which the one with the
                largest dot product with the text's embedding is taken.
            embedding: Image embeddings, one or one for each image, in place of the prior's.
            progress: Whether to show progress bars, on a terminal.
            options: `prior_steps`, `prior_guidance`, `prior_sampler`, `prior_latents` of the prior;
                `upsampler_steps`, `upsampler_sampler`, `upsampler_latents` of the upsamplers; `upsample`
                False for the decoder's image; `noise_level` of Stable unCLIP's embedding, 0 to 999; `tile`,
                the side that upsamplers see at a time; others are options of the decoder's sampler.

        Raises:
            ValueError: If the embedding is of another CLIP or width, the model has no prior, or an option is
                wrong.
        """
        asked = {name: value for name, value in named_options(locals()).items() if name != "embedding"}
        call = self.settle(prompt, **asked, **options)
        if embedding is None:
            return self.draw(call, Request(task="text_to_image"))
        given = embedding
        request = Request(task="text_to_image", pair=lambda size: self.conditions_of(call, given))
        images = self.draw(call, request)
        return replace(images, recipe={**images.recipe, "replayable": False})

    variations = replayable(embedding_variations)
    reconstruct = replayable(embedding_reconstruct)
    interpolate = replayable(embedding_interpolate)
    text_difference = replayable(text_difference)
    truncated = replayable(truncated)
    rerank = best_by_clip

    @in_separate_call
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
        """Sample image embeddings of prompts from the prior.

        Args:
            prompt: One prompt or several.
            n: Number of embeddings of each prompt.
            negative, seed, candidates, progress: As in `text_to_image`.
            options: The prior's options of `text_to_image`, which begin with "prior_".

        Raises:
            ValueError: If the model has no prior, or an option is not the prior's.
        """
        if self.prior is None:
            raise ValueError(
                f"{self.name!r} has no prior: give an embedding, or call variations with an image"
            )
        if strangers := [name for name in options if not name.startswith("prior_")]:
            raise ValueError(f"options {strangers} are none of the prior's, which begin with 'prior_'")
        candidates = python_scalar(candidates)
        check_option("candidates", candidates, SHARED["candidates"])
        own = options_of("prior", python_scalars(options), self.prior.options)
        prompts = prompt if isinstance(prompt, str) else list(prompt)
        call: Any = self.prior.settle(prompts, n=n, negative=negative, seed=seed, progress=progress, **own)
        embedding: ImageEmbedding = self.prior(self.clip, call, candidates=candidates)
        return embedding

    def embed(self, what: str | ImageInput, *, seed: int = 0, **options: Any) -> ImageEmbedding:
        """Return the embedding (1, E) of a text, by the prior, or of an image, by CLIP.

        Args:
            what: A text, or an image; a path is an image only as a `Path`.
            seed: Seed of the prior.
            options: Options of `imagine`.
        """
        if isinstance(what, str):
            return self.imagine(what, seed=seed, **options)
        found = self.clip.image_embedding(to_pixels(what))
        if len(found) != 1:
            raise ValueError(f"expected one text or one image, got {len(found)} images")
        return found

    def settle(self, prompt: Any, *, n: int | None = None, **options: Any) -> Call:
        """Settle the options of a call (see `text_to_image`), check them, and warn of unknown words."""
        options = python_scalars(options)
        if options.pop("keep_steps", False):
            raise ValueError("keep_steps: an unCLIP model keeps no steps; on_step sees the decoder's")
        n = self.card.pictures if n is None else n
        call = self.stage.settle(prompt, n=n, **decoder_options(options))
        self.stage.check_shape(call)
        call = replace(call, others=other_options(options))
        self._settle_others(call)
        own = self.decoder.text
        reader = own if isinstance(own, ExemplarConditioner) else self.clip.text
        warn_unknown_words(self.name, reader, (*call.prompts, *call.negatives))
        return call

    def _settle_others(self, call: Call) -> None:
        """Settle the options of the other stages, so that a wrong one is refused before any is run."""
        for name, annotation in SHARED.items():
            if name in call.others:
                check_option(name, call.others[name], annotation)
        if self.prior is not None:
            own = options_of("prior", call.others, self.prior.options)
            self.prior.settle(call.texts, seed=call.seeds, **own)
        for _ in self._enlargements(call, (call.height, call.width)):
            pass

    def conditions(self, call: Call) -> Pair:
        """Return the conditions of a call's prompts, by the prior's embeddings."""
        embedding = self.imagine(
            call.texts,
            negative=call.negative,
            seed=call.seeds,
            candidates=call.others.get("candidates", 1),
            progress=call.progress,
            **prior_options(call.others),
        )
        return self.conditions_of(call, embedding)

    def conditions_of(
        self,
        call: Call,
        embedding: ImageEmbedding,
        *,
        image: Tensor | None = None,
        named: Sequence[str] = (),
    ) -> Pair:
        """Return the conditions of embeddings, one or one for each image, with the texts of the call.

        `image` and `named` say what a decoder with exemplars is shown; see `DecoderStage.conditions`.
        """
        nothing = self.clip.black() if self.card.no_image == "black" else None
        level = call.others.get("noise_level", 0)
        return self.decoder.conditions(embedding, nothing, call, noise_level=level, image=image, named=named)

    @in_separate_call
    @torch.no_grad()
    def draw(self, call: Call, request: Request) -> Images:
        """Draw the images of a call: imagine their embeddings, decode and enlarge.

        Args:
            call: The settled options.
            request: What the task asks for besides; `pair` holds the conditions of given embeddings.
        """
        defer(call, request)
        begun = self.begin(call, request)
        for watcher in self.watchers:
            watcher.begin(call)
        x = self.stage.sample(
            begun.over, begun.x, begun.pair, known=request.known, window=request.window, hooks=self.hooks
        )
        images = self.complete(call, self.stage.images.decode(x), request)
        for watcher in self.watchers:
            watcher.end(images)
        return images

    def begin(self, call: Call, request: Request) -> Begun:
        """Return a drawing with its conditions and its first state; the arguments are `draw`'s."""
        stage, n = self.stage, len(call.seeds)
        shape = stage.shape(call)
        check_unit_interval(strength=request.strength)
        if request.pair is not None and call.others.get("candidates", 1) != 1:
            raise ValueError("candidates: the embeddings are given, so the prior makes none")
        pair = self.conditions(call) if request.pair is None else request.pair(shape[1:])
        pair = self._fitted(pair, call, request)
        start = None
        if request.given is not None and request.strength < 1:
            start = stage.encode(request.given).expand(n, *shape)
        over, x = stage.begin(call, start=start, strength=request.strength)
        return Begun(call=call, over=over, pair=expanded_pair(pair, n, **request.extra), x=x)

    def complete(self, call: Call, pixels: Tensor, request: Request) -> Images:
        """Return the decoder's images (B, 3, H, W), enlarged."""
        if request.finish is not None:
            pixels = request.finish(pixels)
        if request.enlarge and call.others.get("upsample", True):
            pixels = self.upsample(pixels, call)
        return self.finish_images(call, pixels, request)

    def _fitted(self, pair: Pair, call: Call, request: Request) -> Pair:
        """Return conditions whose exemplars lie where they fit what a request knows of the images."""
        text, vectors = self.decoder.text, pair[0].image_emb
        if vectors is None or not isinstance(text, ExemplarConditioner):
            return pair
        known = known_of(request, self.stage.encode)
        if known is None:
            return pair
        return fitted_conditions(text, self.decoder.denoiser, call, known, vectors), pair[1]

    def upsample(self, pixels: Tensor, call: Call) -> Tensor:
        """Enlarge the decoder's images (B, 3, h, w) by all upsamplers, as many times as their cards say."""
        for stage, larger in self._enlargements(call, pixels.shape[-2:]):
            pixels = stage(pixels, larger, tile=call.others.get("tile"))
        return pixels

    def _enlargements(self, call: Call, size: Sequence[int]) -> Iterator[tuple[UpsamplerStage, Call]]:
        """Yield the upsamplers with their calls, for the decoder's images of a size (h, w)."""
        before = self.card.decoder.defaults
        for stage in self._upsamplers():
            own = options_of("upsampler", call.others, UpsamplerStage.options)
            if stage.index > 0:  # sizes and latents are those of the first one
                own = {name: value for name, value in own.items() if name in ("steps", "sampler")}
            after = stage.card.defaults
            h, w = (side * after.height // before.height for side in size)
            own = {"height": h, "width": w, **own}
            larger = stage.settle(call.texts, seed=call.seeds, progress=call.progress, **own)
            yield stage, larger
            before, size = after, (larger.height, larger.width)

    def _upsamplers(self) -> list[UpsamplerStage]:
        return [stage for stage in self.upsamplers if isinstance(stage, UpsamplerStage)]
