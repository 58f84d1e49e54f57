"""`Cond`: joining, expanding and indexing batches of conditions."""

import pytest
import torch

from ldm.diffusion.cond import Cond


def test_cat_pads_contexts_and_masks_the_padding() -> None:
    joined = Cond.cat([Cond(context=torch.ones(2, 3, 4)), Cond(context=torch.ones(1, 5, 4))])
    assert joined.context is not None and joined.context_mask is not None
    assert joined.context.shape == (3, 5, 4) and joined.context_mask.tolist() == [
        [True] * 3 + [False] * 2
    ] * 2 + [[True] * 5]
    assert float(joined.context[:2, 3:].abs().sum()) == 0


def test_cat_needs_no_mask_for_equal_lengths() -> None:
    assert Cond.cat([Cond(context=torch.ones(1, 3, 4))] * 2).context_mask is None
    mask = torch.tensor([[True, False, True]])
    joined = Cond.cat(
        [Cond(context=torch.ones(1, 3, 4), context_mask=mask), Cond(context=torch.ones(1, 3, 4))]
    )
    assert joined.context_mask is not None and joined.context_mask.tolist() == [
        [True, False, True],
        [True] * 3,
    ]


def test_a_context_is_padded_to_a_multiple_and_the_padding_masked() -> None:
    for length, mask in ((3, None), (8, None), (9, torch.arange(9)[None].expand(2, 9) < 4)):
        cond = Cond(context=torch.ones(2, length, 4), context_mask=mask, pooled=torch.ones(2, 1)).padded(8)
        assert cond.context is not None and cond.context_mask is not None and cond.pooled is not None
        assert cond.context.shape == (2, 8 if length < 9 else 16, 4)
        assert cond.context_mask.sum(1).tolist() == [length if mask is None else 4] * 2
        assert float(cond.context.sum()) == 2 * length * 4


def test_batch_operations() -> None:
    cond = Cond(context=torch.arange(6.0).reshape(2, 3, 1), pooled=torch.arange(2.0)[:, None])
    assert cond.batch == 2 and Cond().batch is None and Cond().expand(5).batch is None
    assert cond[1:].pooled.tolist() == [[1.0]] and cond[[1, 0]].pooled.tolist() == [[1.0], [0.0]]
    assert cond.repeat(2).pooled.tolist() == [[0.0], [0.0], [1.0], [1.0]]
    assert cond[:1].expand(4).context.shape == (4, 3, 1)


def test_wrong_input() -> None:
    with pytest.raises(ValueError, match="same batch size"):
        Cond(context=torch.ones(2, 3, 4), pooled=torch.ones(1, 2))
    with pytest.raises(ValueError, match="context_mask"):
        Cond(context=torch.ones(2, 3, 4), context_mask=torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="cannot join"):
        Cond.cat([Cond(), Cond(pooled=torch.ones(1, 2))])
    with pytest.raises(TypeError, match="slice"):
        Cond(pooled=torch.ones(2, 1))[0]  # type: ignore[index]
