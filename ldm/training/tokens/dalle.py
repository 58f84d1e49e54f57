"""Training of a model that writes image tokens after a text: cross-entropy given the tokens before.

Ramesh et al. 2021, section 2.2. The tokens are those of a frozen vector-quantized autoencoder, computed once
for each cached sample. Texts are spelled byte by byte, or read by the frozen text tower of a model with
exemplars, which are shown where the image shows them (Yasunaga et al. 2022; Blattmann et al. 2022).
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

from ldm.conditioning.things import SLOT_WORDS
from ldm.conditioning.token_texts import EncodedTexts, TextStates
from ldm.models.dalle.decoder import DalleDecoder, DalleDecoderConfig
from ldm.models.dalle.encoder import DalleEncoder, DalleEncoderConfig, StateEncoder, StateEncoderConfig
from ldm.models.dalle.sampling import draw_tokens
from ldm.models.patch_vq import PatchVQ
from ldm.models.text.byte_bpe import ByteTokenizer
from ldm.models.vq import VQModel
from ldm.training.config import RunConfig, check_at_least
from ldm.training.draws import Draws
from ldm.training.images import comparison_grid
from ldm.training.inputs.emoji import emoji_only
from ldm.training.inputs.opening import DataSection, open_images
from ldm.training.inputs.protocol import Samples
from ldm.training.tokens.texts import CaptionReader, SceneReader, TokenReader
from ldm.weights.formats.ldm_folder import SLOT_TEXT, begin_with, read_network, read_text, write_part

BYTE = 256  # cached numbers have 16 bits of floating point, so a token is kept as two of them


@dataclass(frozen=True, kw_only=True)
class TokenTraining:
    """The configuration of the training of a text encoder and a decoder of image tokens.

    Args:
        run: Length, batches and optimizer.
        data: The training images; with exemplars, the emoji data set.
        vae: Folder of a vector-quantized autoencoder, which is frozen.
        variants: Number of cached scenes: with exemplars, of all; otherwise, of those that are not plain; see
            `CachedScenes`.
        encoder: Shape of the text encoder, of ids or of a text tower's states and exemplars.
        decoder: Shape of the decoder.
        text: Folder of the text tower of a model with exemplars, which is frozen, for an encoder of states;
            None for one of ids. Default: None.
        drop: Probability that a caption, and what is shown with it, is left out, for super-conditioning.
            Default: 0.1.
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
        if isinstance(self.encoder, StateEncoderConfig):
            check_at_least(1, variants=self.variants)
            if self.encoder.slots > len(SLOT_WORDS):
                raise ValueError(f"encoder.slots {self.encoder.slots}: expected 1 to {len(SLOT_WORDS)}")


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
        self.vae, self.grid = vae.to(device), config.data.size // vae.config.factor
        self._check_shapes()
        torch.manual_seed(config.run.seed)
        self.reader = self._make_reader()
        self.encoder = self.reader.encoder
        self.decoder = DalleDecoder(config.decoder).to(device)
        if isinstance(vae, PatchVQ) and isinstance(self.encoder, StateEncoder):
            assert vae.project.bias is not None
            scale = self.decoder.use_codes(vae.quantize.embedding.weight)
            self.encoder.use_basis(vae.project.weight, vae.project.bias, scale)
        self.model = nn.ModuleDict({"encoder": self.encoder, "decoder": self.decoder})
        if config.net is not None:
            for part, network in self.model.items():
                begin_with(network, config.net, part)
        self.tokens = self.reader.samples.cached("tokens", about["sha256"], (2, self.grid**2), self._halves)

    def _check_shapes(self) -> None:
        """Raise ValueError unless the networks have the tokens and the cells of the autoencoder."""
        own, vae = self.config, self.vae.config
        if own.decoder.length != self.grid**2 or own.decoder.vocabulary < vae.codes:
            raise ValueError(
                f"decoder: expected length {self.grid**2} and at least {vae.codes} tokens, those of the"
                f" autoencoder, got {own.decoder.length} and {own.decoder.vocabulary}"
            )
        if isinstance(own.encoder, StateEncoderConfig) and own.encoder.cell != vae.factor:
            raise ValueError(
                f"encoder.cell: expected {vae.factor}, the factor of the autoencoder, got {own.encoder.cell}"
            )

    def _make_reader(self) -> TokenReader:
        """Return what reads samples, with a new encoder."""
        own, config = self.config, self.config.encoder
        if isinstance(config, StateEncoderConfig):
            assert own.text is not None
            tower = read_text(own.text, SLOT_TEXT).to(self.device).eval().requires_grad_(False)
            encoder = StateEncoder(config).to(self.device)
            return SceneReader(tower, encoder, emoji_only(self.images, "text"), own.run, own.variants)
        tokenizer = ByteTokenizer.spelling()
        if config.vocabulary < len(tokenizer):
            raise ValueError(
                f"encoder.vocabulary: expected at least {len(tokenizer)}, got {config.vocabulary}"
            )
        texts = EncodedTexts(tokenizer, DalleEncoder(config).to(self.device))
        return CaptionReader(texts, self.images, own.run, own.variants)

    def _halves(self, samples: Samples) -> Tensor:
        """Return the tokens of samples as numbers of two bytes, (B, 2, N)."""
        tokens = self.encode(samples)
        return torch.stack([tokens // BYTE, tokens % BYTE], dim=1)

    @torch.no_grad()
    def encode(self, samples: Samples) -> Tensor:
        """Return the tokens (B, N) of samples."""
        x = self.images.tensor(samples).to(self.device)
        return self.vae.indices(self.vae.encode(x).mode()).flatten(1)

    def losses(self, tokens: Tensor, seen: Tensor, texts: TextStates) -> Tensor:
        """Return the mean cross-entropy of the tokens (B, N) of each image, in nats, (B,).

        Args:
            tokens: The tokens that are right.
            seen: What is read as the tokens before each one, shape (B, N).
            texts: The states of B texts.
        """
        start = torch.full_like(seen[:, :1], self.config.decoder.vocabulary)
        read = torch.cat([start, seen[:, :-1]], dim=1)
        logits = self.decoder(read, texts.states, texts.mask, texts.shown).float()  # (B, N, vocabulary + 1)
        return F.cross_entropy(logits.movedim(-1, 1), tokens, reduction="none").mean(1)

    def loss(self, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the cross-entropy of the tokens of a random batch."""
        chosen, rows = self.reader.draw(draws)
        tokens = self._cached(rows)  # (B, N)
        texts = self.reader.drawn(chosen, draws, self.config.drop)
        return draws.mean(self.losses(tokens, self._corrupted(tokens, draws), texts)), {}

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
        return self.images.describe(self.reader.draw(draws)[0])

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Return the cross-entropy of 128 held-out images with and without their captions.

        In bits for each number of the images, of which each token stands for several. What exemplars show is
        left out with the captions.
        """
        chosen = self.images.held_out(128)
        scale = self.config.decoder.length / (3 * self.config.data.size**2) / math.log(2)
        given, without = [], []
        for start in range(0, len(chosen), 32):
            part = chosen[start : start + 32]
            tokens = self.encode(part)
            given.append(self.losses(tokens, tokens, self.reader.canonical(part)))
            without.append(self.losses(tokens, tokens, self.reader.nothing(len(part))))
        figures = {"bits": given, "bits_without_text": without}
        return {name: scale * float(torch.cat(losses).mean()) for name, losses in figures.items()}

    @torch.no_grad()
    def sample(self, texts: TextStates, *, seed: int = 0) -> Tensor:
        """Draw the tokens (B, N) of B images; the first one has the seed `seed`."""
        codes, seeds = self.vae.config.codes, range(seed, seed + len(texts.states))
        cache = self.decoder.begin(*texts)
        made = [torch.full((len(seeds),), self.config.decoder.vocabulary, device=self.device)]  # the start
        for i in range(self.config.decoder.length):
            logits = self.decoder.advance(made[-1][:, None], cache)[:, :codes].float()
            made.append(draw_tokens(logits, seeds, i, top_k=codes))
        return torch.stack(made[1:], dim=1)

    @torch.no_grad()
    def preview(self) -> np.ndarray:
        """Show held-out images, each with one that is drawn of its caption."""
        samples = self.images.held_out(16)
        tokens = self.sample(self.reader.canonical(samples)).unflatten(1, (self.grid, self.grid))
        drawn = self.vae.decode_indices(tokens)
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
