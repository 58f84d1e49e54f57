"""Training on a folder of captioned images: the networks of latent diffusion, resumption, broken files."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from photos import write_broken, write_photos
from tiny_trainings import configs, write

from ldm.data.framing import Buckets
from ldm.data.sources.config import FolderData
from ldm.support.text import escaped
from ldm.training.config import OptimizerConfig, RunConfig
from ldm.training.draws import Draws
from ldm.training.inputs import reading
from ldm.training.inputs.files import FileImages
from ldm.training.loop import Run
from ldm.training.recipe import train_recipe
from ldm.training.run import open_run

RUN = RunConfig(name="any", steps=1, batch=4, optimizer=OptimizerConfig(lr=1e-3), seed=5)


@pytest.fixture
def photos(tmp_path, monkeypatch) -> Path:
    """Write 20 captioned images, and change to the folder above them."""
    monkeypatch.chdir(tmp_path)
    return write_photos(tmp_path / "photos", 20)


def folder_configs(photos: Path, **changes: Any) -> dict[str, dict[str, Any]]:
    """Return the trainings of `configs`, on a folder, and without a draft."""
    made = configs(Path("unused"), **changes)
    data = {"kind": "folder", "path": str(photos), "size": 32, "held_out": 0.2}
    unet = made["unet"]
    unet |= {"variants": 0, "text": {"folder": "runs/clip/export"}}
    unet["model"] = {**unet["model"], "in_channels": 4, "out_channels": 4}
    return {name: {**made[name], "data": data} for name in ("vae", "clip", "unet")}


def images(photos: Path, **options: Any) -> FileImages:
    return FileImages(FolderData(kind="folder", path=str(photos), **{"size": 32, **options}), RUN)


def weights(name: str) -> dict[str, torch.Tensor]:
    state = torch.load(f"runs/{name}/checkpoint.pt", weights_only=True)
    return {**state["model"], **{f"ema.{key}": value for key, value in state["ema"].items()}}


def train_whole_and_in_halves(name: str, config: dict[str, Any]) -> Run:
    """Train a network, and check that an interrupted run gives the same weights."""
    run = open_run(write(config, Path(f"{name}.yaml")))
    run.train(progress=False)
    halves = write({**config, "run": {**config["run"], "name": "halves"}}, Path(f"{name}-halves.yaml"))
    open_run(halves).train(progress=False, until=3)
    open_run(halves).train(progress=False)
    expected, got = weights(name), weights("halves")
    assert expected.keys() == got.keys() and all(torch.equal(expected[k], got[k]) for k in expected)
    Path("runs/halves/checkpoint.pt").unlink()
    return run


def test_an_autoencoder_trains_on_a_folder_and_resumes_exactly(photos):
    train_whole_and_in_halves("vae", folder_configs(photos, validate_every=100)["vae"])


@pytest.mark.slow
def test_the_networks_of_latent_diffusion_train_on_a_folder_and_resume_exactly(photos):
    for name, config in folder_configs(photos).items():
        train_whole_and_in_halves(name, config).export(Path(f"runs/{name}/export"))


def test_samples_depend_on_their_index_alone(photos):
    found = images(photos, crop="random", mirror=0.5)
    together = found.tensor(found.draw(Draws.of_step(5, 3, 4)))
    alone = [found.tensor(found.draw(Draws(5, range(index, index + 1)))) for index in range(12, 16)]
    assert torch.equal(together, torch.cat(alone))
    assert not torch.equal(together, found.tensor(found.draw(Draws.of_step(5, 4, 4))))


def test_reading_ahead_changes_nothing(photos):
    own, ahead = images(photos, crop="random"), images(photos, crop="random", workers=1)
    for step in (0, 1, 2, 7, 8):
        first, second = own.draw(Draws.of_step(5, step, 4)), ahead.draw(Draws.of_step(5, step, 4))
        assert [sample.item for sample in first] == [sample.item for sample in second]
        assert torch.equal(own.tensor(first), ahead.tensor(second))


def test_the_parts_of_a_step_are_read_together(photos, monkeypatch):
    """Else the processes that read ahead would be started again for each part."""
    begun = []
    begin = reading.read_ahead
    monkeypatch.setattr(reading, "read_ahead", lambda *options: begun.append(1) or begin(*options))
    found, whole = images(photos, crop="random"), images(photos, crop="random")
    for step in range(3):
        draws = Draws.of_step(5, step, 4)
        parts = [found.tensor(found.draw(part)) for part in draws.parts(3)]
        assert [len(part) for part in parts] == [1, 1, 2]
        assert torch.equal(torch.cat(parts), whole.tensor(whole.draw(draws)))
    assert len(begun) == 2


def test_captions_are_drawn_among_several_and_dropped(photos):
    for path in photos.glob("*.txt"):
        path.write_text("first\nsecond\nthird\n", encoding="utf-8")
    found = images(photos)
    drawn = [
        caption
        for step in range(200)
        for caption in found.captions(
            found.cached(RUN, 0).draw(Draws.of_step(5, step, 4))[0], Draws.of_step(5, step, 4), drop=0.25
        )
    ]
    counts = [drawn.count(caption) / len(drawn) for caption in ("first", "second", "third", "")]
    assert np.allclose(counts, 0.25, atol=0.06) and sum(counts) == pytest.approx(1)
    assert set(found.describe(found.plain(5, seed=0))) == {"first"}


def test_a_file_that_breaks_later_is_replaced_named_and_limited(photos):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = images(photos, max_broken=1, held_out=0.0)
    victim = photos / "0007.png"
    victim.write_bytes(victim.read_bytes()[:-40])
    with pytest.warns(UserWarning, match="unreadable: 1: 0007.png"):
        shown = [sample.item for step in range(5) for sample in found.draw(Draws.of_step(5, step, 4))]
    assert 7 not in shown and len(shown) == 20 and "0007.png" in found.report()
    (photos / "0009.png").write_bytes(b"")
    with pytest.raises(ValueError, match="2 broken files, data.max_broken permits 1: .*0009"):
        for step in range(5):
            found.draw(Draws.of_step(5, step, 4))


def test_a_folder_of_every_broken_file_is_trained_on_and_all_are_named_at_the_end(photos):
    broken = photos.parent / "broken"
    broken.mkdir()
    expected = write_broken(broken)
    config = folder_configs(broken, steps=12, validate_every=100)["vae"]
    with pytest.warns(UserWarning) as caught:
        train_recipe(write(config, Path("broken.yaml")), progress=False)
    last = [str(each.message) for each in caught if "data.path" in str(each.message)][-1]
    for name, kind in expected.items():
        assert not kind or f"{escaped(name)} (" in last, name
    for kind, count in Counter(kind for kind in expected.values() if kind).items():
        assert f"{kind}: {count}: " in last
    assert Path("runs/vae/export/vae.safetensors").is_file()


def test_held_out_images_are_never_drawn(photos):
    found = images(photos, held_out=0.25)
    held = {sample.item for sample in found.held_out(100)}
    assert len(held) == 5
    assert held.isdisjoint(
        sample.item for step in range(10) for sample in found.draw(Draws.of_step(5, step, 4))
    )


def test_batches_of_buckets_have_one_size(photos):
    write_photos(photos / "wide", 9, width=96, height=40)
    found = images(photos, buckets=Buckets(step=8))
    shapes = {found.tensor(found.draw(Draws.of_step(5, step, 4))).shape for step in range(9)}
    assert len(shapes) == 2 and all(shape[0] == 4 for shape in shapes)
    sizes = found.sizes(found.draw(Draws.of_step(5, 0, 4)))
    assert {size.original for size in sizes} in ({(40, 48)}, {(40, 96)})
