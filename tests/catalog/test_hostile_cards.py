"""Cards and configurations whose numbers are implausible are refused before a network is made."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from ldm.catalog.lookup import find_card, parse_card, read_card
from ldm.models.clip.config import TextConfig
from ldm.models.draft import DraftConfig
from ldm.models.meta import MAX_NETWORK_TENSORS
from ldm.models.unet_config import UNetConfig
from ldm.models.vae import VAEConfig
from ldm.support.config import MAX_SIZE, build, to_dict
from ldm.weights.parts import build_network

NETWORKS: list[tuple[type, dict[str, Any], str]] = [
    (TextConfig, {"layers": 10**6}, f"at most {MAX_NETWORK_TENSORS:,} tensors"),
    (TextConfig, {"width": 12 * 10**8}, r"TextConfig\.width: expected at most .*, got 1200000000"),
    (TextConfig, {"vocab_size": 10**12}, r"TextConfig\.vocab_size: expected at most"),
    (TextConfig, {"context_length": 10**9}, r"TextConfig\.context_length: expected at most"),
    (UNetConfig, {"blocks": 10**6}, f"at most {MAX_NETWORK_TENSORS:,} tensors"),
    (UNetConfig, {"depth": [10**6, 1, 1, 0]}, f"at most {MAX_NETWORK_TENSORS:,} tensors"),
    (UNetConfig, {"mid_depth": 10**6}, f"at most {MAX_NETWORK_TENSORS:,} tensors"),
    (UNetConfig, {"channels": [10**9, 32, 32, 32]}, r"UNetConfig\.channels: expected at most"),
    (UNetConfig, {"channels": [32] * 999, "depth": [0] * 999}, f"at most {MAX_NETWORK_TENSORS:,} tensors"),
    (VAEConfig, {"blocks": 10**6}, f"at most {MAX_NETWORK_TENSORS:,} tensors"),
    (
        DraftConfig,
        {"embed_dim": 8, "width": 8, "size": 8, "layers": 10**6},
        f"at most {MAX_NETWORK_TENSORS:,} tensors",
    ),
]


@pytest.mark.parametrize(("kind", "fields", "message"), NETWORKS, ids=lambda value: str(value)[:40])
def test_an_implausible_network_is_refused_at_once(kind, fields, message):
    begin = time.thread_time()
    with pytest.raises(ValueError, match=message):
        build_network(build(kind, fields, "model"))
    assert time.thread_time() - begin < 5


@pytest.mark.parametrize("value", [0, -1, 3, 7])
@pytest.mark.parametrize("kind", [TextConfig, UNetConfig, VAEConfig])
def test_numbers_that_make_no_network_are_value_errors(kind, value):
    for name, usual in to_dict(kind()).items():
        if isinstance(usual, list):
            fields = [{name: [value] * len(usual)}, {name: []}]
        else:
            fields = [{name: value}]
        for each in fields:
            try:
                build_network(build(kind, each, "model"))
            except ValueError as error:
                assert len(str(error)) < 1000 and str(error).isprintable()


CARD = Path(__file__).parents[2] / "ldm" / "assets" / "emoji-ldm" / "card.yaml"
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"schedule": {"kind": "cosine", "timesteps": 10**9}}, "schedule: timesteps: expected 1 to 65,536"),
    ({"schedule": {"kind": "cosine", "timesteps": 0}}, "schedule: timesteps: expected 1 to 65,536"),
    ({"schedule": {"kind": "linear", "beta_start": 2.0}}, "schedule of unet: betas must lie"),
    (
        {"schedule": {"kind": "cosine", "beta_start": float("nan")}},
        "schedule.beta_start: expected a finite number",
    ),
    (
        {"defaults": {"sampler": "ddim", "steps": 1, "guidance": float("inf"), "height": 8, "width": 8}},
        "finite",
    ),
    (
        {"defaults": {"sampler": "ddim", "steps": 1, "guidance": 1, "height": 10**9, "width": 8}},
        "height: expected 1",
    ),
    (
        {"defaults": {"sampler": "ddim", "steps": 0, "guidance": 1, "height": 8, "width": 8}},
        "steps: expected 1",
    ),
    (
        {"defaults": {"sampler": ["ddim"], "steps": 1, "guidance": 1, "height": 8, "width": 8}},
        "sampler: expected str",
    ),
    ({"text": {"length": 10**9}}, "text: length: expected 2 to 100,000"),
    ({"text": {"layer": 10**9}}, "text: layer: expected"),
    ({"convention": {"grids": {}}}, r'convention: grids: expected an entry "\*"'),
    ({"convention": {"grids": {"*": {"spacing": 5}}}}, r"grids\.\*\.spacing: expected str"),
    ({"convention": {"grids": {"*": {"speed": 5}}}}, "unknown option 'speed'"),
    (
        {"convention": {"grids": {"*": {}}, "options": {"ddim": {"eta": "x"}}}},
        r"options\.ddim\.eta: expected float",
    ),
    ({"convention": ["k"]}, "convention: expected str, got"),
    ({"base": ["sd-v1-5"]}, r"base: expected str, got \['sd-v1-5'\]"),
    ({"family": ["latent"]}, "family: expected str"),
    ({"name": 5}, "name: expected str, got 5"),
    ({"files": {"unet.yaml": 5}}, r"files\.unet\.yaml: expected str, got 5"),
    ({"files": ["unet.yaml"]}, "files: expected a mapping"),
    (
        {"networks": {"unet": {"channels": [10**9, 32, 32, 32]}, "vae": "kl-f8"}},
        "unet.channels: expected at most 4,194,304",
    ),
    ({"networks": {"unet": ["sd1"], "vae": "kl-f8"}}, "networks.unet: expected str"),
    ({"summary": {"a": ["x" * 10**4] * 10}}, "summary: expected str, got {'a': "),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_a_wrong_card_is_refused_in_one_short_line(tmp_path, changes, message):
    path = tmp_path / "card.yaml"
    path.write_text(
        yaml.safe_dump({**yaml.safe_load(CARD.read_text(encoding="utf-8")), **changes}), encoding="utf-8"
    )
    with pytest.raises(ValueError, match=message) as caught:
        read_card(path)
    assert (
        "card.yaml" in str(caught.value) and len(str(caught.value)) < 1500 and str(caught.value).isprintable()
    )


def test_a_published_card_with_every_field_is_read(tmp_path):
    for name in ("sd-v1-5", "karlo-v1-alpha", "kandinsky-2-2", "sdxl-base"):
        card = find_card(name)[0]
        assert parse_card(to_dict(card), "card.yaml") == card
    assert MAX_SIZE > 250_002
