"""Rules for Kandinsky 2.1's text encoder: Hugging Face's XLM-R with a projection, and our names."""

from __future__ import annotations

from ldm.weights.keymap import Rule, Section, Table, rename

LAYER = (
    ("query", "attention.self.query"),
    ("key", "attention.self.key"),
    ("value", "attention.self.value"),
    ("out", "attention.output.dense"),
    ("norm1", "attention.output.LayerNorm"),
    ("fc1", "intermediate.dense"),
    ("fc2", "output.dense"),
    ("norm2", "output.LayerNorm"),
)
EMBEDDINGS = "transformer.embeddings"
XLMR_TABLE = Table(
    (
        Section(
            "",
            "",
            (
                *rename(
                    *(
                        (f"layers.{{i}}.{ours}", f"transformer.encoder.layer.{{i}}.{theirs}")
                        for ours, theirs in LAYER
                    )
                ),
                *rename(
                    ("tokens", f"{EMBEDDINGS}.word_embeddings"),
                    ("positions", f"{EMBEDDINGS}.position_embeddings"),
                    ("norm", f"{EMBEDDINGS}.LayerNorm"),
                    ("projection", "LinearTransformation"),
                ),
                Rule(("kind",), (f"{EMBEDDINGS}.token_type_embeddings.weight",)),
            ),
        ),
    ),
    ("*position_ids", "*token_type_ids", "transformer.pooler.*"),  # the pooler is not used
)
