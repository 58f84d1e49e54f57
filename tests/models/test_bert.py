"""The text encoder of LDM's text2img models and its tokenizer: parity with the peers, and errors."""

from __future__ import annotations

import pytest
import torch
from shared_weights import TOLERANCE, VISIBLE, error, rotate_qkv, twins

from ldm.conditioning.bert import BertConditioner
from ldm.models.text.bert import BertConfig, LDMBert
from ldm.models.text.wordpiece import WordPiece

LETTERS = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
WORDS = [
    "a",
    "painting",
    "of",
    "the",
    "cat",
    "caf",
    "##s",
    "##ing",
    "paint",
    "un",
    "##aff",
    "##able",
    "##e",
    "don",
    "日",
    "本",
    "straße",
    "i",
    "é",
    "##ο",
    "σ",
]
VOCABULARY = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys([*LETTERS, *WORDS])]
TEXTS = [
    "a painting of the cat",
    "A PAINTING of the Cats!",
    "unaffable",
    "café, Café; cafe\u0301",
    "don't",
    "zzz",
    "unzz",
    "",
    "   \t\n ",
    "日本 cat日",
    "$5+5=^10^ `x` <a>",
    "of\u00a0the\u200bcat\x00\ufffd",
    "straße",
    "İi",
    "a" * 101,
    "a" * 100,
    "—–…“the”",
    "Οσ",
    "\u3000of",
    "the\rcat",
    "ﬁ",
]


@pytest.fixture
def tokenizer(tmp_path):
    (tmp_path / "vocab.txt").write_text("".join(f"{token}\n" for token in VOCABULARY), encoding="utf-8")
    return WordPiece.from_file(tmp_path / "vocab.txt")


def test_words_become_the_longest_pieces(tokenizer):
    assert tokenizer.pieces("painting") == ["painting"] and tokenizer.pieces("paints") == ["paint", "##s"]
    assert tokenizer.pieces("unaffable") == ["un", "##aff", "##able"] and tokenizer.pieces("unzz") == [
        "[UNK]"
    ]


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_the_peers(text, tokenizer, tmp_path):
    peer = pytest.importorskip("transformers").BertTokenizerFast(
        str(tmp_path / "vocab.txt"), do_lower_case=True
    )
    assert len(peer) == len(VOCABULARY)
    length = 110
    assert tokenizer([text], length) == peer([text], padding="max_length", max_length=length)["input_ids"]


def test_prompts_are_never_cut(tokenizer):
    assert tokenizer(["the cat"], 4) == [
        [VOCABULARY.index(token) for token in ("[CLS]", "the", "cat", "[SEP]")]
    ]
    with pytest.raises(ValueError, match="has 5 tokens with start and end, expected at most 4"):
        tokenizer(["of the cat"], 4)


def test_files_without_a_vocabulary_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="vocab"):
        WordPiece.from_file(tmp_path / "vocab.txt")
    (tmp_path / "vocab.txt").write_text("a\nb\n[PAD]\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"vocab\.txt.*lacks \[UNK\], \[CLS\], \[SEP\]"):
        WordPiece.from_file(tmp_path / "vocab.txt")


def test_a_small_encoder_equals_the_peers():
    module = pytest.importorskip("diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion")
    sizes = {
        "vocab_size": 50,
        "max_position_embeddings": 11,
        "d_model": 32,
        "encoder_ffn_dim": 128,
        "head_dim": 8,
        "encoder_attention_heads": 3,
    }

    def peer() -> torch.nn.Module:
        network = module.LDMBertModel(module.LDMBertConfig(encoder_layers=3, **sizes))
        del network.to_logits  # unused
        return network

    config = BertConfig(vocabulary=50, width=32, layers=3, heads=3, head_dim=8, length=11)
    ids = torch.randint(0, 50, (2, 11), generator=torch.Generator().manual_seed(1))
    with twins(peer, lambda: LDMBert(config)) as (theirs, ours):
        expected = theirs.model(ids, position_ids=torch.arange(11)[None])[0]
        assert error(ours(ids), expected) < TOLERANCE
        assert error(ours(ids.flip(1)), expected.flip(1)) > VISIBLE  # positions matter
        rotate_qkv(ours, "model.layers.1.self_attn")
        assert error(ours(ids), expected) > VISIBLE


@torch.no_grad()
def test_prompts_become_conditions(tokenizer):
    config = BertConfig(vocabulary=len(VOCABULARY), width=16, layers=1, heads=2, head_dim=4, length=9)
    conditioner = BertConditioner(LDMBert(config), tokenizer)
    cond = conditioner(["the cat", ""])
    assert cond.context.shape == (2, 9, 16) and cond.context_mask is None and cond.pooled is None
    assert torch.allclose(
        cond.context[1:], conditioner([""]).context, atol=1e-6
    )  # independent of the other prompts
    assert conditioner(["the cat " * 4]).context.shape == (1, 18, 16)  # in windows, without truncation
    with pytest.raises(ValueError, match="expected at most 9"):
        conditioner.encoder(torch.zeros(1, 10, dtype=torch.long))
    with pytest.raises(ValueError, match="the encoder 5"):
        BertConditioner(LDMBert(BertConfig(vocabulary=5, width=16, layers=1)), tokenizer)
