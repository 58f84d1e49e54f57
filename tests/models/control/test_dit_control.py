"""ControlNets of diffusion transformers: what they add to blocks and to the output of cells."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from ldm.diffusion.cond import Cond
from ldm.models.control.controlled import ALWAYS, Controlled, ControlPart
from ldm.models.control.dit_control import DiTControl, DiTControlConfig, DiTControlKind
from ldm.models.dit import DiT, DiTConfig
from ldm.weights.controls.dit_control import dit_control_config

SHAPE = {"in_channels": 6, "out_channels": 6, "width": 16, "depth": 2, "head_dim": 8, "context_dim": 12}
CELL, SIDE = 4, 8


def dit(slots: int) -> DiT:
    torch.manual_seed(0)
    net = DiT(DiTConfig(**SHAPE, slots=slots, cell=CELL)).eval().requires_grad_(False)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return net


def given(slots: int, batch: int = 2) -> tuple[Tensor, Tensor, Cond, Tensor]:
    """Return a state, times, a condition and a hint."""
    g = torch.Generator().manual_seed(1)
    x, context = torch.randn(batch, 6, SIDE, SIDE, generator=g), torch.randn(batch, 5, 12, generator=g)
    canvas = torch.rand(batch, slots, 4, SIDE * CELL, SIDE * CELL, generator=g)
    cond = Cond(context=context, exemplars=canvas if slots else None)
    hint = torch.rand(batch, 3, SIDE * CELL, SIDE * CELL, generator=g)
    return x, torch.tensor([400.0, 10.0])[:batch], cond, hint


def drawn(net: DiT, control: DiTControl, slots: int, strength: float) -> Tensor:
    x, t, cond, hint = given(slots)
    kind = DiTControlKind(network=control)
    part = ControlPart(kind=kind, strength=strength, guess=False, interval=ALWAYS)
    on = torch.ones(2, dtype=torch.bool)
    hinted = Cond(context=cond.context, exemplars=cond.exemplars, hints=(on, *kind.prepare(hint)))
    found: Tensor = Controlled(net, [part])(x, t, hinted)
    return found


@pytest.mark.parametrize("slots", [0, 2])
def test_a_copy_adds_nothing_and_has_a_head_where_there_are_exemplars(slots: int) -> None:
    net = dit(slots)
    control = DiTControl.copy_of(net, 1).requires_grad_(False)
    assert (control.head is None) == (slots == 0)
    x, t, cond, _ = given(slots)
    assert torch.equal(drawn(net, control, slots, 1.0), net(x, t, cond))


def test_the_head_adds_to_the_output_in_proportion_to_the_strength() -> None:
    net = dit(2)
    control = DiTControl.copy_of(net, 1).requires_grad_(False)
    assert control.head is not None
    torch.nn.init.normal_(control.head.proj_out.weight, std=0.3)
    x, t, cond, hint = given(2)
    kind = DiTControlKind(network=control)
    _, (output,) = control(x, t, cond, *kind.prepare(hint))
    assert output.shape == x.shape and float(output.square().mean()) > 1e-4
    plain = net(x, t, cond)
    for strength in (1.0, -0.5):
        found = drawn(net, control, 2, strength)
        torch.testing.assert_close(found - plain, strength * output, atol=1e-5, rtol=1e-4)


def test_the_head_reads_the_hint_in_a_cell_and_its_neighbours() -> None:
    """With the tokens as they are, a pixel of the hint acts on 3×3 cells."""
    control = DiTControl.copy_of(dit(2), 1).requires_grad_(False)
    head = control.head
    assert head is not None
    torch.nn.init.normal_(head.proj_out.weight, std=0.3)
    x, _, cond, hint = given(2, 1)
    kind, tokens, cells = DiTControlKind(network=control), torch.randn(1, 16, 16), control.cells(x, cond)
    changed = hint.clone()
    changed[..., 4 * CELL + 1, 3 * CELL + 2] += 1
    before, after = (head(tokens, cells, *kind.prepare(each)) for each in (hint, changed))
    rows, columns = (before != after).any(1)[0].nonzero().unbind(-1)
    assert (int(rows.min()), int(rows.max())) == (3, 5) and (int(columns.min()), int(columns.max())) == (2, 4)


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match="cell_head: expected False, the DiT has no exemplars"):
        DiTControlConfig(dit=dit(0).config, blocks=1, cell_head=True)
    x, t, cond, _ = given(2)
    wrong = Cond(context=cond.context, exemplars=cond.exemplars, output=(torch.zeros(2, 6, 4, 4),))
    with pytest.raises(ValueError, match=r"Cond.output: expected the shape \(2, 6, 8, 8\).*\(2, 6, 4, 4\)"):
        dit(2)(x, t, wrong)


def test_a_file_with_a_head_is_for_a_transformer_with_exemplars() -> None:
    net = dit(2)
    for slots in (0, 2):
        control = DiTControl.copy_of(dit(slots), 2)
        shapes = {name: tuple(value.shape) for name, value in control.state_dict().items()}
        assert dit_control_config(shapes, dit(slots).config, source=Path("a")) == control.control
    shapes = {name: tuple(value.shape) for name, value in DiTControl.copy_of(net, 2).state_dict().items()}
    with pytest.raises(ValueError, match="for a transformer with exemplars"):
        dit_control_config(shapes, dit(0).config, source=Path("a"))
