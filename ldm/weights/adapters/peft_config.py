"""What peft's configuration beside or in an adapter file states: read, judged, and compared.

It is adapter_config.json, whose keys are plain, or a text in the header of a file of diffusers, whose keys
begin with the name of the component that they are for, such as "unet.lora_alpha".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ldm.support.config import nearest
from ldm.support.text import shown
from ldm.weights.fields.adapters import PEFT_KINDS
from ldm.weights.fields.judge import Finding, conflicts, judge_fields, warnings_of

CONFIG_COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2")
MOST_TERMS = 64  # of a series in a configuration

PeftConfig = Mapping[str, Any]  # read from JSON; Any: not checked yet


def by_component(config: PeftConfig) -> dict[str, dict[str, Any]]:
    """Return the fields of each component that a configuration has any for; "" for plain keys."""
    found: dict[str, dict[str, Any]] = {}
    for key, value in config.items():
        component, dot, name = key.partition(".")
        named = dot and component in CONFIG_COMPONENTS
        found.setdefault(component if named else "", {})[name if named else key] = value
    return found


def component_fields(config: PeftConfig, component: str) -> dict[str, Any]:
    """Return the fields for a component: its own, and those with plain keys."""
    parts = by_component(config)
    return {**parts.get("", {}), **parts.get(component, {})}


def peft_kind(own: PeftConfig) -> str:
    """Return the kind that the fields of a component state; ValueError for one that is not known."""
    kind = own.get("peft_type", "LORA")
    if not isinstance(kind, str) or kind.upper() not in PEFT_KINDS:
        raise ValueError(f"peft_type {shown(kind)}; {nearest(str(kind)[:100], PEFT_KINDS)}")
    return kind.upper()


def config_findings(config: PeftConfig) -> dict[str, list[Finding]]:
    """Return what is done with each field of a configuration, by component.

    Raises:
        ValueError: If it states a kind that is not known.
    """
    return {
        component: judge_fields(own, PEFT_KINDS[peft_kind(own)])
        for component, own in by_component(config).items()
    }


def check_config(config: PeftConfig, where: str) -> tuple[str, ...]:
    """Compare a configuration with what this library computes.

    Args:
        config: The configuration.
        where: Beginning of messages.

    Returns:
        Warnings about fields that are not known.

    Raises:
        ValueError: If it states a kind that is not known, or a field asks for what is not computed.
    """
    notes: list[str] = []
    for component, findings in config_findings(config).items():
        place = f"{where} for {component}" if component else where
        if wrong := conflicts(findings):
            raise ValueError(f"{place} cannot be followed: {'; '.join(wrong)}")
        notes += warnings_of(findings, place)
    return tuple(notes)


def config_scale(config: PeftConfig, component: str, path: str, rank: int) -> float:
    """Return the factor c of a module's change, for a file that has no alpha for it; see `AdapterFile`."""
    own = component_fields(config, component)
    if "lora_alpha" not in own and "alpha" not in own:
        return 1.0
    if rank == 0 and peft_kind(own) == "LORA":
        return 1.0
    alpha = _pattern_value(own.get("alpha_pattern"), path, own.get("lora_alpha", own.get("alpha")))
    rank = rank or int(_pattern_value(own.get("rank_pattern"), path, own.get("r")))
    if rank < 1:
        raise ValueError(f"its configuration states the rank {rank}")
    return alpha / (math.sqrt(rank) if _flag(own, "use_rslora", False) else rank)


def config_terms(config: PeftConfig, component: str) -> int | None:
    """Return the number of terms of the series for rotations; None for no series; see `AdapterFile`."""
    own = component_fields(config, component)
    if not _flag(own, "use_cayley_neumann", True):
        return None
    terms = own.get("num_cayley_neumann_terms", 5)
    if isinstance(terms, bool) or not isinstance(terms, int) or not 1 <= terms <= MOST_TERMS:
        raise ValueError(f"num_cayley_neumann_terms: expected 1 to {MOST_TERMS}, got {shown(terms)}")
    return terms


def _flag(own: PeftConfig, name: str, default: bool) -> bool:
    """Return a field that is true or false, `default` where it is absent or null."""
    value = own.get(name)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{name}: expected true or false, got {shown(value)}")
    return default if value is None else value


def _pattern_value(patterns: Any, path: str, default: Any) -> float:
    """Return the number that a configuration has for a module: that of the name it ends with, or the default.

    Raises:
        ValueError: If it is no number, or a pattern is more than a name.
    """
    value = default
    if patterns is not None and not isinstance(patterns, Mapping):
        raise ValueError(f"rank_pattern or alpha_pattern: expected a mapping, got {shown(patterns)}")
    for name, each in (patterns or {}).items():
        plain = str(name).removeprefix("^").removesuffix("$")
        if any(sign in plain for sign in "*+?()[]{}|\\"):
            raise ValueError(f"pattern {shown(name)}: expected the name of a module, or the end of one")
        if path == plain or path.endswith(f".{plain}"):
            value = each
            break
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"rank or alpha: expected a number, got {shown(value)}")
    return float(value)
