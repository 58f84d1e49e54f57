"""Test the prompts and the figures of composition, on the drawn data set and on known images."""

from __future__ import annotations

import itertools
import json
import string

import composition
import numpy as np
import pytest
import scene_prompts
from scene_judge import SceneJudge
from scene_prompts import ADDED, TASKS, added_prompts, common_names, task_prompts, variety_prompts

from ldm.data import (
    Facts,
    ImageIndex,
    ImageRecord,
    Thing,
    are_held_out,
    held_out_background,
    held_out_colour,
    held_out_count,
    held_out_pair,
)


@pytest.fixture(scope="module")
def letters() -> ImageIndex:
    """Return an index of 500 invented names with plurals, in three styles."""
    names = [
        f"{one}{other}ob"
        for one, other in itertools.product(string.ascii_lowercase[:25], string.ascii_lowercase[:20])
    ]
    return ImageIndex(
        ImageRecord(name=name, style=style) for style in ("noto", "fluent", "flat") for name in names
    )


@pytest.fixture
def three_styles(monkeypatch):
    monkeypatch.setattr(scene_prompts, "STYLES_OF_A_NAME", 3)


HELD_OUT = {
    "single": lambda facts: held_out_background(facts.things[0].name, facts.background),
    "count": lambda facts: facts.count > 1 and held_out_count(facts.things[0].name, facts.count),
    "colour": lambda facts: held_out_colour(facts.things[0].name, facts.things[0].colour),
    "two": lambda facts: facts.relation == "and",
    "position": lambda facts: facts.relation in ("left", "right", "above", "below"),
    "attribution": lambda facts: (
        None not in (colours := {one.colour for one in facts.things}) and len(colours) == 2
    ),
}


@pytest.mark.parametrize("task", TASKS)
def test_prompts_are_held_out_distinct_and_fixed_by_the_seed(letters, three_styles, task):
    prompts = task_prompts(letters, task, 24)
    assert len({str(facts) for facts in prompts}) == 24
    assert all(HELD_OUT[task](facts) and are_held_out(facts) for facts in prompts)
    if task in ("two", "position", "attribution"):
        assert all(held_out_pair(*(one.name for one in facts.things)) for facts in prompts)
    assert (
        task_prompts(letters, task, 10) == prompts[:10] and task_prompts(letters, task, 24, seed=1) != prompts
    )
    with_background = [facts.background is not None for facts in prompts]
    assert all(with_background) if task == "single" else with_background == [False, True] * 12
    if task == "count":
        assert [facts.count for facts in prompts[:6]] == [2, 3, 4, 2, 3, 4]
    if task == "position":
        assert {facts.relation for facts in prompts} == {"left", "right", "above", "below"}
    assert all(one.style is None for facts in prompts for one in facts.things)


def test_added_prompts_name_held_out_images_by_their_style(letters, three_styles):
    rows = [
        ImageRecord(name=row.name, style=row.style, held_out=i % 10 == 3) for i, row in enumerate(letters)
    ]
    index = ImageIndex(rows)
    held_out = {(row.name, row.style) for row in rows if row.held_out}
    alone, composed = (added_prompts(index, task, 24) for task in ADDED)
    for facts in (*alone, *composed):
        assert (facts.things[0].name, facts.things[0].style) in held_out
    assert all(len(facts.things) == facts.count == 1 for facts in alone)
    assert [(facts.relation is None, facts.count > 1) for facts in composed[:3]] == [
        (False, False),
        (False, False),
        (True, True),
    ]
    assert {facts.relation for facts in composed} == {None, "and", "left", "right", "above", "below"}
    assert [facts.background is not None for facts in alone] == [False, True] * 12
    with pytest.raises(ValueError, match="task 'single'"):
        added_prompts(index, "single", 1)
    with pytest.raises(ValueError, match="of 1000 prompts"):
        added_prompts(index, "added", 1000)


def test_common_names_have_training_images_in_enough_styles(drawn, three_styles):
    assert common_names(drawn.index) == [
        name for name in drawn.index.rows_of if name != "ring"
    ]  # one is held out


def test_impossible_prompts_are_refused(drawn, many):
    with pytest.raises(ValueError, match="task 'three'"):
        task_prompts(many, "three", 1)
    with pytest.raises(ValueError, match="single: 0 of 1 prompts"):
        task_prompts(drawn.index, "single", 1)  # no name has five styles
    with pytest.raises(ValueError, match="0 names in 5 styles"):
        variety_prompts(many, 2)


