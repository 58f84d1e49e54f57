"""Latents of files: kept under file, frame and network, computed once, divided among processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from killing import CODE, ROOT, in_fresh_process, kill_at_random
from photos import drawn_photo, write_photos

from ldm.conditioning.conditioner import TextConditioner
from ldm.conditioning.prompt import escape_prompt
from ldm.data.framing import Buckets
from ldm.data.sources.config import FolderData
from ldm.models.clip.towers import TextConfig, TextTower
from ldm.models.text.bpe import Tokenizer
from ldm.models.vae import AutoencoderKL, VAEConfig
from ldm.training.caches import store as stores
from ldm.training.caches.latents import LatentSpace
from ldm.training.caches.rows import CACHES
from ldm.training.caches.store import TensorStore
from ldm.training.caches.texts import CachedTexts
from ldm.training.config import OptimizerConfig, RunConfig
from ldm.training.draws import Draws
from ldm.training.inputs import cached_files, file_set
from ldm.training.inputs.files import FileImages
from ldm.weights.formats.ldm_folder import EMOJI_TEXT, write_part
from ldm.weights.formats.safetensors import read_safetensors, write_safetensors

RUN = RunConfig(name="any", steps=1, batch=4, optimizer=OptimizerConfig(lr=1e-3))


def means(images: FileImages, log: list[int]):
    """Return a function that maps images to their mean colour as (3,), and notes which it has seen."""

    def compute(samples) -> torch.Tensor:
        log.extend(sample.item for sample in samples)
        return images.tensor(samples).mean((2, 3))

    return compute


def open_images(folder: Path, **options) -> FileImages:
    return FileImages(
        FolderData(kind="folder", path=str(folder), **{"size": 32, "held_out": 0, **options}), RUN
    )


def cache(folder: Path, key: str = "first", **options) -> tuple[np.ndarray, list[int]]:
    """Return the mean colours of all images and the numbers of those that were computed."""
    images, log = open_images(folder, **options), []
    rows = images.cached(RUN, 0).cached("means", key, (3,), means(images, log))
    return rows[:], log


@pytest.fixture
def photos(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_photos(tmp_path / "photos", 20)


def test_each_image_is_computed_once_and_again_if_it_or_the_network_changes(photos):
    first, log = cache(photos)
    assert sorted(log) == list(range(20)) and first.shape == (20, 3) and first.dtype == np.float16
    again, log = cache(photos)
    assert log == [] and (again == first).all()
    drawn_photo(7)[0].save(photos / "0003.png")
    drawn_photo(8)[0].save(photos / "0020.png")
    changed, log = cache(photos)
    assert (
        sorted(log) == [3, 20] and (np.delete(changed, [3, 20], axis=0) == np.delete(first, 3, axis=0)).all()
    )
    assert np.allclose(changed[3], first[7], atol=1e-3)
    for options in ({"key": "second"}, {"size": 40}, {"background": (0, 0, 0)}):
        assert len(cache(photos, **options)[1]) == 21
    assert cache(photos)[1] == []


def test_rows_are_those_of_the_files_and_batches_have_one_size(photos):
    write_photos(photos / "wide", 9, width=96, height=40)
    images = open_images(photos, buckets=Buckets(step=8), crop="random", mirror=0.5)
    cached = images.cached(RUN, 0)
    rows = cached.cached("pixels", "key", (3,), lambda samples: images.tensor(samples))
    for step in range(9):
        samples, numbers = cached.draw(Draws.of_step(0, step, 4))
        assert (torch.from_numpy(rows[numbers]) - images.tensor(samples)).abs().max() < 1e-3


def test_broken_files_are_left_out_of_batches(photos):
    (photos / "0005.png").write_bytes((photos / "0005.png").read_bytes()[:-40])
    images = open_images(photos)
    cached = images.cached(RUN, 0)
    with pytest.warns(UserWarning, match="0005.png"):
        rows = cached.cached("means", "key", (3,), means(images, []))
    drawn = [number for step in range(5) for number in cached.draw(Draws.of_step(0, step, 4))[1]]
    assert 5 not in drawn and set(drawn) == set(range(20)) - {5}
    assert rows[:].shape == (19, 3) and len(rows) == 20
    with pytest.warns(UserWarning, match="0005.png"):  # it is named by each run, and not decoded again
        later, log = open_images(photos), []
        later.cached(RUN, 0).cached("means", "key", (3,), means(later, log))
    assert log == []


def test_processes_divide_the_images_and_write_files_of_their_own(photos, monkeypatch):
    seen = []
    monkeypatch.setattr(file_set.FileSet, "note", lambda files, problems: None)  # of the absent
    for rank in range(3):
        monkeypatch.setattr(cached_files, "own_share", lambda work, rank=rank: list(work[rank::3]))
        images, log = open_images(photos), []
        images.cached(RUN, 0).cached("means", "key", (3,), means(images, log))
        seen.append(log)
    assert sorted(sum(seen, [])) == list(range(20)) and [len(log) for log in seen] == [7, 7, 6]
    assert len(list(CACHES.glob("means-*/*.safetensors"))) == 3
    monkeypatch.undo()
    monkeypatch.chdir(photos.parent)
    images, log = open_images(photos), []
    rows = images.cached(RUN, 0).cached("means", "key", (3,), means(images, log))
    assert log == [] and rows[:].shape == (20, 3)


def test_a_flipped_byte_is_noticed_and_the_file_is_made_again(photos):
    first, _ = cache(photos)
    (path,) = CACHES.glob("means-*/*.safetensors")
    content = path.read_bytes()
    for at in (-1, -40):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[len(content) + at + 1 :])
        with pytest.raises(
            ValueError, match=r"means-.*safetensors' is damaged .*delete it, and it is computed"
        ):
            cache(photos)
    path.unlink()
    again, log = cache(photos)
    assert len(log) == 20 and (again == first).all()


def test_files_without_hashes_are_made_again(photos):
    first, _ = cache(photos)
    (path,) = CACHES.glob("means-*/*.safetensors")
    write_safetensors(path, {name: value + 1 for name, value in read_safetensors(path).items()})
    with pytest.warns(UserWarning, match="has no hashes of its tensors, which are computed again: delete it"):
        again, log = cache(photos)
    assert len(log) == 20 and (again == first).all() and (cache(photos)[0] == first).all()


def kill_while_caching(folder: str, kills: int) -> list[int]:
    """Kill processes that fill a cache, which write a file after each image.

    Returns:
        How many images were computed though the store had them, how many there are, how many were computed.
    """
    stores.WRITE_SECONDS, cached_files.MOST_AT_ONCE = 0.0, 1
    log = Path("computed.txt")
    log.write_text("", encoding="utf-8")

    def fill() -> None:
        images = open_images(Path(folder))
        cached = images.cached(RUN, 0)
        places = list(CACHES.glob("means-*"))
        known = TensorStore(places[0]) if places else set()

        def compute(samples) -> torch.Tensor:
            item = samples[0].item
            with log.open("a", encoding="utf-8") as file:
                file.write(f"{item} {int(cached.key(cached.row_of[item]) in known)}\n")
            return images.tensor(samples).mean((2, 3))

        cached.cached("means", "key", (3,), compute)

    kill_at_random(fill, kills, 0.3)
    fill()
    rows = [list(map(int, line.split())) for line in log.read_text(encoding="utf-8").splitlines()]
    return [sum(known for _, known in rows), len({item for item, _ in rows}), len(rows)]


@pytest.mark.slow
def test_a_computation_that_is_killed_goes_on_where_it_was(photos):
    write_photos(photos, 40)
    found = in_fresh_process(Path(__file__), "kill_while_caching", str(photos), 3, cwd=Path.cwd())
    known, images, computed = found
    assert known == 0  # nothing that was written is computed again
    assert images == 40 and computed <= 40 + 3  # a kill loses at most the image that was computed


def encode_with_sd(folder: str, sleep: float) -> int:
    """Encode a folder with the autoencoder of Stable Diffusion; return the number of images encoded."""
    stores.WRITE_SECONDS = sleep
    images = open_images(Path(folder), size=512)
    counted = 0
    encode = AutoencoderKL.encode

    def count(self, x):
        nonlocal counted
        counted += len(x)
        return encode(self, x)

    AutoencoderKL.encode = count
    with torch.no_grad():
        LatentSpace.open("vae", images.cached(RUN, 0), torch.device("cpu"))
    return counted


@pytest.mark.slow
def test_the_latents_of_stable_diffusion_at_512(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_photos(tmp_path / "photos", 4, width=640, height=512)
    torch.manual_seed(0)
    config = VAEConfig()
    write_part(Path("vae"), "vae", AutoencoderKL(config), config, latent_scale=0.18215)
    here, arguments = Path(__file__), (str(tmp_path / "photos"), 0.0)
    with subprocess.Popen(
        [sys.executable, "-c", CODE, here.stem, "encode_with_sd", json.dumps(arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(here.parent), *sys.path])},
        cwd=tmp_path,
    ) as process:
        while len(list(CACHES.glob("latents-*/*.safetensors"))) < 1:
            assert process.poll() is None
            time.sleep(0.1)
        process.kill()
    (folder,) = CACHES.glob("latents-*")
    kept = len(TensorStore(folder))
    assert 1 <= kept < 4
    assert in_fresh_process(here, "encode_with_sd", *arguments, cwd=tmp_path) == 4 - kept
    assert in_fresh_process(here, "encode_with_sd", *arguments, cwd=tmp_path) == 0
    write_part(Path("vae"), "vae", AutoencoderKL(config), config, latent_scale=0.18215)  # another one
    for i in range(1, 4):
        (tmp_path / "photos" / f"{i:04d}.png").unlink()
    assert in_fresh_process(here, "encode_with_sd", *arguments, cwd=tmp_path) == 1


def test_cached_states_of_captions_are_those_of_the_tower(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    shape = {"width": 16, "layers": 1, "heads": 2, "activation": "gelu", "embed_dim": 8}
    tokenizer = Tokenizer(vocabulary=Tokenizer().encode("a red disc on top of everything ( : 1.2 )"))
    special = {"vocab_size": len(tokenizer), "bos_id": tokenizer.bos_id, "eot_id": tokenizer.eot_id}
    text = TextConditioner(TextTower(TextConfig(**shape, **special)), tokenizer, EMOJI_TEXT).eval()
    captions = ["a red disc", "a disc on top of everything", "(red:1.2)"]
    states = CachedTexts(text, "key", captions)
    for batch in (captions, ["", "a red disc"], ["a red disc"]):
        expected, found = text([escape_prompt(caption) for caption in batch]), states(batch)
        mask = expected.context_mask
        if mask is None or bool(mask.all()):
            assert found.context_mask is None
            used = slice(None)
        else:
            assert torch.equal(mask, found.context_mask)
            used = mask
        assert torch.allclose(found.context[used], expected.context[used], atol=4e-3)
        assert torch.allclose(found.pooled, expected.pooled, atol=4e-3)
    monkeypatch.setattr(TextConditioner, "forward", None)  # nothing is computed again
    assert torch.equal(CachedTexts(text, "key", captions)(captions).context, states(captions).context)
