"""An image that stands for a word, learned of scenes that show the thing, for a model with exemplars.

It is what textual inversion (Gal et al. 2022, arXiv:2208.01618) is for other models. There, vectors are
learned that stand for a word; here, the exemplar that the word names: colors and opacity, S×S pixels.
The loss is that of the denoiser, which is shown the exemplar in each scene; where it lies there is learned
too. The model's weights stay as they are. The export is an image, which `pipe.exemplars.add` reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.conditioning.exemplars import ExemplarConditioner
from ldm.conditioning.prompt import escape_prompt
from ldm.diffusion.cond import Cond
from ldm.models.layout import ThingLayout, multiplied, place_exemplars
from ldm.pipelines.latent import LatentDiffusion
from ldm.support.files import open_atomically
from ldm.training.adapters.adapter_config import AdapterTraining
from ldm.training.adapters.adapter_files import write_record
from ldm.training.caches.canvases import CanvasFit
from ldm.training.inputs.cached_files import CachedFiles
from ldm.training.inputs.files import files_only
from ldm.training.inputs.protocol import Samples
from ldm.training.tuning.tuned_model import TunedModel

_LAYOUTS = 16  # of the prior, whose mean is where the thing of a scene lies at first
MOVE_UNITS = (0.05, 0.05, 0.1, 10.0)  # change of x, y, log side and tilt for a parameter of 1
_SAME = 0.1  # standard deviation over scenes, in [0, 1], from which on a pixel is rather the background's
_LEAST, _MOST = 0.05, 0.95  # colors and opacity at first


@dataclass(frozen=True, kw_only=True)
class ExemplarImageTraining(AdapterTraining):
    """The configuration of the learning of an exemplar; see `AdapterTraining` too.

    Every caption names the thing once, and no other thing. What all scenes show alike around the thing counts
    as a part of it, so that backgrounds should differ, and captions should state them. AdamW's
    `weight_decay` should be 0.

    Args:
        thing: The thing's name, as captions have it. Images of this name in the model's library are not
            shown.
    """

    thing: str

    def __post_init__(self) -> None:
        super().__post_init__()
        if not any(char.isalnum() for char in self.thing):
            raise ValueError(f"thing: expected letters or digits, got {self.thing!r}")


class LearnedExemplar(nn.Module):
    """An exemplar in training, and where it lies in N scenes.

    Args:
        image: Colors and opacity at first, in (0, 1), (4, S, S).
        places: Places at first, (N, 4); see `ThingLayout`.
    """

    def __init__(self, image: Tensor, places: Tensor) -> None:
        super().__init__()
        self.image = nn.Parameter(image.logit())
        self.moves = nn.Parameter(torch.zeros_like(places))
        self.register_buffer("first", places, persistent=False)
        self.first: Tensor

    def pixels(self) -> Tensor:
        """Return the exemplar, colors and opacity in [0, 1], (4, S, S)."""
        return self.image.sigmoid()

    def layout(self, rows: Sequence[int]) -> ThingLayout:
        """Return the layouts of scenes by number, each of one instance."""
        x, y, side, tilt = self.first[rows].unbind(-1)  # (B,) each
        dx, dy, larger, turned = (self.moves[rows] * self.moves.new_tensor(MOVE_UNITS)).unbind(-1)
        places = torch.stack([x + dx, y + dy, side * larger.exp(), tilt + turned], dim=-1)
        owner = torch.zeros(len(rows), 1, dtype=torch.long, device=places.device)
        return ThingLayout(places=places[:, None], owner=owner)


class ExemplarImagePart(TunedModel):
    """An exemplar in training; only it and its places in the scenes are parameters."""

    def __init__(self, config: ExemplarImageTraining, device: torch.device) -> None:
        self.config = config
        super().__init__(config, device)
        data, library = files_only(self.images, "part: exemplar-image").config, self.text.library
        if data.held_out or data.mirror or data.crop != "center" or data.buckets is not None:
            raise ValueError(
                f"data: held_out {data.held_out}, mirror {data.mirror}, crop {data.crop!r}, buckets"
                f" {data.buckets}: expected 0, 0, 'center' and none, as the place of the thing in each scene"
                " is learned"
            )
        shape = (4, library.size, library.size)
        library.add(config.thing, torch.full(shape, 0.5, dtype=torch.float32, device="cpu"))
        for caption in self.images.texts():
            self._check_caption(caption)
        scenes = self.scenes.rows
        places = torch.cat([self._first_place(caption) for caption in self.images.describe(scenes)])
        pixels = (self.images.tensor(scenes) / 2 + 0.5).to(device)  # (N, 3, H, W)
        self.model = LearnedExemplar(first_image(pixels, places, library.size), places).to(device)

    def check(self, pipe: LatentDiffusion) -> None:
        """Raise ValueError for a model without exemplars."""
        if not isinstance(pipe.text, ExemplarConditioner):
            raise ValueError(f"{pipe.name!r} has no exemplars, expected part: textual-inversion")

    def canvas_fit(self, text: ExemplarConditioner) -> CanvasFit | None:
        """Return None: layouts are learned."""
        return None

    @property
    def text(self) -> ExemplarConditioner:
        """The conditioner."""
        assert isinstance(self.pipe.text, ExemplarConditioner)  # see `check`
        return self.pipe.text

    @property
    def scenes(self) -> CachedFiles:
        """The training images."""
        assert isinstance(self.samples, CachedFiles)
        return self.samples

    def _check_caption(self, caption: str) -> None:
        """Raise ValueError for a caption that does not name the thing, or names another."""
        (alternative,) = self.text.read(escape_prompt(caption)).alternatives
        name = self.config.thing.strip().lower().replace(" ", "-")
        if [mention.names for mention in alternative.mentions] != [(name,)]:
            raise ValueError(
                f"data: expected {self.config.thing!r} and no other thing in every caption, got {caption!r}"
            )

    def _first_place(self, caption: str) -> Tensor:
        """Return where the prior expects the thing of a caption, (1, 4): the mean of some layouts."""
        read = self.text.read(escape_prompt(caption))
        layouts = self.text.layouts([read] * _LAYOUTS, range(_LAYOUTS))
        return layouts.places[layouts.owner == 0].mean(0, keepdim=True)

    def cond(self, texts: Sequence[str], samples: Samples, seeds: Sequence[int] = ()) -> Cond:
        """Return the condition of scenes under texts, each a caption or empty; see `TunedModel.cond`."""
        read = [self.text.read(escape_prompt(text)) for text in texts]
        named = torch.tensor([bool(each.things) for each in read], device=self.device)
        layout = self.model.layout(self.scenes.rows_of(samples))
        size = samples[0].frame[:2]
        image = multiplied(self.model.pixels()).expand(len(samples), 1, -1, -1, -1)
        canvas = place_exemplars(image, layout, size) * named[:, None, None, None, None]  # (B, 1, 4, H, W)
        others = canvas.new_zeros(len(samples), self.text.slots - 1, *canvas.shape[2:])
        return replace(Cond.cat([each.text for each in read]), exemplars=torch.cat([canvas, others], dim=1))

    def export(self, folder: Path, record: Mapping[str, object]) -> None:
        """Write the exemplar as NAME.png, and the record of the training as NAME.yaml."""
        from PIL import Image

        path = folder / f"{self.config.run.name}.png"
        folder.mkdir(parents=True, exist_ok=True)
        levels = (self.model.pixels().detach().cpu() * 255).round().byte().permute(1, 2, 0).numpy()
        with open_atomically(path) as file:
            Image.fromarray(levels, "RGBA").save(file, format="PNG")
        write_record(path, record, figures=self.validate())


def first_image(scenes: Tensor, places: Tensor, size: int) -> Tensor:
    """Return the exemplar with which the learning begins, colors and opacity in (0, 1), (4, size, size).

    Its colors are the mean of the scenes, each seen from where the thing lies in it. Where they differ, there
    is rather their background, and the opacity is low.

    Args:
        scenes: Images (N, 3, H, W) in [0, 1].
        places: Where the thing lies, (N, 4); tilts are not followed.
        size: S.
    """
    h, w = scenes.shape[-2:]
    x, y, side, _ = places.to(scenes).unbind(-1)
    grid = ((torch.arange(size, dtype=torch.float32, device=scenes.device) + 0.5) / size - 0.5) * side[
        :, None
    ]  # (N, S)
    across = 2 * (x[:, None] + grid * min(h, w) / w) - 1
    down = 2 * (y[:, None] + grid * min(h, w) / h) - 1
    points = torch.stack(
        [across[:, None].expand(-1, size, -1), down[:, :, None].expand(-1, -1, size)], dim=-1
    )  # (N, S, S, 2)
    seen = F.grid_sample(scenes, points, padding_mode="border", align_corners=False)  # (N, 3, S, S)
    spread = seen.var(0, correction=0).mean(0, keepdim=True)  # (1, S, S)
    opacity = _MOST / (1 + spread / _SAME**2)
    return torch.cat([seen.mean(0), opacity]).clamp(_LEAST, _MOST)
