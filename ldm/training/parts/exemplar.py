"""Training of a diffusion transformer that is shown exemplars, with its text tower and exemplar encoder.

Each batch shows the network the source images of the things in its scenes (Blattmann et al. 2022).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ldm.conditioning.conditioner import TextConditioner, TextConvention
from ldm.conditioning.exemplar_library import Exemplar, ExemplarLibrary, write_exemplar
from ldm.conditioning.things import SLOT_WORDS
from ldm.conditioning.words import words_in
from ldm.data import EmojiData, Scene
from ldm.data.captions import CaptionPieces, caption_pieces
from ldm.data.facts import STYLES
from ldm.data.noun_senses import noun_table
from ldm.data.rendering import THING_AREAS
from ldm.data.wording import grammar_words
from ldm.diffusion.cond import Cond
from ldm.diffusion.denoiser import Denoiser
from ldm.models.clip.towers import TextConfig, TextTower
from ldm.models.dit import DiT, DiTConfig
from ldm.models.exemplars import ExemplarConfig, ExemplarEncoder, multiplied
from ldm.models.patch_autoencoder import PatchAutoencoder
from ldm.models.text.bpe import Tokenizer
from ldm.training.caches.latents import LatentSpace
from ldm.training.config import DataConfig, RunConfig, check_at_least
from ldm.training.diffusion import DiffusionConfig, sample_latents
from ldm.training.draws import Draws
from ldm.training.images import image_grid, to_uint8
from ldm.training.inputs.emoji import CachedScenes, EmojiImages
from ldm.training.losses.common import diffusion_loss, draw_diffusion_loss
from ldm.training.losses.sights import SightLoss, record_sights, sight_losses, wanted_sights
from ldm.weights.formats.exemplar_file import write_library
from ldm.weights.formats.ldm_folder import write_part, write_text

SLOT_TEXT = TextConvention(length=None, pad=0, masked=True)
"""How the text tower of a model with exemplars is read."""


@dataclass(frozen=True, kw_only=True)
class SlotTextConfig:
    """Shape of the text tower, which is as wide as an exemplar's tokens.

    Args:
        layers: Number of blocks. Default: 2.
        heads: Attention heads. Default: 4.
        length: Largest number of tokens, with start and end. Default: 40.
    """

    layers: int = 2
    heads: int = 4
    length: int = 40

    def __post_init__(self) -> None:
        check_at_least(1, layers=self.layers, heads=self.heads, length=self.length)

    def make(self, width: int) -> TextConditioner:
        """Return a new text tower with the vocabulary of the captions' grammar and the slot words."""
        words = sorted({*grammar_words(), *SLOT_WORDS})
        tokenizer = Tokenizer(vocabulary=[i for word in words for i in Tokenizer().encode(word)])
        config = TextConfig(
            vocab_size=len(tokenizer),
            context_length=self.length,
            width=width,
            layers=self.layers,
            heads=self.heads,
            embed_dim=None,
            activation="gelu",
            bos_id=tokenizer.bos_id,
            eot_id=tokenizer.eot_id,
        )
        return TextConditioner(TextTower(config), tokenizer, SLOT_TEXT, frozenset(grammar_words()))


@dataclass(frozen=True, kw_only=True)
class ExemplarTraining:
    """The configuration of the training.

    Args:
        run: Length, batches and optimizer.
        data: The training images.
        vae: Folder of the autoencoder, a `PatchAutoencoder`.
        text: Shape of the text tower.
        exemplars: Shape of the exemplar encoder.
        model: Shape of the diffusion transformer.
        diffusion: Schedule, prediction and timesteps.
        sights: Weights of the losses of the transformer's views. Default: those of `SightLoss`.
        scenes: Number of cached scenes.
    """

    run: RunConfig
    data: DataConfig
    vae: str
    text: SlotTextConfig
    exemplars: ExemplarConfig
    model: DiTConfig
    diffusion: DiffusionConfig
    sights: SightLoss = field(default_factory=SightLoss)
    scenes: int

    def __post_init__(self) -> None:
        check_at_least(1, scenes=self.scenes)
        if self.model.context_dim != self.exemplars.width:
            raise ValueError(
                f"model.context_dim {self.model.context_dim}: expected exemplars.width {self.exemplars.width}"
            )
        if not self.model.views:
            raise ValueError("model.views: expected at least one block, by which exemplars are seen")
        if self.model.slots != self.exemplars.slots:
            raise ValueError(
                f"model.slots {self.model.slots}: expected exemplars.slots {self.exemplars.slots}"
            )
        if self.exemplars.slots > len(SLOT_WORDS):
            raise ValueError(f"exemplars.slots {self.exemplars.slots}: expected at most {len(SLOT_WORDS)}")


