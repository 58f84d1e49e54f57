"""The stages of unCLIP: the prior that makes an embedding, the decoder that makes a picture of it, the upsamplers that enlarge the picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ldm.support.config import nearest


def options_of(stage: str, options: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The options of a stage among those of a call: "prior_steps" becomes "steps"; ValueError for one that it does not have."""
    own = {name.removeprefix(f"{stage}_"): value for name, value in options.items() if name.startswith(f"{stage}_")}
    for name in own:
        if name not in names:
            raise ValueError(f"the {stage} has no option {name!r}; {nearest(name, names)}")
    return {name: value for name, value in own.items() if value is not None}
