"""What modules keep beside their parameters: packed, folded and quantised weights (`ldm.support.derived`)."""

from __future__ import annotations

from typing import Any

from torch import nn

from ldm.speed.substitute import Substitute
from ldm.support.derived import Derived


def derived(module: nn.Module, name: str) -> Derived[Any]:
    """Return the attribute `name` of a module, which is neither a parameter nor in the state dict.

    Args:
        module: The module.
        name: Name of the attribute; an empty `Derived` is made at the first use.
    """
    found = module.__dict__.get(name)
    if found is None:
        found = module.__dict__.setdefault(name, Derived())  # of two threads, one makes it
    assert isinstance(found, Derived)
    return found


def clear_derived(network: nn.Module) -> None:
    """Discard what is derived from the parameters of a network's modules and kept on these."""
    for part in network.modules():
        for value in list(part.__dict__.values()):
            for own in list(vars(value).values()) if isinstance(value, Substitute) else [value]:
                if isinstance(own, Derived):
                    own.clear()
