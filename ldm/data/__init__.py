"""Captioned-image data: the emoji data set, and compositions of its pictures drawn on the fly."""

from ldm.data.captions import caption, vocabulary
from ldm.data.compose import Composition, render, render_batch
from ldm.data.index import EmojiData, ImageRecord, PictureIndex, held_out_pair, held_out_picture
from ldm.data.mix import Mix, sample_composition
from ldm.data.palette import PALETTE

__all__ = [
    "PALETTE",
    "Composition",
    "EmojiData",
    "Mix",
    "ImageRecord",
    "PictureIndex",
    "caption",
    "held_out_pair",
    "held_out_picture",
    "render",
    "render_batch",
    "sample_composition",
    "vocabulary",
]
