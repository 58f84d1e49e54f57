"""Training of a model that writes image tokens after a text: cross-entropy given the tokens before.

Ramesh et al. 2021, section 2.2. The tokens are those of a frozen vector-quantized autoencoder, computed once
for each cached sample. Texts are spelled byte by byte, or read by a frozen text tower.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.conditioning.prompt import escape_prompt
from ldm.conditioning.token_texts import EncodedTexts, TextStates, TokenTexts, TowerTexts
from ldm.models.dalle.decoder import DalleDecoder, DalleDecoderConfig
from ldm.models.dalle.encoder import DalleEncoder, DalleEncoderConfig, StateEncoder, StateEncoderConfig
from ldm.models.dalle.sampling import draw_tokens
from ldm.models.patch_vq import PatchVQ
from ldm.models.text.byte_bpe import ByteTokenizer
from ldm.models.vq import VQModel
from ldm.training.config import RunConfig, check_at_least
from ldm.training.draws import Draws
from ldm.training.images import comparison_grid
from ldm.training.inputs.opening import DataSection, open_images
from ldm.training.inputs.protocol import Samples
from ldm.weights.formats.ldm_folder import begin_with, read_network, read_text, write_part

BYTE = 256  # cached numbers have 16 bits of floating point, so a token is kept as two of them


@dataclass(frozen=True, kw_only=True)
class TokenTraining:
    """The configuration of the training of a text encoder and a decoder of image tokens.

    Args:
        run: Length, batches and optimizer.
        data: The training images.
        vae: Folder of a vector-quantized autoencoder, which is frozen.
        variants: Number of cached scenes that are not plain; see `CachedScenes`.
        encoder: Shape of the text encoder, of ids or of a text tower's states.
        decoder: Shape of the decoder.
        text: Folder of a text tower, which is frozen, for an encoder of states; None for one of ids.
            Default: None.
        drop: Probability that a caption is left out, for super-conditioning. Default: 0.1.
        corrupt: Highest share of an image's tokens that are read wrong, as those of another image at the same
            places; the share is uniform between 0 and this. A decoder that only sees right tokens relies on
            them more than on the text, and does not recover from an unlikely draw. Default: 0.
        net: Folder of an encoder and a decoder to begin with; None to begin from scratch. Default: None.
    """

    run: RunConfig
    data: DataSection
    vae: str
    variants: int
    encoder: DalleEncoderConfig | StateEncoderConfig
    decoder: DalleDecoderConfig
    text: str | None = None
    drop: float = 0.1
    corrupt: float = 0.0
    net: str | None = None

    def __post_init__(self) -> None:
        check_at_least(0, variants=self.variants, drop=self.drop, corrupt=self.corrupt)
        for name, value in (("drop", self.drop), ("corrupt", self.corrupt)):
            if value > 1:
                raise ValueError(f"{name}: expected at most 1, got {value}")
        if self.encoder.width != self.decoder.width:
            raise ValueError(
                f"decoder.width: expected that of the encoder, {self.encoder.width}, got {self.decoder.width}"
            )
        if (self.text is None) != isinstance(self.encoder, DalleEncoderConfig):
            raise ValueError(
                "encoder: expected the shape of an encoder of ids (vocabulary, length) without text, or of"
                " states (text_width) with the folder of a text tower in text"
            )


class TokenPart:
    """A text encoder and a decoder of image tokens in training."""

    def __init__(self, config: TokenTraining, device: torch.device) -> None:
        self.config, self.device = config, device
        self.images = open_images(config.data, config.run, validates_held_out=True)
        vae, about = read_network(config.vae, "vae")
        if not isinstance(vae, VQModel | PatchVQ):
            raise ValueError(
                f"vae: expected a VQModel or a PatchVQ in {config.vae!r}, got a {type(vae).__name__}"
            )
        self.vae, grid = vae.to(device), config.data.size // vae.config.factor
        if config.decoder.length != grid**2 or config.decoder.vocabulary < vae.config.codes:
            raise ValueError(
                f"decoder: expected length {grid**2} and at least {vae.config.codes} tokens, those of the"
                f" autoencoder, got {config.decoder.length} and {config.decoder.vocabulary}"
            )
        torch.manual_seed(config.run.seed)
        self.texts = self._make_texts()
        self.encoder = self.texts.networks()["encoder"]
        self.decoder = DalleDecoder(config.decoder).to(device)
        self.model = nn.ModuleDict({"encoder": self.encoder, "decoder": self.decoder})
        if config.net is not None:
            for part, network in self.model.items():
                begin_with(network, config.net, part)
        self.scenes = self.images.cached(config.run, config.variants)
        self.tokens = self.scenes.cached("tokens", about["sha256"], (2, grid**2), self._halves)

    def _make_texts(self) -> TokenTexts:
        """Return what reads captions, with a new encoder."""
        config = self.config.encoder
        if isinstance(config, StateEncoderConfig):
            assert self.config.text is not None
            tower = read_text(self.config.text).to(self.device).eval().requires_grad_(False)
            return TowerTexts(tower, StateEncoder(config).to(self.device))
        tokenizer = ByteTokenizer.spelling()
        if config.vocabulary < len(tokenizer):
            raise ValueError(
                f"encoder.vocabulary: expected at least {len(tokenizer)}, got {config.vocabulary}"
            )
        return EncodedTexts(tokenizer, DalleEncoder(config).to(self.device))

    def _halves(self, samples: Samples) -> Tensor:
        """Return the tokens of samples as numbers of two bytes, (B, 2, N)."""
        tokens = self.encode(samples)
        return torch.stack([tokens // BYTE, tokens % BYTE], dim=1)

    @torch.no_grad()
    def encode(self, samples: Samples) -> Tensor:
        """Return the tokens (B, N) of samples."""
        x = self.images.tensor(samples).to(self.device)
        return self.vae.indices(self.vae.encode(x).mode()).flatten(1)

    def read(self, captions: Sequence[str]) -> TextStates:
        """Return the states of captions, whose signs have no meaning as a prompt's have."""
        tower = isinstance(self.texts, TowerTexts)
        return self.texts([escape_prompt(caption) for caption in captions] if tower else captions)

    def logits(self, seen: Tensor, captions: Sequence[str]) -> Tensor:
        """Return the logits (B, N, vocabulary + 1) after each of the tokens `seen` (B, N), given captions."""
        start = torch.full_like(seen[:, :1], self.config.decoder.vocabulary)
        read = torch.cat([start, seen[:, :-1]], dim=1)
        return self.decoder(read, *self.read(captions))

    def losses(self, tokens: Tensor, captions: Sequence[str], seen: Tensor | None = None) -> Tensor:
        """Return the mean cross-entropy of the tokens (B, N) of each image, in nats, (B,).

        Args:
            tokens: The tokens that are right.
            captions: Their captions.
            seen: What is read as the tokens before each one, shape (B, N). Default: the tokens.
        """
        logits = self.logits(tokens if seen is None else seen, captions).float()
        return F.cross_entropy(logits.movedim(-1, 1), tokens, reduction="none").mean(1)

    def loss(self, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the cross-entropy of the tokens of a random batch."""
        chosen, rows = self.scenes.draw(draws)
        tokens = self._cached(rows)  # (B, N)
        captions = self.images.captions(chosen, draws, drop=self.config.drop)
        return draws.mean(self.losses(tokens, captions, self._corrupted(tokens, draws))), {}

    def _cached(self, rows: Sequence[int]) -> Tensor:
        """Return the cached tokens (B, N) of rows."""
        halves = torch.as_tensor(np.asarray(self.tokens[rows], dtype=np.int64), device=self.device)
        return halves[:, 0] * BYTE + halves[:, 1]

    def _corrupted(self, tokens: Tensor, draws: Draws) -> Tensor:
        """Return tokens (B, N) with a random share of those of other images."""
        if not self.config.corrupt:
            return tokens
        others = self._cached([int(rng.integers(len(self.tokens))) for rng in draws.rngs])  # (B, N)
        shares = [self.config.corrupt * rng.random() for rng in draws.rngs]
        wrong = [rng.random(tokens.shape[1]) < share for rng, share in zip(draws.rngs, shares, strict=True)]
        return torch.where(torch.as_tensor(np.stack(wrong), device=self.device), others, tokens)

    def describe_batch(self, draws: Draws) -> list[str]:
        """Return the captions of the samples that `loss` draws."""
        return self.images.describe(self.scenes.draw(draws)[0])

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Return the cross-entropy of 128 held-out images with and without their captions.

        In bits for each number of the images, of which each token stands for several.
        """
        chosen = self.images.held_out(128)
        tokens, captions = self.encode(chosen), self.images.describe(chosen)
        scale = self.config.decoder.length / (3 * self.config.data.size**2) / math.log(2)
        none = [""] * len(captions)
        figures = {"bits": captions, "bits_without_text": none}
        return {name: scale * self._mean(tokens, texts) for name, texts in figures.items()}

    def _mean(self, tokens: Tensor, captions: Sequence[str]) -> float:
        parts = [self.losses(tokens[i : i + 32], captions[i : i + 32]) for i in range(0, len(tokens), 32)]
        return float(torch.cat(parts).mean())

    @torch.no_grad()
    def sample(self, captions: Sequence[str], *, seed: int = 0) -> Tensor:
        """Draw the tokens (B, N) of captions; the first one has the seed `seed`."""
        codes, seeds = self.vae.config.codes, range(seed, seed + len(captions))
        cache = self.decoder.begin(*self.read(captions))
        made = [torch.full((len(captions),), self.config.decoder.vocabulary, device=self.device)]  # the start
        for i in range(self.config.decoder.length):
            logits = self.decoder.advance(made[-1][:, None], cache)[:, :codes].float()
            made.append(draw_tokens(logits, seeds, i, top_k=codes))
        return torch.stack(made[1:], dim=1)

    @torch.no_grad()
    def preview(self) -> np.ndarray:
        """Show held-out images, each with one that is drawn of its caption."""
        samples = self.images.held_out(16)
        grid = self.config.data.size // self.vae.config.factor
        drawn = self.vae.decode_indices(self.sample(self.images.describe(samples)).unflatten(1, (grid, grid)))
        return comparison_grid(self.images.tensor(samples).to(self.device), drawn, columns=8)

    def export(self, folder: Path, record: Mapping[str, object]) -> None:
        """Write the encoder and the decoder, in bfloat16, which a zip archive stores in fewer bytes."""
        figures, dtype = self.validate(), torch.bfloat16
        write_part(folder, "encoder", self.encoder, self.config.encoder, dtype=dtype, training=record)
        write_part(
            folder,
            "decoder",
            self.decoder,
            self.config.decoder,
            dtype=dtype,
            figures=figures,
            training=record,
        )
