"""Each kind of adapter against the module of its own trainer: merged weights, and layers on the fly."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.full import FullModule
from lycoris.modules.glora import GLoRAModule
from lycoris.modules.ia3 import IA3Module
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from lycoris.modules.norms import NormModule
from torch import Tensor, nn

from ldm.weights.adapters.kinds.decomposed import Decomposed
from ldm.weights.adapters.kinds.delta import Delta
from ldm.weights.adapters.kinds.generalized import Generalized
from ldm.weights.adapters.kinds.kronecker import Kronecker, KroneckerFactor
from ldm.weights.adapters.kinds.low_rank import LowRank
from ldm.weights.adapters.kinds.orthogonal import Butterfly, Rotation, rotations
from ldm.weights.adapters.kinds.table import deltas_of
from ldm.weights.adapters.on_the_fly import Changed

STRENGTHS = (1.0, 0.6, 0.0, -0.5)
BAR = 1e-5  # of the RMS of the output
LAYERS = {
    "linear": lambda: nn.Linear(24, 32),
    "square": lambda: nn.Linear(32, 32),
    "conv": lambda: nn.Conv2d(16, 32, 3, padding=1),
    "strided": lambda: nn.Conv2d(16, 32, 3, stride=2, padding=1),
    "1x1": lambda: nn.Conv2d(24, 32, 1),
}


@dataclass(frozen=True)
class Row:
    """One kind: the trainer's module and its options, and the strengths at which it is compared."""

    name: str
    module: Any
    options: dict[str, Any] = field(default_factory=dict)
    layers: tuple[str, ...] = ("linear", "square", "conv", "strided", "1x1")
    strengths: tuple[float, ...] = STRENGTHS


CONVS, LINEARS = ("conv", "strided"), ("linear", "square")
ONE = (1.0,)
ROWS = (
    Row("LoRA", LoConModule),
    Row("LoRA, rank-stabilised", LoConModule, {"rs_lora": True}),
    Row("LoRA with a scalar", LoConModule, {"use_scalar": True}),
    Row("LoCon, Tucker", LoConModule, {"use_tucker": True}, CONVS),
    Row("DoRA of outputs", LoConModule, {"weight_decompose": True}, strengths=ONE),
    Row("DoRA of inputs", LoConModule, {"weight_decompose": True, "wd_on_out": False}, strengths=ONE),
    Row("LoHa", LohaModule),
    Row("LoHa, Tucker", LohaModule, {"use_tucker": True}, CONVS),
    Row("LoHa, DoRA", LohaModule, {"weight_decompose": True}, strengths=ONE),
    Row("LoKr", LokrModule, {"factor": 4}),
    Row("LoKr, both factored", LokrModule, {"factor": 4, "decompose_both": True, "lora_dim": 1}),
    Row("LoKr, both full", LokrModule, {"factor": 4, "full_matrix": True}),
    Row("LoKr, Tucker", LokrModule, {"factor": 2, "use_tucker": True, "lora_dim": 2}, CONVS),
    Row("LoKr, DoRA", LokrModule, {"factor": 4, "weight_decompose": True}, strengths=ONE),
    Row("full", FullModule),
    Row("(IA)³ of outputs", IA3Module),
    Row("(IA)³ of inputs", IA3Module, {"train_on_input": True}),
    Row("GLoRA", GLoRAModule, layers=("linear", "square", "1x1", "conv")),
    Row("Diag-OFT", DiagOFTModule),
    Row("Diag-OFT, constrained", DiagOFTModule, {"constraint": 0.01}),
    Row("Diag-OFT, rescaled", DiagOFTModule, {"rescaled": True}, strengths=ONE),
    Row("BOFT", ButterflyOFTModule),
    Row("BOFT, constrained", ButterflyOFTModule, {"constraint": 0.01}),
    Row("BOFT, rescaled", ButterflyOFTModule, {"rescaled": True}, strengths=ONE),
)
CASES = [pytest.param(row, layer, id=f"{row.name}, {layer}") for row in ROWS for layer in row.layers]


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def randomised(module: nn.Module) -> nn.Module:
    """Give every trained tensor random values, so that no part of the change is zero."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in module.named_parameters():
            own = torch.empty_like(p).normal_(0, 0.3, generator=generator)
            p.copy_(p * (1 + own) if name in ("dora_scale", "rescale") else own)
    return module.eval()


def trained(row: Row, layer: nn.Module, strength: float) -> Any:
    options = {"lora_dim": 4, "alpha": 2.0, **row.options}
    torch.manual_seed(1)
    return randomised(row.module("lora_unet_x", layer, multiplier=strength, **options))


def of_trainer(module: Any, layer: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the output of a layer with the trainer's module, and what the trainer saves."""
    module.apply_to()
    try:
        return layer(x), {name: value.detach().clone() for name, value in module.state_dict().items()}
    finally:
        module.restore()


