"""Server-sent events."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

EVENT_STREAM = "text/event-stream"


def event_lines(content: Mapping[str, Any]) -> bytes:
    """Return a server-sent event, named by its "type", whose data are JSON."""
    return f"event: {content['type']}\ndata: {json.dumps(content)}\n\n".encode()
