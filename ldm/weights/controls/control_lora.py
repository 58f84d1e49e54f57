"""Complete the files that hold changes of a UNet's encoder: Control-LoRAs, and differences.

A Control-LoRA (Stability AI) has `up` and `down` of a module for W + up·down, without alpha, and whole
tensors for norms, biases and what a ControlNet has of its own; a difference file has D for W + D. W is the
UNet's, and so is what a Control-LoRA lacks.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ldm.models.control.control_net import ControlNet
from ldm.weights.controls.files import ControlFile
from ldm.weights.parts import Layout, part_table, shapes_of

LORA_MARK, DIFFERENCE_MARK = "lora_controlnet", "difference"  # keys that mark the two


def is_change(tensors: Mapping[str, object]) -> bool:
    """Return whether keys are those of a Control-LoRA or a difference."""
    return LORA_MARK in tensors or DIFFERENCE_MARK in tensors


def completed(
    file: ControlFile, network: ControlNet, layout: Layout, base: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the tensors of a whole ControlNet, under the file's names.

    Args:
        file: The file, for which `is_change` is true.
        network: The ControlNet, on the meta device.
        layout: Layout of the file.
        base: The tensors of the UNet, by our names.

    Raises:
        ValueError: If the factors of a module do not fit its weight.
    """
    state = {key: value for key, value in file.tensors.items() if key not in (LORA_MARK, DIFFERENCE_MARK)}
    for step in part_table(network, layout, state).plan(shapes_of(network)):
        (ours,), (key,) = step.ours, step.file
        if ours not in base:
            continue
        own = base[ours].detach().cpu().float()
        stem = key.removesuffix(".weight")
        if LORA_MARK not in file.tensors:
            if key in state and state[key].shape == own.shape:
                state[key] = own + state[key].float()
        elif key not in state and f"{stem}.up" in state and f"{stem}.down" in state:
            state[key] = own + _product(stem, state.pop(f"{stem}.up"), state.pop(f"{stem}.down"), own)
        elif key not in state:
            state[key] = own
    return state


def _product(stem: str, up: Tensor, down: Tensor, weight: Tensor) -> Tensor:
    """Return up·down in the shape of a weight."""
    if min(up.ndim, down.ndim) < 2:
        raise ValueError(
            f"{stem}: up {tuple(up.shape)} and down {tuple(down.shape)}: expected two dimensions"
        )
    rows, columns = up.float().flatten(1), down.float().flatten(1)  # (out, r), (r, in·k·k)
    if rows.shape[1] != columns.shape[0] or len(rows) * columns.shape[1] != weight.numel():
        raise ValueError(
            f"{stem}: up {tuple(up.shape)} and down {tuple(down.shape)} do not fit a weight of"
            f" {tuple(weight.shape)}"
        )
    return (rows @ columns).reshape(weight.shape)
