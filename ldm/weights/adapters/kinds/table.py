"""The table of kinds: which tensors a kind has, and what makes its change of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from ldm.weights.adapters.kinds.decomposed import Decomposed
from ldm.weights.adapters.kinds.delta import Additive, Delta
from ldm.weights.adapters.kinds.difference import (
    BiasDifference,
    Difference,
    NormBiasDifference,
    NormDifference,
    Replacement,
)
from ldm.weights.adapters.kinds.generalized import Generalized
from ldm.weights.adapters.kinds.hadamard import Hadamard
from ldm.weights.adapters.kinds.input_rotation import InputRotation
from ldm.weights.adapters.kinds.kronecker import Kronecker, KroneckerFactor
from ldm.weights.adapters.kinds.low_rank import LowRank
from ldm.weights.adapters.kinds.orthogonal import Butterfly, Rotation
from ldm.weights.adapters.kinds.scaling import BiasScaling, Scaling, peft_factors

Leaves = Mapping[str, Tensor]
# The factor of a change of a rank (0: one without a rank), where the file has no alpha for it.
ScaleOf = Callable[[int], float]
TERMS = "oft_terms"  # added to the tensors of peft's OFT: the number of terms of its series; 0 for no series


@dataclass(frozen=True, kw_only=True)
class ChangeKind:
    """What a kind of change is made of.

    Args:
        needs: Leaves, of each of which one spelling must be present.
        may: Leaves that may be present.
        make: Makes the change of the module's weight.
        alpha: Whether `alpha` may be present too.
        magnitude: Whether DoRA's magnitudes may be present too.
    """

    needs: tuple[tuple[str, ...], ...]
    make: Callable[[Leaves, ScaleOf], Delta]
    may: tuple[str, ...] = ()
    alpha: bool = True
    magnitude: bool = False

    def matches(self, leaves: Leaves) -> bool:
        """Return whether the leaves are those of this kind."""
        return all(any(name in leaves for name in names) for names in self.needs)

    def uses(self) -> set[str]:
        """Return the leaves that this kind reads."""
        extra = {"alpha"} if self.alpha else set()
        extra |= {"dora_scale", "lora_magnitude_vector"} if self.magnitude else set()
        return {name for names in self.needs for name in names} | set(self.may) | extra


def scale_of(leaves: Leaves, rank: int, default: ScaleOf) -> float:
    """Return c = alpha / r; 1 if alpha is 0, and what the file states elsewhere if there is none."""
    if "alpha" not in leaves:
        return default(rank)
    alpha = number_in(leaves, "alpha")
    return alpha / rank if alpha else 1.0


def number_in(leaves: Leaves, name: str) -> float:
    """Return the number that a leaf holds; ValueError if it holds several, or one that is not finite."""
    tensor = leaves[name]
    if tensor.numel() != 1 or not math.isfinite(value := float(tensor)):
        found = f"{value}" if tensor.numel() == 1 else f"the shape {tuple(tensor.shape)}"
        raise ValueError(f"{name}: expected a finite number, got {found}")
    return value


def _low_rank(leaves: Leaves, default: ScaleOf) -> LowRank:
    down = leaves["lora_down.weight"]
    return LowRank(
        up=leaves["lora_up.weight"],
        down=down,
        mid=leaves.get("lora_mid.weight"),
        scale=scale_of(leaves, down.shape[0], default),
    )


def _embedding(leaves: Leaves, default: ScaleOf) -> LowRank:
    a, b = leaves["lora_embedding_A"], leaves["lora_embedding_B"]  # (r, vocabulary), (D, r)
    return LowRank(up=a.t(), down=b.t(), scale=scale_of(leaves, a.shape[0], default))


def _hadamard(leaves: Leaves, default: ScaleOf) -> Hadamard:
    b1 = leaves["hada_w1_b"]
    return Hadamard(
        a1=leaves["hada_w1_a"],
        b1=b1,
        a2=leaves["hada_w2_a"],
        b2=leaves["hada_w2_b"],
        t1=leaves.get("hada_t1"),
        t2=leaves.get("hada_t2"),
        scale=scale_of(leaves, b1.shape[0], default),
    )


def _kronecker(leaves: Leaves, default: ScaleOf) -> Kronecker:
    first, second = (
        KroneckerFactor(
            full=leaves.get(f"lokr_w{i}"),
            a=leaves.get(f"lokr_w{i}_a"),
            b=leaves.get(f"lokr_w{i}_b"),
            t=leaves.get("lokr_t2") if i == 2 else None,
        )
        for i in (1, 2)
    )
    rank = first.rank if second.rank is None else second.rank
    scale = scale_of(leaves, rank, default) if rank is not None else default(0)  # whatever alpha says
    return Kronecker(first=first, second=second, scale=scale)


def _generalized(leaves: Leaves, default: ScaleOf) -> Generalized:
    a1, a2, b1, b2 = (leaves[f"{name}.weight"] for name in ("a1", "a2", "b1", "b2"))
    rank = min(a1.shape[:2], default=0)
    return Generalized(
        a1=a1, a2=a2, b1=b1, b2=b2, bm=leaves.get("bm.weight"), scale=scale_of(leaves, rank, default)
    )


def _rotation(leaves: Leaves, default: ScaleOf) -> Rotation:
    blocks = leaves["oft_blocks"]
    if blocks.ndim not in (3, 4):
        raise ValueError(f"oft_blocks has the shape {tuple(blocks.shape)}, expected 3 or 4 dimensions")
    constraint = number_in(leaves, "alpha") if "alpha" in leaves else 0.0
    made = Rotation if blocks.ndim == 3 else Butterfly
    return made(blocks=blocks, constraint=constraint, rescale=leaves.get("rescale"))


def _scaling(leaves: Leaves, default: ScaleOf) -> Scaling:
    return Scaling(values=leaves["weight"], on_input=bool(number_in(leaves, "on_input")))


def _peft_scaling(leaves: Leaves, default: ScaleOf) -> Scaling:
    values, on_input = peft_factors(leaves["ia3_l"])
    return Scaling(values=values, on_input=on_input)


def _peft_bias_scaling(leaves: Leaves) -> BiasScaling | None:
    """Return the change of the bias by peft's factors of outputs; None if they are those of inputs."""
    values, on_input = peft_factors(leaves["ia3_l"])
    return None if on_input else BiasScaling(values=values)