class ExemplarPart:
    """A diffusion transformer in training, with its text tower and exemplar encoder."""

    def __init__(self, config: ExemplarTraining, device: torch.device) -> None:
        self.config, self.device = config, device
        self.images = EmojiImages(config.data, validates_held_out=True)
        if config.exemplars.size != self.images.data.images.shape[1]:
            raise ValueError(
                f"exemplars.size {config.exemplars.size}: the data set's images have"
                f" {self.images.data.images.shape[1]} pixels"
            )
        self.scenes = CachedScenes.random(config.run, self.images, config.scenes)
        self.latents = LatentSpace.open(config.vae, self.scenes, device)
        torch.manual_seed(config.run.seed)
        self.text = config.text.make(config.exemplars.width).to(device)
        self.encoder = ExemplarEncoder(config.exemplars)
        vae = self.latents.vae
        if not isinstance(vae, PatchAutoencoder):
            raise ValueError(f"vae {config.vae!r}: expected a PatchAutoencoder, got {type(vae).__name__}")
        self.encoder.use_basis(vae.project.weight.cpu(), vae.project.bias.cpu())  # type: ignore[union-attr]
        self.net = DiT(config.model)
        zero_residuals(self.net)
        self.denoiser = Denoiser(self.net.to(device), config.diffusion.make(), config.diffusion.prediction)
        self.model = nn.ModuleDict({"net": self.net, "text": self.text, "exemplars": self.encoder.to(device)})

    def condition(self, scenes: Sequence[Scene | None], rngs: Sequence[np.random.Generator] | None) -> Cond:
        """Return the condition of scenes, whose captions generators vary.

        Args:
            scenes: B scenes; None for no condition.
            rngs: Draw the wordings, one for each scene; None for the canonical ones.
        """
        return self.ordered_condition(scenes, rngs)[0]

    def ordered_condition(
        self, scenes: Sequence[Scene | None], rngs: Sequence[np.random.Generator] | None
    ) -> tuple[Cond, list[list[int]]]:
        """Return the condition of scenes, and for each scene the thing of each slot; see `condition`."""
        slots, size = self.config.exemplars.slots, self.config.exemplars.size
        shown = np.zeros((len(scenes), slots, size, size, 4), dtype=np.uint8)
        texts, orders = [], []
        for i, scene in enumerate(scenes):
            rng, index = None if rngs is None else rngs[i], self.images.index
            text, order = ("", []) if scene is None else slot_text(caption_pieces(scene.facts, index, rng))
            for slot, thing in enumerate(order):
                assert scene is not None
                shown[i, slot] = self.images.data.images[scene.rows(thing)[0]]
            texts.append(text)
            orders.append(order)
        images = torch.from_numpy(shown).movedim(-1, 2).to(self.device).float() / 255  # (B, K, 4, S, S)
        tokens = self.encoder(images)  # (B, K·L, D)
        states = self.text.encode([self.text.tokenizer.encode(text) for text in texts])
        assert states.mask is not None
        per = self.config.exemplars.tokens
        counts = torch.tensor([len(order) for order in orders], device=self.device)
        used = torch.arange(slots * per, device=self.device) < per * counts[:, None]  # (B, K·L)
        cond = Cond(
            context=torch.cat([tokens, states.tokens.to(tokens.dtype)], dim=1),
            context_mask=torch.cat([used, states.mask], dim=1),
            exemplars=multiplied(images),
        )
        return cond, orders

    def loss(self, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a random batch, and to log the losses at high and at low t, and of the views."""
        diffusion, weights = self.config.diffusion, self.config.sights
        chosen, rows = self.draw(draws)
        x0 = self.latents.sample(rows, draws)  # (B, C, h, w)
        shown = draws.random() >= diffusion.drop
        kept = [scene if show else None for scene, show in zip(chosen, shown, strict=True)]
        cond, orders = self.ordered_condition(kept, draws.rngs)
        with record_sights(self.net) as sights:
            loss, losses, t = draw_diffusion_loss(self.denoiser, diffusion, x0, cond, draws)
        high = t >= diffusion.timesteps // 2
        side = x0.shape[-1] // self.config.model.patch
        maps, touched = wanted_sights(kept, orders, side, self.config.exemplars.slots)
        figures = sight_losses(sights, maps.to(self.device), touched.to(self.device), side, draws)
        loss = loss + weights.where * figures["where"] + weights.shown * figures["shown"]
        return loss, {
            "loss_high_t": draws.mean_of_some(losses[high]),
            "loss_low_t": draws.mean_of_some(losses[~high]),
            **figures,
        }

    def draw(self, draws: Draws) -> tuple[list[Scene], list[int]]:
        """Return the scenes of a step and their rows in the cache."""
        rows = [int(row) for row in draws.integers(len(self.scenes.rows))]
        return [self.scenes.rows[row] for row in rows], rows

    def describe_batch(self, draws: Draws) -> list[str]:
        """Return the captions of the samples that `loss` draws."""
        return self.images.describe(self.draw(draws)[0])

    def sample(
        self, scenes: Sequence[Scene], *, steps: int = 20, guidance: float = 1.0, seed: int = 0
    ) -> Tensor:
        """Sample images of the captions of scenes, with their exemplars.

        Args:
            scenes: B scenes.
            steps: Sampling steps. Default: 20.
            guidance: Guidance scale. Default: 1.
            seed: Seed of the first image. Default: 0.

        Returns:
            Images, (B, 3, H, W) in about [−1, 1].
        """
        z = sample_latents(
            self.denoiser,
            self.condition(scenes, None),
            self.condition([None], None),
            self.latents.shape,
            n=len(scenes),
            steps=steps,
            guidance=guidance,
            seed=seed,
        )
        return self.latents.decode(z)

    def validate(self) -> dict[str, float]:
        """Return the losses at fixed timesteps and noise.

        Of 64 scenes of the mix, and of 64 held-out images on white or on a background.
        """
        known = self.images.random(np.random.default_rng(7), 64)
        return {"loss": self.fixed_loss(known), "loss_held_out": self.fixed_loss(self.images.held_out(64))}

    def fixed_loss(self, scenes: Sequence[Scene]) -> float:
        """Return the mean loss of scenes at drawn timesteps and noise."""
        losses = []
        for start in range(0, len(scenes), 16):
            part = scenes[start : start + 16]
            draws, x0 = Draws(7, range(start, start + len(part))), self.latents.encode(part)
            t = self.config.diffusion.draw(draws).to(self.device)
            eps = draws.normal(*x0.shape).to(self.device)
            losses.append(diffusion_loss(self.denoiser, x0, self.condition(part, None), t, eps).cpu())
        return float(torch.cat(losses).mean())

    def preview(self) -> np.ndarray:
        """Show samples of 24 scenes of the mix, and of 8 held-out images."""
        scenes = [*self.images.random(np.random.default_rng(3), 24), *self.images.held_out(8)]
        made = [self.sample(scenes[i : i + 8], seed=i) for i in range(0, len(scenes), 8)]
        return image_grid(to_uint8(torch.cat(made)), columns=8)

    def export(self, folder: Path, record: Mapping[str, object]) -> None:
        """Write the transformer, the text tower, the exemplar encoder, and the library of training images."""
        write_part(
            folder,
            "unet",
            self.denoiser.net,
            self.config.model,
            diffusion=self.config.diffusion,
            figures=self.validate(),
            training=record,
        )
        write_text(folder, self.text, words=sorted(grammar_words()), training=record)
        write_part(folder, "exemplars", self.encoder, self.config.exemplars, training=record)
        write_library(folder, training_library(self.images.data))


def slot_text(pieces: CaptionPieces) -> tuple[str, list[int]]:
    """Return a caption with slot words in place of nouns and without styles, and the things by slot.

    Slots are in the order in which the caption names the things.
    """
    words: list[str] = []
    order: list[int] = []
    for piece in pieces:
        if piece.noun and piece.area in THING_AREAS:
            words.append(SLOT_WORDS[len(order)])
            order.append(THING_AREAS.index(piece.area))
        else:
            words += words_in(" ".join(word for word in piece.text.split() if word not in STYLES))
    return " ".join(words), order


def zero_residuals(net: DiT) -> None:
    """Set the outputs of attention, MLPs, modulation and network to zero (Peebles & Xie 2023, adaLN-Zero)."""
    layers = [net.proj_out, net.time_modulation]
    for block in net.blocks:
        layers += [block.attn1.to_out[0], block.attn2.to_out[0], block.mlp.c_proj]
    for layer in layers:
        for p in layer.parameters():
            nn.init.zeros_(p)


def training_library(data: EmojiData) -> ExemplarLibrary:
    """Return the library of all training images, with the nouns of their names."""
    rows = [int(row) for row in data.train]
    exemplars = [
        Exemplar(
            name=data.index[row].name,
            style=data.index[row].style,
            content=write_exemplar(torch.from_numpy(data.images[row].copy()).movedim(-1, 0).float() / 255),
        )
        for row in rows
    ]
    known = {exemplar.name for exemplar in exemplars}
    nouns = {
        noun: tuple(dict.fromkeys(sense.name for sense in senses if sense.name in known))
        for noun, senses in noun_table(data.index).items()
    }
    return ExemplarLibrary(
        exemplars, {noun: names for noun, names in nouns.items() if names}, size=data.images.shape[1]
    )
