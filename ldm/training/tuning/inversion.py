"""Textual inversion: vectors that stand for a word of their own (Gal et al. 2022, arXiv:2208.01618).

Nothing else is trained. The export is a file of the vectors, which `pipe.adapters.load` reads, and so do
diffusers and kohya-style programs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.conditioning.conditioner import TextConditioner
from ldm.conditioning.exemplars import ExemplarConditioner
from ldm.pipelines.latent import LatentDiffusion
from ldm.support.config import check_between
from ldm.training.adapters.adapter_config import AdapterTraining
from ldm.training.adapters.adapter_files import write_record
from ldm.training.tuning.tuned_model import TunedModel
from ldm.weights.adapters.embeddings import MAX_VECTORS, TOWER_KEYS
from ldm.weights.formats.safetensors import write_safetensors

_TOWER_KEYS = {part: key for key, part in reversed(TOWER_KEYS.items())}  # of the towers of a model with two


@dataclass(frozen=True, kw_only=True)
class InversionTraining(AdapterTraining):
    """The configuration of a textual inversion; see `AdapterTraining` too.

    AdamW's `weight_decay` should be 0. All captions hold the token; `data.captions` is for images without
    one.

    Args:
        token: The word that the vectors stand for, such as "<thing>".
        vectors: Number of vectors. Default: 1.
        start: Words whose vectors these begin with, in turn if there are fewer; None for random vectors with
            the standard deviation of the vocabulary's. Default: None.
    """

    token: str
    vectors: int = 1
    start: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_between(1, MAX_VECTORS, vectors=self.vectors)
        if not self.token.strip() or self.token != self.token.strip():
            raise ValueError(f"token: expected a word without spaces around it, got {self.token!r}")


class InversionPart(TunedModel):
    """Vectors in training, (n, D) for each text tower of a loaded model."""

    def __init__(self, config: InversionTraining, device: torch.device) -> None:
        super().__init__(config, device)
        self.config = config
        readers = self.pipe.readers()
        token = config.token.lower()
        if bare := next((text for text in self.images.texts() if token not in text.lower()), None):
            raise ValueError(f"data: expected the token {config.token!r} in every caption, got {bare!r}")
        generator = torch.Generator().manual_seed(config.run.seed)
        self.model = nn.ParameterDict(
            {part: self._first_vectors(reader, generator).to(device) for part, reader in readers.items()}
        )
        for part, reader in readers.items():
            reader.learned.replace({(config.token,): self.model[part]})

    def check(self, pipe: LatentDiffusion) -> None:
        """Raise ValueError for a model whose text tower reads no vectors of its own words."""
        if isinstance(pipe.text, ExemplarConditioner):
            raise ValueError(
                f"{pipe.name!r} draws things from exemplars, not from words: a new thing is"
                " pipe.exemplars.add(name, image), without training"
            )
        if not pipe.readers():
            raise ValueError(f"{pipe.name!r} has no CLIP text tower that reads vectors")

    def _first_vectors(self, reader: TextConditioner, generator: torch.Generator) -> Tensor:
        """Return the vectors that the training begins with, (n, D) float32."""
        config, table = self.config, reader.tower.token_embedding.weight.detach().float().cpu()
        if config.start is None:
            drawn = torch.randn(
                config.vectors, reader.width, generator=generator, device="cpu", dtype=torch.float32
            )
            return table.mean(0) + table.std(0) * drawn
        ids = [token for _, word in reader.word_ids(config.start) for token in word]
        if not ids:
            raise ValueError(f"start: the vocabulary has no token of {config.start!r}")
        return table[[ids[i % len(ids)] for i in range(config.vectors)]].clone()

    def export(self, folder: Path, record: Mapping[str, object]) -> None:
        """Write the vectors as NAME.safetensors, and the record of the training as NAME.yaml."""
        path = folder / f"{self.config.run.name}.safetensors"
        folder.mkdir(parents=True, exist_ok=True)
        vectors = {part: each.detach().cpu().contiguous() for part, each in self.model.items()}
        one = len(vectors) == 1
        tensors = {self.config.token if one else _TOWER_KEYS[part]: each for part, each in vectors.items()}
        write_safetensors(path, tensors, {"format": "pt", "token": self.config.token})
        write_record(path, record, figures=self.validate())
