"""`pipe.controls`: load, list and remove the networks that control the UNet of a pipeline by an image."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.catalog.control_cards import control_card
from ldm.diffusion.cond import Cond
from ldm.models.clip.towers import VisionTower
from ldm.models.dit import DiT
from ldm.models.unet import UNet
from ldm.pipelines.call import Call
from ldm.pipelines.conditions import Pair
from ldm.pipelines.control.control_use import NO_MARGINS, Control, ControlUse
from ldm.pipelines.control.hints import HintFrame, read_hint, read_image
from ldm.pipelines.control.loaded_control import ControlEntry, LoadedControl
from ldm.speed.backends import OpenVINO
from ldm.speed.fast_layers import exchange_like
from ldm.support.config import nearest
from ldm.support.device import computing_dtype
from ldm.support.text import shown
from ldm.weights.controls.building import Target, build_control, family_of
from ldm.weights.controls.control_lora import is_change
from ldm.weights.controls.files import ControlFile, control_digest, read_control
from ldm.weights.controls.ip_adapter import attentions_of, load_vision


class Controls(nn.Module):
    """The controls of a pipeline. A call uses those that its `controls=` names.

    Args:
        networks: Returns the pipeline's networks by part.
        model: Name of the model.
        check_weights: Raises ValueError if the weights are not the model's own.
    """

    def __init__(
        self,
        networks: Callable[[], Mapping[str, nn.Module]],
        model: str,
        check_weights: Callable[[], None],
    ) -> None:
        super().__init__()
        self._networks = networks
        self._model = model
        self._check_weights = check_weights
        self._loaded: dict[str, LoadedControl] = {}
        self.networks = nn.ModuleList()  # of the controls, so that they move with the pipeline

    def load(
        self,
        path: str | Path,
        *,
        name: str | None = None,
        card: str | None = None,
        vision: str | Path | None = None,
    ) -> LoadedControl:
        """Load a control.

        Args:
            path: A .safetensors, .pth or .bin file of a ControlNet or a T2I-Adapter, in the original or in
                diffusers layout, or a folder that diffusers wrote; or one of an IP-Adapter or a
                ControlNet-LLLite.
            name: Its name. Default: that of the file without ending, or of the folder.
            card: Name of the card that states the convention of its hints (`ldm.catalog.control_cards`).
                Default: by the file's name.
            vision: For an IP-Adapter, CLIP's image tower that it reads: a folder in Hugging Face layout, or a
                file of ViT-H/14 or ViT-bigG/14.

        Returns:
            What was loaded; its text names kind, family and convention.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is damaged or refused, is no control, was made for another model, has keys
                that are missing, unexpected or misshapen, or holds NaN; or if the name is taken. The pipeline
                is unchanged then.
        """
        path = Path(path)
        name = (path.name if path.is_dir() else path.stem) if name is None else name
        if not name:
            raise ValueError(f"name: expected a text, got {shown(name)}")
        if name in self._loaded:
            raise ValueError(f"name: a control {name!r} is loaded; remove it, or choose another name")
        made = self._built(read_control(path), path, name, card, vision)
        self._keep({**self._loaded, name: made})
        return made

    def remove(self, name: str) -> None:
        """Remove a control; ValueError if there is none of this name."""
        self.get(name)
        self._keep({key: each for key, each in self._loaded.items() if key != name})

    def _keep(self, loaded: dict[str, LoadedControl]) -> None:
        """Make these the controls."""
        self._loaded = loaded
        self.networks = nn.ModuleList(network for each in loaded.values() for network in each.networks)

    def list(self) -> tuple[LoadedControl, ...]:
        """Return the controls, in the order in which they were loaded."""
        return tuple(self._loaded.values())

    def get(self, name: str) -> LoadedControl:
        """Return the control of a name; ValueError if there is none."""
        if name not in self._loaded:
            known = nearest(name, self._loaded) if self._loaded else "none is loaded (pipe.controls.load)"
            raise ValueError(f"no control is called {shown(name)}; {known}")
        return self._loaded[name]

    def __len__(self) -> int:
        return len(self._loaded)

    def __contains__(self, name: object) -> bool:
        return name in self._loaded

    def __str__(self) -> str:
        return "\n".join(map(str, self.list())) or "no controls"

    def load_entry(self, entry: ControlEntry, path: Path, vision: Path | None = None) -> None:
        """Load a control as a recipe states it, from its file and that of its image tower."""
        self.load(path, name=entry.name, card=entry.card, vision=vision)

    def controlled(self) -> UNet | DiT:
        """Return the network that is controlled; ValueError if it is neither a UNet nor a DiT."""
        net = self._networks().get("unet")
        if not isinstance(net, UNet | DiT):
            raise ValueError(f"{self._model!r} has no UNet or DiT: controls are for models with one")
        return net

    def _built(
        self, file: ControlFile, path: Path, name: str, card: str | None, vision: str | Path | None
    ) -> LoadedControl:
        """Return the control of a file, on the device and in the dtype of the UNet."""
        unet = self.controlled()
        vae: Any = self._networks()["vae"]  # an autoencoder of any kind
        if is_change(file.tensors):
            try:
                self._check_weights()
            except ValueError:
                raise ValueError(
                    f"{str(path)!r} is added to the UNet's own weights, into which adapters are merged:"
                    " remove or fuse them first"
                ) from None
        first, factor = next(unet.parameters()), vae.config.factor
        dtype = computing_dtype(unet) or first.dtype
        tower = None if vision is None else self._tower(Path(vision), dtype)
        target = Target(
            model=self._model,
            network=unet.config,
            factor=factor,
            dtype=dtype,
            attentions=attentions_of(unet),
            vision=None if tower is None else tower[0],
            base=unet.state_dict(),
        )
        built = build_control(file, target, control_card(card, path.name, file.metadata.get("hints")))
        for network in (built.network, *(() if tower is None else tower[:1])):
            exchange_like(network.to(first.device), unet)
        return LoadedControl(
            name=name,
            file=path.name,
            digest=file.digest,
            what=built.what,
            made_for=family_of(file),
            card=built.card,
            network=built.network,
            kind=built.kind,
            vision=tower,
        )

    def _tower(self, path: Path, dtype: torch.dtype) -> tuple[VisionTower, str, str]:
        """Return an image tower, one that is loaded already if it is the same, with its name and SHA-256."""
        digest = control_digest(path)
        for each in self._loaded.values():
            if each.vision is not None and each.vision[2] == digest:
                return each.vision
        return load_vision(path, dtype), path.name, digest

    def _check_attention(self, what: str) -> None:
        """Raise ValueError if another program computes the UNet, in whose attentions a control acts."""
        net = self.controlled()
        if isinstance(net.__dict__.get("forward"), OpenVINO) or net._compiled_call_impl is not None:
            raise ValueError(f"controls: {what} acts in ldm's layers: call ldm.optimize without backend")

    def settled(self, wanted: Sequence[Control], call: Call, size: tuple[int, int], multiple: int) -> Call:
        """Return a call with its controls, their hints read and checked.

        Args:
            wanted: The controls.
            call: The call.
            size: (h, w) of the latent.
            multiple: Number to multiples of which the call pads images.
        """
        uses = []
        for option in wanted:
            loaded = self.get(option.name)
            factor = loaded.kind.factor
            if loaded.kind.in_attentions:
                self._check_attention(loaded.what)
            if factor is None:
                hint = read_image(option, loaded.card, len(call.seeds))
                plain = replace(option, margins=NO_MARGINS)  # images of any size are not extended
                uses.append(ControlUse(option=plain, loaded=loaded, hint=hint))
                continue
            frame = HintFrame(
                image=(call.height, call.width),
                hint=(size[0] * factor, size[1] * factor),
                multiple=multiple,
                count=len(call.seeds),
            )
            hint = read_hint(option, loaded.card, loaded.kind.hint_channels, frame)
            uses.append(ControlUse(option=option, loaded=loaded, hint=hint))
        return replace(call, controls=tuple(uses))


def controlled_pair(pair: Pair, call: Call, device: torch.device, dtype: torch.dtype) -> Pair:
    """Return the conditions of a call with what its controls read, of batch size B each.

    Args:
        pair: The conditions, of batch size B.
        call: The call.
        device, dtype: What the UNet computes on and in.
    """
    if not call.controls:
        return pair
    n = len(call.seeds)
    hints: tuple[list[Tensor], list[Tensor]] = [], []
    for use in call.controls:
        hint = use.hint.to(device, dtype)
        prepared = use.loaded.kind.prepare(hint)
        without = use.loaded.kind.prepare_without(hint, prepared)
        for branch, on, own in zip(hints, (True, not use.guess), (prepared, without), strict=True):
            branch.append(torch.full((n,), on, dtype=torch.bool, device=device))
            branch += [each.expand(n, *each.shape[1:]) for each in own]
    cond, uncond = (_with_hints(each, own, n) for each, own in zip(pair, hints, strict=True))
    return cond, uncond


def _with_hints(cond: Cond, hints: Sequence[Tensor], n: int) -> Cond:
    return replace(cond.expand(n), hints=tuple(hints))
