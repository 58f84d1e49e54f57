"""Test the embedded models: size, notices, offline use, seeds, and what the images show."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import ldm
from ldm.catalog.lookup import ASSETS
from ldm.images.files import read_recipe
from ldm.models.clip.towers import VisionConfig, VisionTower
from ldm.pipelines.checks import UnknownWords
from ldm.support.device import fast_dtype
from ldm.weights.formats.ldm_folder import read_part


@pytest.fixture(scope="module")
def pipe():
    return ldm.load("emoji-ldm", device="cpu", dtype="float32")


def run(pipe, prompt="red apple on a blue background", **options):
    return pipe.text_to_image(prompt, progress=False, steps=8, **options)


@pytest.mark.parametrize(
    ("folders", "limit"),
    [(["emoji-ldm", "emoji-clip"], 56e6), (["emoji-unclip"], 48e6), (["emoji-dalle"], 8e6)],
)
def test_a_model_is_small_and_contains_its_notices(folders, limit):
    files = [path for folder in folders for path in (ASSETS / folder).rglob("*") if path.is_file()]
    assert 1e6 < sum(path.stat().st_size for path in files) <= limit
    notice = (ASSETS / folders[0] / "NOTICE.md").read_text(encoding="utf-8")
    assert all(licence in notice for licence in ("Apache-2.0", "MIT", "CC-BY 4.0"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_image_i_of_a_batch_is_that_of_its_seed_within_two_levels(dtype):
    pipe = ldm.load("emoji-ldm", device="cpu", dtype=dtype)
    # without bfloat16 instructions a convolution takes a hundred times as long: a quarter of the pixels then
    side = 128 if dtype in ("float32", str(fast_dtype("cpu")).removeprefix("torch.")) else 64
    batch = run(pipe, n=4, seed=11, height=side, width=side).numpy().astype(int)
    for i in range(4):
        alone = run(pipe, seed=11 + i, height=side, width=side).numpy().astype(int)
        # the noise is bit-identical, but matrix products of another batch size round differently
        assert abs(batch[i] - alone[0]).max() <= 2


def test_an_image_has_its_background_and_no_warning(pipe, recwarn):
    made = run(pipe)
    assert made.tensor.shape == (1, 3, 128, 128) and not [w for w in recwarn if w.category is UnknownWords]
    corners = made.tensor[0, :, [0, 0, -1, -1], [0, -1, 0, -1]].median(dim=1).values * 255
    blue = torch.tensor([50.0, 100.0, 210.0])
    assert (corners - blue).norm() < 60  # the nearest other colour of the palette is at a distance of 140
    with pytest.warns(UnknownWords, match="'zeppelin'"):
        drawn = run(pipe, "a zeppelin over a cat")
    assert drawn.tensor.std() > 0.05  # the cat


def test_two_evaluations_draw_what_ten_do():
    turbo = ldm.load("emoji-ldm-turbo", device="cpu", dtype="float32")
    assert turbo.card.defaults.steps == 2
    for prompt in ("three red apples", "a blue cat face to the left of a rocket"):
        wanted, other = (
            turbo.text_to_image(prompt, seed=seed, steps=10, progress=False).tensor for seed in (3, 4)
        )
        for options in ({}, {"steps": 4}, {"steps": 1}):
            few = turbo.text_to_image(prompt, seed=3, progress=False, **options).tensor
            near, far = (255 * (few - image).square().mean().sqrt() for image in (wanted, other))
            assert near < 5 and far > 50  # RMS in levels: 1 to 3, and about 70


def test_one_evaluation_lays_out_what_six_do(pipe):
    turbo = ldm.load("emoji-ldm-turbo", device="cpu", dtype="float32")
    assert (pipe.text.layout_steps, turbo.text.layout_steps) == (6, 1)
    assert len(turbo.exemplars) == len(pipe.exemplars)
    prompts = ("three red apples", "a blue cat face to the left of a rocket", "four cars", "fluent rocket")
    with torch.no_grad():
        for prompt in prompts:
            one, six = (each.text.layouts([each.text.read(prompt)] * 8, range(8)) for each in (turbo, pipe))
            shown = six.owner >= 0
            assert torch.equal(one.owner, six.owner)
            # of centres and sides, as fractions of the canvas: 0.003 to 0.02 in the mean
            assert (one.places - six.places)[shown][:, :3].abs().mean() < 0.03


@pytest.fixture(scope="module")
def tokens():
    return ldm.load("emoji-dalle", device="cpu", dtype="float32")


def test_a_decoder_of_tokens_draws_what_it_is_shown(tokens, recwarn):
    assert len(tokens.exemplars) == 8025 and tokens.card.usual().guidance == 1
    for prompt in ("three red apples", "a noto rocket"):
        images = tokens.text_to_image(prompt, n=2, seed=3, progress=False).tensor
        canvas = tokens.text([prompt] * 2, (16, 16), seeds=[3, 4]).exemplars.sum(1)  # (2, 4, 128, 128)
        assert (images - canvas[:, :3] - 1 + canvas[:, 3:]).square().mean().sqrt() < 0.15
    blue = tokens.text_to_image("red apple on a blue background", n=2, progress=False).tensor
    corners = blue[:, :, [0, 0, -1, -1], [0, -1, 0, -1]].median(dim=2).values * 255
    assert ((corners - torch.tensor([50.0, 100.0, 210.0])).norm(dim=1) < 60).all()
    assert not [each for each in recwarn if each.category is UnknownWords]


def test_tokens_belong_to_their_seed(tokens):
    batch = tokens.text_to_image("a blue cat face and a rocket", n=3, seed=11, progress=False).tensor
    for i in range(3):
        alone = tokens.text_to_image("a blue cat face and a rocket", n=1, seed=11 + i, progress=False).tensor
        assert (alone[0] - batch[i]).abs().mean() < 1e-3


def test_a_decoder_of_tokens_completes_an_image(tokens):
    image = tokens.text_to_image("a noto red apple", n=1, seed=5, progress=False).tensor
    mask = torch.zeros(1, 1, 128, 128)
    mask[..., 64:, :] = 1
    own = tokens.text_to_image("a noto red apple", n=1, seed=9, progress=False).tensor
    made = tokens.inpaint("a noto red apple", image, mask, n=1, seed=9, progress=False).tensor
    below = [(each - image)[..., 64:, :].square().mean().sqrt() for each in (made, own)]
    assert below[0] < below[1]  # the layout is that of the image, not of the seed


def test_words_of_the_data_set_are_known(pipe):
    for prompt in (
        "a kitty",
        "fluent rocket",
        "twemoji cat face on an orange background",
        "a small red apple at the top",
        "three blue cars on a black background",
        "a green guitar below a flat house",
    ):
        assert pipe.text.unknown(prompt) == []


def test_latents_have_unit_variance(pipe):
    # plain colours are much simpler than the training data: only the order of magnitude is checked
    x = torch.rand(4, 3, 1, 1).expand(4, 3, 128, 128)
    assert 0.2 < float(pipe.encode(x).std()) < 3


def test_the_image_tower_loads():
    tower, _ = read_part(ASSETS / "emoji-clip", "vision", VisionConfig, VisionTower)
    assert tower(tower.prepare(torch.rand(2, 3, 128, 128))).pooled.shape == (2, 256)


@pytest.mark.parametrize(
    ("options", "side", "name"),
    [
        (["--steps", "4"], 128, "x.png"),
        (["--steps", "4", "--model", "emoji-unclip"], 512, "four.png"),
        (["--model", "emoji-dalle"], 256, "four.png"),
    ],
)
def test_the_first_command_works_without_a_network(tmp_path, options, side, name):
    code = (
        "import socket, sys\n"
        "def refuse(*_, **__): raise OSError('no network in this test')\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse\n"
        "from ldm.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "red apple", "-o", str(tmp_path / name), *options]
    environment = {**os.environ, "PYTHONPATH": str(Path(ldm.__file__).parents[1])}
    done = subprocess.run(
        command, capture_output=True, encoding="utf-8", env=environment, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / name) and done.stderr == ""
    assert read_recipe(tmp_path / name)["prompt"] == "red apple"
    with Image.open(tmp_path / name) as image:
        assert image.width == image.height == side  # one image of 128×128, or a grid of four


def test_embeddings_of_the_prior_match_their_texts_and_images():
    model = ldm.load("emoji-unclip", device="cpu", dtype="float32")
    prompts = ["red apple", "cat face", "rocket", "sunflower on a blue background"]
    with torch.no_grad():
        made, texts = (
            model.imagine(prompts, progress=False).unit().vector,
            model.clip.text_embedding(prompts).unit().vector,
        )
    assert (made @ texts.T).argmax(1).tolist() == [0, 1, 2, 3]
    images = model.text_to_image(prompts, n=1, upsample=False, progress=False)
    seen = model.clip.image_embedding(images.tensor).unit().vector
    assert (seen @ made.T).argmax(1).tolist() == [0, 1, 2, 3]
    corner = images.tensor[3, :, :6, :6].mean((1, 2)) * 255
    assert (corner - torch.tensor([50.0, 100.0, 210.0])).norm() < 60


def test_tracing_does_not_change_the_image_and_maps_are_probabilities(pipe):
    plain = run(pipe)
    with ldm.trace(pipe) as t:
        assert torch.equal(run(pipe).tensor, plain.tensor)
    assert t.levels() == [(8, 8)] and t.words() == ["red apple", "on", "a", "blue", "background"]
    assert all((p.sum(-1) - 1).abs().max() < 1e-6 for step in t.steps for p in step.attention.values())


PAIRS = (("rocket", "pizza"), ("dog face", "banana"), ("cactus", "star"))


def test_what_a_prompt_leaves_open_varies_and_what_it_states_holds(pipe):
    shown = pipe.text(["three red apples"], (16, 16), seeds=range(8)).exemplars[:, 0]  # (B, 4, H, W)
    assert len({tuple(one.flatten()[::97].tolist()) for one in shown}) == 8
    across = torch.linspace(0, 1, 128)
    for a, b in PAIRS:
        for text, axis in ((f"a {a} to the left of a {b}", 1), (f"a {a} above a {b}", 0)):
            opacity = pipe.text([text], (16, 16), seeds=range(8)).exemplars[:, :, 3]  # (B, 2, H, W)
            mass = opacity.sum(dim=(3, 2)[axis])  # along the axis of the relation, (B, 2, 128)
            first, second = ((mass * across).sum(-1) / mass.sum(-1)).unbind(1)
            assert (first < second).all(), text


def test_an_image_of_ones_own_is_drawn_without_training(pipe):
    own = torch.zeros(4, 128, 128)
    own[:, 20:108, 20:108] = torch.tensor([0.1, 0.6, 0.3, 1.0])[:, None, None]
    own[:3, 48:80, 48:80] = torch.tensor([0.9, 0.2, 0.5])[:, None, None]
    pipe.exemplars.add("my sign", own)
    made = run(pipe, "my sign", seed=3).tensor
    shown = pipe.text(["my sign"], (16, 16), seeds=[3]).exemplars[0, 0]
    wanted = shown[:3] + 1 - shown[3:]
    pipe.exemplars.remove("my sign")
    assert (made[0] - wanted).square().mean().sqrt() < 0.08
    with pytest.warns(UnknownWords, match="'my'"):
        assert (run(pipe, "my sign", seed=3).tensor - made).abs().mean() > 0.05


def test_attention_lies_where_the_word_is_drawn(pipe):
    """The grounding loss of the training places the maps of two things where they are."""
    for a, b in PAIRS:
        with ldm.trace(pipe) as t:
            run(pipe, f"a {a} to the left of a {b}", seed=1)
        for slot, word in enumerate((a, b)):
            seen = t.attention(word)[0]
            text = pipe.text([f"a {a} to the left of a {b}"], (16, 16), seeds=[1])
            area = torch.nn.functional.avg_pool2d(text.exemplars[:, slot, 3], 8)[0] > 0.1
            assert seen[area].sum() > 0.6 * seen.sum(), word
    with ldm.trace(pipe) as t:
        run(pipe)
    thing, background = (t.attention(word)[0] for word in ("apple", "background"))
    middle, edge = (slice(5, 11), slice(5, 11)), [0, -1]
    assert (
        thing[middle].mean() > 1.5 * thing[edge][:, edge].mean()
        and background[edge][:, edge].mean() > 1.5 * background[middle].mean()
    )
