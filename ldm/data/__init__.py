"""Captioned images for training: the emoji data set, and compositions of its images drawn on the fly."""

from ldm.data.captions import caption, vocabulary
from ldm.data.compose import Composition, render, render_batch
from ldm.data.index import EmojiData, ImageIndex, ImageRecord, held_out_image, held_out_pair
from ldm.data.mix import Mix, sample_composition
from ldm.data.palette import PALETTE

__all__ = [
    "PALETTE",
    "Composition",
    "EmojiData",
    "ImageIndex",
    "ImageRecord",
    "Mix",
    "caption",
    "held_out_image",
    "held_out_pair",
    "render",
    "render_batch",
    "sample_composition",
    "vocabulary",
]
