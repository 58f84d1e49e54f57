"""Progress bars: on standard error, on a terminal only."""

from __future__ import annotations

import sys
from typing import Any


def progress_bar(total: int, shown: bool = True, **options: Any) -> Any:
    """Return a tqdm progress bar; it shows nothing where there is no terminal, or no standard error at all.

    Args:
        total: Number of steps.
        shown: Whether to show it on a terminal.
        options: Further options of tqdm.
    """
    from tqdm import tqdm

    hidden = not shown or sys.stderr is None
    return tqdm(total=total, unit="step", disable=True if hidden else None, **options)
