"""Controls in outpainting: a hint of the image's size is extended with it, others are of the canvas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import reduced_families
import torch
import torch.nn.functional as F
from control_nets import lines, random_control_net, reduced_config, write_png
from diffusers_pipelines import differ
from torch import Tensor

import ldm
from ldm.catalog.control_cards import CONTROL_CARDS
from ldm.pipelines.control.hints import extended
from ldm.registry.replaying import replay
from ldm.weights.formats.safetensors import write_safetensors
from ldm.weights.parts import to_layout

CALL: dict[str, Any] = {"steps": 3, "seed": 3, "sampler": "ddim", "progress": False}
MARGINS = {"left": 8, "right": 4, "top": 0, "bottom": 16}
PADDING = (8, 4, 0, 16)
IMAGE = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("controls")


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Any:
    made = reduced_families.load(reduced_families.register("sd-v1-5", folder).name)
    network = random_control_net(reduced_config(made.denoiser.net.config))
    for card in ("canny", "depth", "inpaint"):
        write_safetensors(folder / f"{card}.safetensors", to_layout(network, "original"))
        made.controls.load(folder / f"{card}.safetensors")
    return made


def test_margins_have_no_lines_are_filled_in_or_repeat_the_edges() -> None:
    hint, mask = torch.rand(1, 3, 4, 6), torch.zeros(1, 1, 4, 6)
    made, none = extended(hint, None, CONTROL_CARDS["canny"], (1, 2, 3, 0))
    assert made.shape[-2:] == (7, 9) and none is None
    assert torch.equal(made[..., 3:, 1:7], hint) and float(made.sum()) == pytest.approx(float(hint.sum()))
    made, none = extended(hint, None, CONTROL_CARDS["depth"], (1, 2, 3, 0))
    assert torch.equal(made[..., 3:, 0], hint[..., 0]) and torch.equal(made[..., 0, 1:7], hint[..., 0, :])
    made, filled = extended(hint, mask, CONTROL_CARDS["inpaint"], (1, 2, 3, 0))
    assert filled is not None and torch.equal(filled[..., 3:, 1:7], mask) and float(filled.sum()) == 63 - 24


@pytest.mark.parametrize("name", ["canny", "depth", "inpaint"])
def test_a_hint_of_the_images_size_is_extended_with_it(pipe: Any, name: str) -> None:
    hint = lines(32)
    masks: list[dict[str, Tensor]] = [{}, {}]
    if name == "inpaint":
        mask = (torch.arange(32) < 10).float().expand(1, 1, 32, 32)
        masks = [{"mask": mask}, {"mask": F.pad(mask, PADDING, value=1.0)}]
    mode = "replicate" if name == "depth" else "constant"
    whole = F.pad(hint, PADDING, mode)

    def made(hint: Tensor, **options: Any) -> Tensor:
        control = ldm.Control(name, hint, **options)
        return pipe.outpaint("a cat", IMAGE, controls=[control], **MARGINS, **CALL).tensor

    own = made(hint, **masks[0])
    assert own.shape[-2:] == (48, 44)
    assert torch.equal(own, made(whole, **masks[1]))
    plain = pipe.outpaint("a cat", IMAGE, **MARGINS, **CALL).tensor
    assert differ(own, plain)
    assert torch.equal(own[..., :32, 8:40], IMAGE)


def test_recipes_state_the_margins(pipe: Any, folder: Path, tmp_path: Path) -> None:
    image, hint = write_png(tmp_path / "image.png", IMAGE), write_png(tmp_path / "hint.png", lines(32))
    made = pipe.outpaint("a cat", image, controls=[("depth", hint)], **MARGINS, **CALL)
    assert made.recipe["arguments"]["controls"][0]["margins"] == list(PADDING)
    assert torch.equal(replay(made.recipe, weights="random", controls=folder).tensor, made.tensor)


def test_refusals(pipe: Any) -> None:
    with pytest.raises(ValueError, match="expected the aspect ratio"):
        pipe.outpaint("a cat", IMAGE, controls=[("canny", lines(16))], **MARGINS, **CALL)
    with pytest.raises(ValueError, match="margins: expected left, right, top and bottom"):
        ldm.Control("canny", IMAGE, margins=(1, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="margins"):
        ldm.Control("canny", IMAGE, margins=(1, 2, -1, 0))