def _input_rotation(leaves: Leaves, default: ScaleOf) -> InputRotation:
    terms = int(leaves[TERMS]) if TERMS in leaves else InputRotation.terms
    return InputRotation(values=leaves["oft_R.weight"], terms=terms or None)


def _each(*names: str) -> tuple[tuple[str, ...], ...]:
    return tuple((name,) for name in names)


CHANGE_KINDS: tuple[ChangeKind, ...] = (
    ChangeKind(
        needs=_each("lora_up.weight", "lora_down.weight"),
        may=("lora_mid.weight", "lora_up.bias"),
        make=_low_rank,
        magnitude=True,
    ),
    ChangeKind(needs=_each("lora_embedding_A", "lora_embedding_B"), make=_embedding),
    ChangeKind(
        needs=_each("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
        may=("hada_t1", "hada_t2"),
        make=_hadamard,
        magnitude=True,
    ),
    ChangeKind(
        needs=(("lokr_w1", "lokr_w1_a"), ("lokr_w2", "lokr_w2_a")),
        may=("lokr_w1_b", "lokr_w2_b", "lokr_t2"),
        make=_kronecker,
        magnitude=True,
    ),
    ChangeKind(
        needs=_each("a1.weight", "a2.weight", "b1.weight", "b2.weight"), may=("bm.weight",), make=_generalized
    ),
    ChangeKind(needs=_each("oft_blocks"), may=("rescale",), make=_rotation),
    ChangeKind(needs=_each("oft_R.weight"), may=(TERMS,), make=_input_rotation, alpha=False),
    ChangeKind(needs=_each("weight", "on_input"), make=_scaling, alpha=False),
    ChangeKind(needs=_each("ia3_l"), make=_peft_scaling, alpha=False),
    ChangeKind(needs=_each("set_weight"), make=lambda x, _: Replacement(values=x["set_weight"]), alpha=False),
    ChangeKind(needs=_each("diff"), make=lambda x, _: Difference(values=x["diff"])),
    ChangeKind(needs=_each("w_norm"), make=lambda x, _: NormDifference(values=x["w_norm"])),
)
BIASES: dict[str, type[Difference]] = {
    "diff_b": BiasDifference,
    "b_norm": NormBiasDifference,
    "lora_up.bias": BiasDifference,
}
"""Leaves that change the bias of a module, and the kind of the change."""


def deltas_of(leaves: Leaves, default: ScaleOf) -> tuple[Delta | None, Delta | None, list[str]]:
    """Return the changes of a module's weight and bias, and the leaves that are not used.

    Args:
        leaves: The tensors of the module by leaf.
        default: The factor c for a rank, where the file has no alpha.

    Raises:
        ValueError: If a tensor is missing, or has an impossible shape.
    """
    for name, tensor in leaves.items():
        one = tensor.numel() == 1 and not tensor.is_complex()  # an alpha or a flag, which may be whole
        if not tensor.numel() or not (tensor.is_floating_point() or one):
            raise ValueError(
                f"{name}: expected floating-point numbers, got {tensor.dtype} of shape {tuple(tensor.shape)}"
            )
    kind = next((kind for kind in CHANGE_KINDS if kind.matches(leaves)), None)
    bias_leaf = next((leaf for leaf in BIASES if leaf in leaves), None)
    bias: Delta | None = None if bias_leaf is None else BIASES[bias_leaf](values=leaves[bias_leaf])
    if "ia3_l" in leaves:
        bias = _peft_bias_scaling(leaves)
    used = {"alpha", bias_leaf} if bias_leaf is not None else set()
    delta: Delta | None = None
    if kind is not None:
        used |= kind.uses()
        try:
            delta = kind.make(leaves, default)
            delta = _with_magnitude(delta, leaves) if kind.magnitude else delta
        except (IndexError, RuntimeError, ZeroDivisionError) as error:
            raise ValueError(f"its tensors have impossible shapes ({error})") from None
    return delta, bias, [leaf for leaf in leaves if leaf not in used]


def _with_magnitude(delta: Delta, leaves: Leaves) -> Delta:
    """Return a change with DoRA's magnitudes if there are any; peft's are those of the outputs."""
    assert isinstance(delta, Additive)
    if "dora_scale" in leaves:
        return Decomposed(inner=delta, magnitude=leaves["dora_scale"])
    if "lora_magnitude_vector" in leaves:
        return Decomposed(inner=delta, magnitude=leaves["lora_magnitude_vector"].reshape(-1, 1))
    return delta
