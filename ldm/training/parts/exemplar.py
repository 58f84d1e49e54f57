"""Training of a diffusion transformer that is shown exemplars, with its text tower.

Each batch shows the network the source images of the things in its scenes, where they lie; see
`ldm.models.exemplars`. Their places are slightly displaced, so that the network follows x_t where both
disagree (conditioning augmentation, Ho et al. 2021).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ldm.conditioning.conditioner import TextConditioner
from ldm.conditioning.things import SLOT_WORDS
from ldm.data import Scene
from ldm.data.wording import grammar_words
from ldm.diffusion.cond import Cond
from ldm.diffusion.denoiser import Denoiser
from ldm.models.clip.towers import TextConfig, TextTower
from ldm.models.dit import DiT, DiTConfig
from ldm.models.layout import ThingLayout
from ldm.models.patch_autoencoder import PatchAutoencoder
from ldm.models.text.bpe import Tokenizer
from ldm.training.caches.latents import LatentSpace
from ldm.training.config import DataConfig, RunConfig, check_at_least
from ldm.training.diffusion import DiffusionConfig, sample_latents
from ldm.training.draws import Draws
from ldm.training.images import image_grid, to_uint8
from ldm.training.inputs.emoji import CachedScenes, EmojiImages
from ldm.training.inputs.slots import (
    SlotCaption,
    named_on_canvas,
    scene_condition,
    scene_layouts,
    slot_captions,
)
from ldm.training.losses.common import diffusion_loss, draw_diffusion_loss
from ldm.training.losses.grounding import grounding_losses, record_attention
from ldm.weights.formats.ldm_folder import SLOT_TEXT, begin_with, write_part, write_text


@dataclass(frozen=True, kw_only=True)
class SlotTextConfig:
    """Shape of the text tower.

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
        model: Shape of the diffusion transformer; its context is as wide as the text's tokens.
        diffusion: Schedule, prediction and timesteps.
        displaced: Standard deviation of the displacement of an exemplar, as a fraction of the canvas; its
            size varies by as much, and its tilt by as many radians. At least 0. Default: 0.001, an eighth of
            a pixel of 128.
        scenes: Number of cached scenes.
        net: Folder of a transformer and its text tower, of these shapes, to begin with; None to begin from
            scratch. Default: None.
        grounding: Weight of the mean of `grounding_losses`, which teach the attention to a thing's words to
            lie where the thing is, at least 0. Default: 0.
    """

    run: RunConfig
    data: DataConfig
    vae: str
    text: SlotTextConfig
    model: DiTConfig
    diffusion: DiffusionConfig
    displaced: float = 0.001
    scenes: int
    net: str | None = None
    grounding: float = 0.0

    def __post_init__(self) -> None:
        check_at_least(0, displaced=self.displaced, grounding=self.grounding)
        check_at_least(1, scenes=self.scenes)
        if not 1 <= self.model.slots <= len(SLOT_WORDS):
            raise ValueError(f"model.slots {self.model.slots}: expected 1 to {len(SLOT_WORDS)}")


class ExemplarPart:
    """A diffusion transformer in training, with its text tower."""

    def __init__(self, config: ExemplarTraining, device: torch.device) -> None:
        self.config, self.device = config, device
        self.images = EmojiImages(config.data, validates_held_out=True)
        self.scenes = CachedScenes.random(config.run, self.images, config.scenes)
        self.latents = LatentSpace.open(config.vae, self.scenes, device)
        torch.manual_seed(config.run.seed)
        self.text = config.text.make(config.model.context_dim)
        self.net = DiT(config.model)
        if config.net is None:
            zero_residuals(self.net)
            vae = self.latents.vae
            if self.net.exemplars is not None and isinstance(vae, PatchAutoencoder):
                self.net.exemplars.use_basis(vae.project.weight.cpu())
        else:
            begin_with(self.net, config.net, "unet")
            begin_with(self.text.tower, config.net, "text")
        self.text.to(device)
        self.denoiser = Denoiser(self.net.to(device), config.diffusion.make(), config.diffusion.prediction)
        self.model = nn.ModuleDict({"net": self.net, "text": self.text})

    def condition(
        self,
        scenes: Sequence[Scene | None],
        rngs: Sequence[np.random.Generator] | None,
        displaced: float = 0.0,
    ) -> Cond:
        """Return the condition of scenes, whose captions and displacements generators draw.

        Args:
            scenes: B scenes; None for no condition.
            rngs: Draw the wordings, one for each scene; None for the canonical ones.
            displaced: Standard deviation of the displacements. Default: 0, which needs no generators.
        """
        return self.read(self.captions(scenes, rngs), scenes, rngs, displaced)

    def captions(
        self, scenes: Sequence[Scene | None], rngs: Sequence[np.random.Generator] | None
    ) -> list[SlotCaption]:
        """Return the captions of scenes; see `condition`."""
        return slot_captions(scenes, self.images.index, rngs)

    def read(
        self,
        captions: Sequence[SlotCaption],
        scenes: Sequence[Scene | None],
        rngs: Sequence[np.random.Generator] | None,
        displaced: float,
    ) -> Cond:
        """Return the condition of captions of scenes; see `condition`."""
        layout = scene_layouts(scenes, [caption.order for caption in captions])
        if displaced:
            assert rngs is not None
            layout = displaced_layout(layout, rngs, displaced)
        return scene_condition(
            scenes, captions, layout, images=self.images, text=self.text, slots=self.config.model.slots
        )

    def loss(self, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a random batch, and to log the losses at high and at low t, and of grounding."""
        config, diffusion = self.config, self.config.diffusion
        chosen, rows = self.draw(draws)
        x0 = self.latents.sample(rows, draws)  # (B, C, h, w)
        cond, captions = self.drawn_condition(chosen, draws)
        with self.recorded() as maps:
            loss, losses, t = draw_diffusion_loss(self.denoiser, diffusion, x0, cond, draws)
        high = t >= diffusion.timesteps // 2
        figures = {
            "loss_high_t": draws.mean_of_some(losses[high]),
            "loss_low_t": draws.mean_of_some(losses[~high]),
        }
        if config.grounding:
            assert cond.exemplars is not None
            named = named_on_canvas(captions, cond.exemplars.cpu(), self.text.tokenizer)
            lies = grounding_losses(maps.values(), named).to(self.device)
            figures["grounding"] = draws.mean_of_some(lies).nan_to_num()
            loss = loss + config.grounding * figures["grounding"]
        return loss, figures

    def drawn_condition(self, scenes: Sequence[Scene], draws: Draws) -> tuple[Cond, list[SlotCaption]]:
        """Return the condition of a batch, a share of it empty, and its captions."""
        kept = self.kept(scenes, draws)
        captions = self.captions(kept, draws.rngs)
        return self.read(captions, kept, draws.rngs, self.config.displaced), captions

    def kept(self, scenes: Sequence[Scene], draws: Draws) -> list[Scene | None]:
        """Return the scenes of a batch, with None in place of a share that `diffusion.drop` states."""
        shown = draws.random() >= self.config.diffusion.drop
        return [scene if show else None for scene, show in zip(scenes, shown, strict=True)]

    def recorded(self) -> AbstractContextManager[dict[str, Tensor]]:
        """Return the context of `record_attention` where grounding is trained, else an empty one."""
        return record_attention(self.net) if self.config.grounding else nullcontext({})

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
        """Write the transformer and the text tower."""
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


def zero_residuals(net: DiT) -> None:
    """Set the outputs of attention, MLPs, modulation and network to zero (Peebles & Xie 2023, adaLN-Zero)."""
    layers = [net.time_modulation]
    if isinstance(net.proj_out, nn.Linear):
        layers.append(net.proj_out)
    for block in net.blocks:
        layers += [block.attn1.to_out[0], block.attn2.to_out[0], block.mlp.c_proj]
    for layer in layers:
        for p in layer.parameters():
            nn.init.zeros_(p)


def displaced_layout(layout: ThingLayout, rngs: Sequence[np.random.Generator], std: float) -> ThingLayout:
    """Return layouts with normal displacements, one generator for each; see `ExemplarTraining.displaced`."""
    shape = layout.places.shape[1:]
    drawn = torch.from_numpy(np.stack([rng.standard_normal(shape, dtype=np.float32) for rng in rngs])) * std
    x, y, side, tilt = layout.places.unbind(-1)
    dx, dy, larger, turned = drawn.unbind(-1)
    places = torch.stack([x + dx, y + dy, side * (1 + larger), tilt + turned.rad2deg()], dim=-1)
    return ThingLayout(places=places, owner=layout.owner)
