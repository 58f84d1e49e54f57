"""unCLIP models in ldm layout: bit-identical when read back, and not mixed with parts of another CLIP."""

from __future__ import annotations

import pytest
import reduced_unclip_families
import torch
import yaml
from tiny_unclip import tiny_kandinsky, tiny_karlo, tiny_stable

import ldm
from ldm.catalog.lookup import read_card
from ldm.catalog.published_unclip import PRIOR_CARDS, UNCLIP_CARDS
from ldm.support.config import to_dict


@pytest.mark.parametrize("make", [tiny_karlo, tiny_kandinsky, tiny_stable])
def test_a_model_is_read_back_bit_identical(make, tmp_path):
    pipe = make()
    ldm.save(pipe, tmp_path)
    again = reduced_unclip_families.load(None, weights=tmp_path)
    before, after = pipe.state_dict(), again.state_dict()
    assert before.keys() == after.keys() and all(
        torch.equal(after[key], value) for key, value in before.items()
    )
    made = [model.imagine("a cat", prior_steps=2, progress=False).vector for model in (pipe, again)]
    # of order 1; the order of summation depends on where tensors are in memory
    assert torch.allclose(*made, atol=1e-4)
    assert again.card == pipe.card and set(again.origin) >= {"prior", "decoder", "vision"}


def test_a_part_of_another_clip_and_a_lost_one_are_refused(tmp_path):
    ldm.save(tiny_kandinsky(), tmp_path)
    about = yaml.safe_load((tmp_path / "prior.yaml").read_text(encoding="utf-8"))
    (tmp_path / "prior.yaml").write_text(yaml.safe_dump({**about, "clip": "another"}), encoding="utf-8")
    with pytest.raises(ValueError, match="prior in .* was trained on 'another'"):
        reduced_unclip_families.load(None, weights=tmp_path)
    (tmp_path / "prior.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no prior"):
        reduced_unclip_families.load(None, weights=tmp_path)


@pytest.mark.parametrize("card", [*UNCLIP_CARDS.values(), *PRIOR_CARDS.values()], ids=lambda card: card.name)
def test_cards_survive_as_yaml(card, tmp_path):
    (tmp_path / "card.yaml").write_text(yaml.safe_dump(to_dict(card)), encoding="utf-8")
    assert read_card(tmp_path / "card.yaml") == card
