"""Folders of CLIP's image tower whose config.json is damaged are refused at once, by name."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from clip_towers import write_tower

from ldm.weights.controls.ip_adapter import load_vision


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": ["gelu"]}, "hidden_act: .*gelu"),
        ({"num_attention_heads": {"a": 1}}, "heads: expected"),
        ({"patch_size": 14.5}, "patch_size: expected"),
        ({"intermediate_size": 64.5}, "mlp_width: expected"),
        ({"num_attention_heads": 5}, "width 32 cannot be split into 5 heads"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers: expected 1 to 200"),
        ({"hidden_size": 2**40, "num_attention_heads": 1}, "width: expected at most"),
        ({"model_type": "x" * 5000}, "model_type: 'xxx"),
        ({"architectures": [1]}, "architectures: expected a list of names"),
    ],
)
def test_what_is_no_tower_is_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = write_tower(tmp_path / "tower")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | fields), encoding="utf-8")
    begin = time.process_time()
    with pytest.raises(ValueError, match=message) as caught:
        load_vision(folder, torch.float32)
    assert str(folder) in str(caught.value) and len(str(caught.value)) < 2000
    assert time.process_time() - begin < 5
