"""Captioned images for training: the emoji data set, and scenes of its images drawn on the fly.

Facts are what a prompt states (`Facts`). A scene adds what it leaves open (`Scene`). A caption states facts
in words (`caption`).
"""

from ldm.data.captions import caption, vocabulary
from ldm.data.facts import STYLES, Facts, Thing
from ldm.data.held_out import (
    are_held_out,
    held_out_background,
    held_out_colour,
    held_out_count,
    held_out_image,
    held_out_pair,
)
from ldm.data.index import EmojiData, ImageIndex, ImageRecord
from ldm.data.layout import Placement, Scene, draw_layout, plain_scene, side_by_side
from ldm.data.mix import Mix, sample_facts, sample_scene
from ldm.data.noun_senses import noun_table
from ldm.data.palette import PALETTE, THING_COLOURS
from ldm.data.recolouring import recolour
from ldm.data.rendering import render, render_batch

__all__ = [
    "PALETTE",
    "STYLES",
    "THING_COLOURS",
    "EmojiData",
    "Facts",
    "ImageIndex",
    "ImageRecord",
    "Mix",
    "Placement",
    "Scene",
    "Thing",
    "are_held_out",
    "caption",
    "draw_layout",
    "held_out_background",
    "held_out_colour",
    "held_out_count",
    "held_out_image",
    "held_out_pair",
    "noun_table",
    "plain_scene",
    "recolour",
    "render",
    "render_batch",
    "sample_facts",
    "sample_scene",
    "side_by_side",
    "vocabulary",
]