def layer_and_input(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    layer = LAYERS[name]().requires_grad_(False)
    x = torch.randn(2, 5, layer.in_features) if isinstance(layer, nn.Linear) else None
    return layer, torch.randn(2, layer.in_channels, 6, 6) if x is None else x


def delta_and_bias(state: dict[str, Tensor], shape: tuple[int, ...]) -> tuple[Delta, Delta | None]:
    delta, bias, left = deltas_of(state, lambda rank: 1.0)
    assert delta is not None and left == [] and delta.misfit(shape) == ""
    return delta, bias


@pytest.mark.parametrize(("row", "layer_name"), CASES)
@torch.no_grad()
def test_merged_and_on_the_fly_equal_the_trainer(row: Row, layer_name: str) -> None:
    for strength in row.strengths:
        layer, x = layer_and_input(layer_name)
        plain = layer(x)
        module = trained(row, layer, strength)
        wanted, state = of_trainer(module, layer, x)
        delta, bias = delta_and_bias(state, tuple(layer.weight.shape))
        if strength == 1:
            assert rms(wanted - plain) > 1e-2 * rms(plain)  # the change is not negligible
        hooked, _ = layer_and_input(layer_name)
        hooked.register_forward_hook(Changed([(delta, strength)]))
        layer, _ = layer_and_input(layer_name)
        layer.weight.copy_(delta.apply(layer.weight.clone(), strength))
        if bias is not None:
            layer.bias.copy_(bias.apply(layer.bias.clone(), strength))
            hooked.bias.copy_(layer.bias)
        assert rms(layer(x) - wanted) < BAR * rms(wanted), strength
        assert rms(hooked(x) - wanted) < BAR * rms(wanted), strength


@pytest.mark.parametrize("norm", [nn.LayerNorm(24), nn.GroupNorm(4, 24)], ids=["layer", "group"])
@torch.no_grad()
def test_norms_equal_the_trainer(norm: nn.Module) -> None:
    x = torch.randn(3, 24)
    for strength in STRENGTHS:
        module = randomised(NormModule("lora_unet_x", norm, multiplier=strength))
        wanted, state = of_trainer(module, norm, x)
        delta, bias = delta_and_bias(state, (24,))
        assert bias is not None
        weight = delta.apply(norm.weight.clone(), strength)
        offset = bias.apply(norm.bias.clone(), strength)
        ours = torch.func.functional_call(norm, {"weight": weight, "bias": offset}, (x,))
        assert rms(ours - wanted) < BAR * rms(wanted)


@torch.no_grad()
def test_closed_forms() -> None:
    w = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    up, down = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 5.0]])
    lora = LowRank(up=up, down=down, scale=0.5)
    assert torch.equal(lora.apply(w.clone(), 2.0), w + torch.tensor([[3.0, 5.0], [6.0, 10.0]]))
    first, second = torch.tensor([[2.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    lokr = Kronecker(first=KroneckerFactor(full=first), second=KroneckerFactor(full=second))
    assert torch.equal(lokr.apply(w.clone(), 1.0), w + 2 * torch.eye(2))
    # V = W for a change of zero, so that a magnitude of twice the norms doubles the weight
    still = LowRank(up=torch.zeros(2, 1), down=down)
    rows = Decomposed(inner=still, magnitude=2 * w.norm(dim=1, keepdim=True))
    assert torch.allclose(rows.apply(w.clone(), 1.0), 2 * w)
    assert torch.allclose(rows.apply(w.clone(), 0.5), 1.5 * w)
    columns = Decomposed(inner=still, magnitude=3 * w.norm(dim=0, keepdim=True))
    assert torch.allclose(columns.apply(w.clone(), 1.0), 3 * w)


@torch.no_grad()
def test_rotations_are_orthogonal_and_limited() -> None:
    blocks = torch.randn(3, 4, 4, dtype=torch.float64)
    r = rotations(blocks, 0.0)
    assert torch.allclose(r @ r.transpose(1, 2), torch.eye(4, dtype=torch.float64).expand(3, 4, 4))
    assert torch.allclose(rotations(blocks, 1e-9), torch.eye(4, dtype=torch.float64), atol=1e-8)
    w = torch.randn(16, 5)
    for turn in (Rotation(blocks=torch.randn(4, 4, 4)), Butterfly(blocks=torch.randn(2, 4, 4, 4))):
        assert torch.allclose(turn.apply(w.clone(), 1.0).norm(), w.norm())


@torch.no_grad()
def test_an_old_order_of_glora() -> None:
    """Old files hold the factors the other way round; a square weight must not be taken for a new file."""
    w = torch.randn(6, 6)
    a, b = torch.randn(2, 6), torch.randn(6, 2)  # (r, in), (in, r)
    p, q = torch.randn(2, 6), torch.randn(6, 2)  # (r, in), (out, r)
    old = Generalized(a1=a, a2=b, b1=p, b2=q)
    new = Generalized(a1=b, a2=a, b1=q, b2=p)
    wanted = w + w @ b @ a + q @ p
    assert old.misfit((6, 6)) == "" and new.misfit((6, 6)) == ""
    assert torch.allclose(old.apply(w.clone(), 1.0), wanted, atol=1e-5)
    assert torch.allclose(new.apply(w.clone(), 1.0), wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("delta", "shape"),
    [
        (LowRank(up=torch.zeros(4, 2), down=torch.zeros(2, 3)), (4, 4)),
        (LowRank(up=torch.zeros(4, 3), down=torch.zeros(2, 4)), (4, 4)),
        (LowRank(up=torch.zeros(4), down=torch.zeros(2, 4)), (4, 4)),
        (Rotation(blocks=torch.zeros(2, 4, 4)), (4, 4)),
        (Butterfly(blocks=torch.zeros(9, 2, 2, 2)), (4, 4)),
        (Generalized(**dict.fromkeys(("a1", "a2", "b1", "b2"), torch.zeros(2, 3))), (4, 4)),
    ],
)
def test_a_change_of_another_shape_is_named(delta: Delta, shape: tuple[int, ...]) -> None:
    assert delta.misfit(shape)