def test_mean_pairwise_rms_is_that_of_every_pair():
    images = np.stack([np.full((4, 4, 3), level, np.uint8) for level in (0, 30, 90)])
    assert composition.mean_pairwise_rms(images) == pytest.approx((30 + 90 + 60) / 3)


def test_degraded_images_differ_as_stated():
    image = np.full((64, 64, 3), 128, np.uint8)
    image[20:40, 20:40] = 20
    rng = np.random.default_rng(0)
    made = {how: composition.degrade(image, how, rng) for how in composition.DEGRADED}
    assert (made["as drawn"] == image).all()
    difference = {how: np.sqrt(np.square(one - image.astype(float)).mean()) for how, one in made.items()}
    assert difference["noisy"] == pytest.approx(6, rel=0.05)
    assert 0 < difference["jpeg"] < 6 and made["blurred"][30, 30, 0] == 20
    assert 20 < made["blurred"][20, 30, 0] < 128


BOX, DISC = Facts(things=(Thing(name="blue-box"),)), Facts(things=(Thing(name="red-disc"),))


def options(*words):
    return composition.parse(["--prompts", "2", *words])


def test_a_task_is_scored_over_prompts_and_seeds(drawn, monkeypatch, tmp_path):
    monkeypatch.setattr(composition, "task_prompts", lambda index, task, n: [BOX, DISC])
    real = composition.real_images(drawn, "as drawn")
    judge = SceneJudge(drawn)
    chosen = options("--seeds", "3", "--shuffled", "--images", str(tmp_path / "images"))
    figures, records = composition.measure_task(real, judge, "single", chosen)
    assert (figures["n"], figures["right"], figures["shuffled"], figures["faults"]) == (6, 100, 0, {})
    assert [(one["prompt"], one["seed"]) for one in records[2:4]] == [("blue box", 2), ("red disc", 0)]
    assert len(list((tmp_path / "images").glob("single-*-right.png"))) == 6

    def always_boxes(facts, seeds):
        return real([BOX] * len(facts), seeds)

    figures, records = composition.measure_task(always_boxes, judge, "single", options("--seeds", "3"))
    assert figures["right"] == 50 and sum(figures["faults"].values()) == 3 and "shuffled" not in figures
    assert composition.task_row("single", figures).startswith("| single | 6 | 50.0 % | 95 % |  | ")
    both = {"single": figures, "two": {"right": 100.0}}
    assert composition.mean_row(both) == "| mean | | 75.0 % | 70 % | | |"


def test_variety_counts_styles_of_right_images(drawn, monkeypatch):
    monkeypatch.setattr(composition, "variety_prompts", lambda index, n: [BOX, DISC])
    judge = SceneJudge(drawn)
    chosen = options("--variety")
    assert chosen.seeds == 8
    figures, _ = composition.measure_variety(composition.real_images(drawn, "as drawn"), judge, chosen)
    assert figures["right"] == 100 and 2 <= figures["styles"] <= 3 and figures["rms"] > 5

    def one_style(facts, seeds):
        return composition.real_images(drawn, "as drawn")([BOX] * len(facts), [0] * len(seeds))

    figures, _ = composition.measure_variety(one_style, judge, chosen)
    assert (figures["right"], figures["styles"], figures["rms"]) == (
        50,
        0.5,
        0,
    )  # the disc's images are boxes
    assert "| right | 50.0 % | 90 % |" in composition.variety_table(figures)


def test_the_command_writes_its_figures(drawn, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(composition.EmojiData, "open", lambda folder: drawn)
    monkeypatch.setattr(composition, "task_prompts", lambda index, task, n: [BOX, DISC])
    path = tmp_path / "figures.json"
    composition.main(
        ["--real", "noisy", "--prompts", "2", "--seeds", "1", "--tasks", "single", "--json", str(path)]
    )
    assert "| single | 2 | 100.0 % |" in capsys.readouterr().out
    report = json.loads(path.read_text(encoding="utf-8"))
    assert report["figures"]["single"]["right"] == 100 and len(report["images"]) == 2
    assert report["settings"]["real"] == "noisy"


@pytest.mark.parametrize(
    "words",
    [
        ["--prompts", "1"],
        ["--variety", "--shuffled"],
        ["--added", "--real"],
        ["--json", "absent/x.json"],
        ["--batch", "0"],
    ],
)
def test_impossible_options_are_refused(words, capsys):
    with pytest.raises(SystemExit):
        composition.parse(words)
    assert "error" in capsys.readouterr().err
