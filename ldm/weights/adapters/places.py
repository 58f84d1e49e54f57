"""The modules of a model's networks, by every name that a published layout has for them.

The names follow from the network's own tensors and from the reversible rules of `ldm.weights.rules`, so that
a place is found whichever layout an adapter was trained on, also where a layout splits or joins tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from ldm.models.clip.towers import TextTower
from ldm.models.unet import UNet
from ldm.weights.keymap import Shape, Step, shapes_in_file
from ldm.weights.parts import Layout, part_table, shapes_of

DIT_LAYERS = ("blocks.", "proj_out.", "exemplars.")  # of a diffusion transformer: blocks, head, cells
STEM_LAYOUTS: tuple[Layout, ...] = ("diffusers", "original")
HUGGING_FACE = ("text_model.",)  # the spelling of CLIP towers that adapters are trained on
# Endings of modules' names, and how diffusers 0.13 to 0.20 wrote those of the adapters in them.
OLD_ENDINGS = {
    **{f"to_{x}": f"processor.to_{x}_lora" for x in "qkv"},
    "to_out.0": "processor.to_out_lora",
    **{f"self_attn.{x}_proj": f"self_attn.to_{x}_lora" for x in "qkv"},
    "self_attn.out_proj": "self_attn.to_out_lora",
}


@dataclass(frozen=True, kw_only=True)
class Site:
    """One tensor as a layout has it, and the tensors of the network that hold it.

    Args:
        part: The network, such as "unet".
        name: Name of the tensor in the layout.
        step: The rule between both.
        index: Which of the layout's tensors of the rule it is.
        shape: Its shape in the layout.
    """

    part: str
    name: str
    step: Step
    index: int
    shape: Shape

    @property
    def ours(self) -> tuple[str, ...]:
        """The network's names of the tensors that hold it."""
        return self.step.ours

    def read(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the tensor of the layout, of the network's tensors by name."""
        return self._all(tensors)[self.index]

    def write(self, tensors: Mapping[str, Tensor], value: Tensor) -> dict[str, Tensor]:
        """Return the network's tensors that change when the layout's tensor has a value."""
        own = self._all(tensors)
        own[self.index] = value
        shapes = [tuple(tensors[name].shape) for name in self.ours]
        return dict(zip(self.ours, self.step.change.from_file(own, shapes), strict=True))

    def _all(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        return self.step.change.to_file([tensors[name] for name in self.ours], len(self.step.file))


@dataclass(frozen=True, kw_only=True)
class ModulePlace:
    """A module, as a layout has it.

    Args:
        part: The network.
        path: Its name in the layout.
        block: The block of the UNet in the notation of block weights, such as "IN04"; "BASE" for texts.
        sites: Its tensors by their last name: "weight", "bias".
    """

    part: str
    path: str
    block: str
    sites: dict[str, Site] = field(default_factory=dict)


class Places:
    """The modules of one network by all their names.

    Args:
        part: Name of the network.
        network: The network, which may be on the meta device.
    """

    def __init__(self, part: str, network: nn.Module) -> None:
        self.part = part
        self.dotted: dict[str, ModulePlace] = {}
        self.flat: dict[str, ModulePlace] = {}
        self.token_width = network.config.width if isinstance(network, TextTower) else None
        self.beyond = _layers_beyond(network)
        shapes = shapes_of(network)
        plans = {each: part_table(network, each, HUGGING_FACE).plan(shapes) for each in STEM_LAYOUTS}
        blocks = dict(_blocks(plans["original"])) if isinstance(network, UNet) else {}
        # a layout in which every name is the same adds none
        for steps in plans.values() if plans["original"] != plans["diffusers"] else [plans["original"]]:
            for place in _layout_places(part, steps, shapes, blocks):
                for path in _spellings(place.path):
                    self.dotted.setdefault(path, place)
                    self.flat.setdefault(path.replace(".", "_"), place)

    def find(self, name: str, *, flat: bool) -> ModulePlace | None:
        """Return the module of a name; None if there is none.

        Args:
            name: The name in any layout.
            flat: Whether its dots are underscores.
        """
        return (self.flat if flat else self.dotted).get(name)

    def layers(self, *, convolutions: bool) -> Iterator[ModulePlace]:
        """Yield the modules whose weights a LoRA changes, each once: the linear layers of transformers.

        Of a diffusion transformer these are the layers of its blocks and of the head that draws its cells.

        Args:
            convolutions: Whether those of residual blocks and of resampling are among them.
        """
        seen: set[tuple[tuple[str, ...], int]] = set()
        for path, place in self.dotted.items():
            site = place.sites.get("weight")
            inside = ".attentions." in path or ".layers." in path or path.startswith(DIT_LAYERS)
            blocks = convolutions and (".resnets." in path or "samplers." in path)
            if site is None or path != place.path or len(site.shape) < 2 or not (inside or blocks):
                continue
            key = site.ours, site.index if len(site.step.file) > 1 else 0
            if key not in seen:
                seen.add(key)
                yield place

    def without_effect(self, name: str) -> bool:
        """Return whether a name, dotted or flat, is of a module that the tower has and the model never reads.

        SD 2 reads its tower's last layer but one, and only SDXL the projection of its second tower.
        """
        flat = name.replace(".", "_")
        return bool(self.beyond) and flat.startswith(self.beyond)


def _layout_places(
    part: str, steps: Iterable[Step], shapes: Mapping[str, Shape], blocks: Mapping[str, str]
) -> Iterable[ModulePlace]:
    """Return the modules of a network in one layout.

    Args:
        part: Name of the network.
        steps: The rules between the network and the layout.
        shapes: Names and shapes of its tensors.
        blocks: Block of each of its tensors.
    """
    places: dict[str, ModulePlace] = {}
    for step in steps:
        for index, (name, shape) in enumerate(zip(step.file, shapes_in_file(step, shapes), strict=True)):
            path, _, leaf = name.rpartition(".")
            block = blocks.get(step.ours[0], "BASE")
            place = places.setdefault(path, ModulePlace(part=part, path=path, block=block))
            place.sites[leaf] = Site(part=part, name=name, step=step, index=index, shape=shape)
    return places.values()


def _spellings(path: str) -> Iterator[str]:
    """Yield a module's name, and how old versions of diffusers wrote it."""
    yield path
    for ending, old in OLD_ENDINGS.items():
        if path.endswith(f".{ending}"):
            yield f"{path.removesuffix(ending)}{old}"


def _blocks(steps: Iterable[Step]) -> Iterator[tuple[str, str]]:
    """Yield the names of a UNet's tensors and their blocks, by the rules of the original layout."""
    for step in steps:
        match = re.match(r"(input|output)_blocks\.(\d+)\.|(middle_block)\.|(out)\.", step.file[0])
        if match is None:
            block = "IN00"  # time and vector embeddings
        elif match[1]:
            block = f"{'IN' if match[1] == 'input' else 'OUT'}{int(match[2]):02d}"
        else:
            block = "M00" if match[3] else "OUT"
        for ours in step.ours:
            yield ours, block


def _layers_beyond(network: nn.Module) -> tuple[str, ...]:
    """Return the flat names of the modules that a text tower lacks because the model never reads them."""
    if not isinstance(network, TextTower):
        return ()
    projection = ("text_projection",) if network.config.embed_dim is None else ()
    return (f"text_model_encoder_layers_{network.config.layers}_", *projection)
