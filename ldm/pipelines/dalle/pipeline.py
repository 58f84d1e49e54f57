"""`DalleMini`: text → image tokens → image (Dayma et al. 2021; Ramesh et al. 2021)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.catalog.dalle_cards import DalleCard
from ldm.conditioning.clip import ClipPair
from ldm.conditioning.exemplars import ExemplarConditioner
from ldm.conditioning.token_texts import ExemplarTexts, TextStates, encode_condition, token_texts
from ldm.diffusion.cond import Cond
from ldm.images.canvas import Canvas
from ldm.images.result import Images
from ldm.models.dalle.decoder import DalleDecoder
from ldm.models.dalle.encoder import DalleEncoder, StateEncoder
from ldm.models.dalle.sampling import draw_tokens, super_conditioned
from ldm.models.safety import SafetyChecker
from ldm.models.text.byte_bpe import ByteTokenizer
from ldm.pipelines.call import named_options
from ldm.pipelines.checks import warn_unknown_words
from ldm.pipelines.dalle.token_call import OnToken, TokenCall, settle_tokens
from ldm.pipelines.dalle.token_fit import TokenFit, fitted_texts
from ldm.pipelines.dalle.token_images import ABSENT, TokenImages
from ldm.pipelines.dalle.token_tasks import token_inpaint, token_variations
from ldm.pipelines.image_pipeline import ImagePipeline
from ldm.pipelines.replayable import BY_OPTIONS, replayable
from ldm.pipelines.tasks.rerank import best_by_clip
from ldm.support.calls import checkpoint, in_separate_call
from ldm.support.device import computing_dtype
from ldm.support.memory import release_unchanged
from ldm.support.progress import progress_bar
from ldm.support.text import shown
from ldm.support.warn import warn_user


class CutPrompt(UserWarning):
    """A prompt has more tokens than the model reads; the rest is left out."""


class DalleMini(ImagePipeline):
    """A model that writes the tokens of an image after those of a text, ready to sample.

    Args:
        encoder: Ids of texts → states; or states of a text tower and canvases of exemplars → states.
        decoder: States → image tokens.
        vae: The autoencoder of the tokens, or its decoder alone.
        card: The model's card.
        tokenizer: Texts → ids, for an encoder of ids. Default: none.
        text: The text tower, the prior over layouts and the library of an encoder of states. Default: none.
        origin: Hashes of the weights, for recipes.
        safety: Safety checker, applied to all images. Default: no check.
        clip: Both towers of a CLIP, for `rerank`. Default: none.

    Raises:
        ValueError: If the parts do not fit each other.
    """

    def __init__(
        self,
        *,
        encoder: DalleEncoder | StateEncoder,
        decoder: DalleDecoder,
        vae: nn.Module,
        card: DalleCard,
        tokenizer: ByteTokenizer | None = None,
        text: ExemplarConditioner | None = None,
        origin: Mapping[str, Any] | None = None,
        safety: SafetyChecker | None = None,
        clip: ClipPair | None = None,
    ) -> None:
        super().__init__(origin=origin, safety=safety, text=text)
        self.encoder, self.decoder, self.vae = encoder, decoder, vae
        self.tokenizer, self.text, self.card = tokenizer, text, card
        self.clip = clip
        self.texts = token_texts(encoder, tokenizer, text, self.grid)
        self._check_parts()

    def _check_parts(self) -> None:
        """Raise ValueError if the parts do not fit each other."""
        own, card, images = self.decoder.config, self.card, self.images
        if self.encoder.config.width != own.width:
            raise ValueError(f"the encoder is {self.encoder.config.width} wide, the decoder {own.width}")
        if card.side % images.factor or own.length != (card.side // images.factor) ** 2:
            raise ValueError(
                f"the decoder writes {own.length} tokens, expected those of {card.side}×{card.side} pixels,"
                f" one for {images.factor}×{images.factor}"
            )
        if images.codes > own.vocabulary or card.start > own.vocabulary:
            raise ValueError(
                f"the decoder knows {own.vocabulary} tokens, expected the {images.codes} of the autoencoder"
                f" and the start, {card.start}"
            )

    @property
    def name(self) -> str:
        """Name of the model, from its card."""
        return self.card.name

    @property
    def side(self) -> int:
        """Side of an image in pixels."""
        return self.card.side

    @property
    def grid(self) -> int:
        """Side of the grid of an image's tokens."""
        return self.side // self.images.factor

    @property
    def drawing(self) -> nn.Module:
        """The decoder of tokens."""
        return self.decoder

    @property
    def device(self) -> torch.device:
        """Device that the decoder computes on."""
        return self.decoder.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype that the decoder computes in; guidance and the choice of tokens are in float32."""
        return computing_dtype(self.decoder) or torch.float32

    @property
    def images(self) -> TokenImages:
        """The autoencoder and the range of its images."""
        return TokenImages(self.vae, self.card.signed)

    def networks(self) -> dict[str, nn.Module]:
        """Return the networks by part: "encoder", "decoder", "vae"; with exemplars also "text", "layout"."""
        return {**self.texts.networks(), "decoder": self.decoder, "vae": self.vae}

    def text_to_image(
        self,
        prompt: str | Sequence[str],
        *,
        n: int | None = None,
        negative: str | Sequence[str] = "",
        seed: int | Sequence[int] | None = 0,
        guidance: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        progress: bool = True,
        on_step: OnToken | None = None,
        keep_steps: bool = False,
        **options: Any,
    ) -> Images:
        """Draw images of a prompt, or of several.

        Args:
            prompt: One prompt or several.
            n: Number of images of each prompt. Default: the card's (4).
            negative: What to guide away from, in place of the empty text: one text for all images, or one for
                each prompt or each image.
            seed: Image i has seed `seed` + i; or one seed for each image; None: random ones. A token depends
                on its logits and on (seed, position) alone.
            guidance: Factor a of super-conditioning: logits are l_u·(1 − a) + l_c·a. Default: the card's
                (16).
            temperature: Divisor of the logits; 0 takes the most probable token. Default: the card's (1).
            top_k: Number of the most probable tokens that are drawn from. Default: the card's (256).
            top_p: Of these, the most probable ones with this probability together, in (0, 1]. Default: the
                card's (1).
            progress: Whether to show a progress bar, on a terminal.
            on_step: Called after every token as (number of tokens, tokens (B, N) with −1 where there is none
                yet, function that decodes them to images with grey in place of what is not there).
            keep_steps: Whether to decode after every row of tokens, for `Images.animate`.
            options: `height` and `width`, which may be given if they are the model's.

        Returns:
            Images in [0, 1], with seeds and recipe.

        Raises:
            ValueError: If an option is unknown or out of range.

        Warns:
            CutPrompt: If a prompt has more tokens than the model reads.
            UnknownWords: If a prompt has words that a model with exemplars does not know.
        """
        asked = named_options(locals())
        return self.draw(self.settle(prompt, **asked, **options), "text_to_image")

    variations = replayable(token_variations)
    inpaint = replayable(token_inpaint)
    rerank = best_by_clip

    def settle(self, prompt: Any, **options: Any) -> TokenCall:
        """Settle the options of a call (see `text_to_image`), and warn of unknown words and cut prompts."""
        call = settle_tokens(self.card, prompt, **options)
        texts = [*dict.fromkeys((*call.prompts, *call.negatives))]
        warn_unknown_words(self.name, self.text, texts)
        length, cut = self.texts.cut(texts)
        if cut:
            warn_user(
                f"{self.name} reads {length} tokens of a prompt; the rest is cut: {shown(cut[0])}", CutPrompt
            )
        return call

    @in_separate_call
    @torch.no_grad()
    def draw(
        self,
        call: TokenCall,
        task: str,
        *,
        known: Tensor | None = None,
        given: Tensor | None = None,
        canvas: Canvas | None = None,
        **facts: Any,
    ) -> Images:
        """Draw the images of a call: encode the texts, draw the tokens, decode them.

        Each network leaves memory behind its part, if it is mapped from a file and unchanged.

        Args:
            call: The settled options.
            task: Name of the task, for the recipe.
            known: Tokens (B, h, w) that are kept; −1 where one is drawn. None: all are drawn.
            given: Images (1 or B, 3, H, W) that a model with exemplars is shown where no prompt names any.
            canvas: Images whose known pixels are put back.
            facts: What the recipe states besides.
        """

        def finished(tokens: Tensor) -> Tensor:
            pixels = self.images.preview(tokens.view(-1, self.grid, self.grid))
            if canvas is None:
                return pixels
            return canvas.finish(pixels, seam=facts["seam"], feather=facts["feather"])

        kept: list[Tensor] = []
        tokens = torch.empty(0, dtype=torch.long, device=self.device)
        for count, tokens in self.drawn(call, None if known is None else known.flatten(1), given):
            if call.on_step is not None:
                seen = tokens.clone()
                call.on_step(count, seen, lambda seen=seen: finished(seen))  # type: ignore[misc]
            if call.keep_steps and count % self.grid == 0:
                kept.append(finished(tokens))
        pixels = kept[-1] if kept else finished(tokens)
        release_unchanged(self.vae.parameters())
        return self._recorded(
            pixels,
            call.recipe(task),
            facts,
            seeds=call.seeds,
            prompts=call.prompts,
            replayable=call.on_step is None and task in BY_OPTIONS,
            steps=torch.stack(kept) if kept else None,
        )

    def drawn(
        self, call: TokenCall, known: Tensor | None = None, given: Tensor | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield, after every token, the number of tokens and all tokens (B, N), −1 where there is none yet.

        The tokens are one tensor, which is written to. Call it inside `torch.no_grad()`.

        Args:
            call: The settled options.
            known: Tokens (B, N) that are kept, and −1 where one is drawn. Default: None, all are drawn.
            given: See `draw`. Default: None.
        """
        length, codes = self.decoder.config.length, self.images.codes
        branches = 2 if call.guidance not in (0, 1) else 1
        cache = self.decoder.begin(*self._read(call, known, given))
        release_unchanged(p for network in self.texts.networks().values() for p in network.parameters())
        tokens = torch.full((len(call.seeds), length), ABSENT, device=self.device)  # (B, N)
        kept = tokens if known is None else known.to(self.device)
        start = torch.full((len(call.seeds), 1), self.card.start, device=self.device)
        ahead = int((kept == ABSENT).any(0).long().argmax()) if bool((kept == ABSENT).any()) else length - 1
        if ahead:  # the first tokens are known: they are read at once
            read = torch.cat([start, kept[:, :ahead]], dim=1)[:, :-1]
            self.decoder.advance(read.repeat(branches, 1), cache)
            tokens[:, :ahead] = kept[:, :ahead]
        with progress_bar(length, call.progress, desc=self.name, initial=ahead) as bar:
            for i in range(ahead, length):
                last = (tokens[:, i - 1 : i] if i else start).repeat(branches, 1)  # (branches·B, 1)
                logits = self.decoder.advance(last, cache)[:, :codes].float()  # (branches·B, codes)
                if branches == 2:
                    uncond, prompted = logits.chunk(2)  # (B, codes) each
                    logits = super_conditioned(uncond, prompted, call.guidance)
                new = draw_tokens(
                    logits,
                    call.seeds,
                    i,
                    temperature=call.temperature,
                    top_k=call.top_k,
                    top_p=call.top_p,
                )  # (B,)
                tokens[:, i] = torch.where(kept[:, i] == ABSENT, new, kept[:, i])
                bar.update()
                checkpoint(i + 1, length)
                yield i + 1, tokens
        release_unchanged(self.decoder.parameters())

    def _read(self, call: TokenCall, known: Tensor | None, given: Tensor | None) -> TextStates:
        """Return the states of the negative prompts, those of the prompts behind them, or one of both.

        The layout of exemplars fits the known tokens; see `drawn` for the arguments.
        """
        texts, seeds = self.texts, call.seeds
        negatives = call.negatives if call.guidance != 1 else ()
        prompts = call.prompts if call.guidance != 0 else ()
        if known is None or not prompts or not isinstance(texts, ExemplarTexts):
            both = (*negatives, *prompts)
            return texts(both, seeds * (len(both) // len(seeds)))
        if given is not None and not any(prompts):
            own = texts.conditioner.shown(given).expand(len(seeds))
        else:
            fit = TokenFit(text=texts.conditioner, texts=texts, decoder=self.decoder, start=self.card.start)
            own = fitted_texts(fit, prompts, seeds, known.to(self.device))
        conds = [texts.condition(negatives, seeds), own] if negatives else [own]
        return encode_condition(texts.encoder, Cond.cat(conds))
