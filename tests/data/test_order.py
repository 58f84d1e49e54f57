"""The order of training: every image once per pass, one bucket per batch, any index without those before."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from ldm.data.order import Order


def items(order: Order, start: int, stop: int) -> list[int]:
    return [order.item(index)[1] for index in range(start, stop)]


@pytest.mark.parametrize(("count", "batch"), [(7, 3), (12, 4), (1, 5), (200, 16)])
def test_each_image_is_shown_once_before_any_is_shown_again(count, batch):
    order = Order([np.arange(100, 100 + count)], batch, seed=3)
    passes = [items(order, number * count, (number + 1) * count) for number in range(4)]
    assert all(sorted(each) == list(range(100, 100 + count)) for each in passes)
    assert count < 7 or len({tuple(each) for each in passes}) == 4


def test_a_batch_has_one_bucket_and_every_bucket_has_its_share():
    sizes, batch = (5, 12, 0, 30), 4
    starts = np.cumsum([0, *sizes])
    order = Order([np.arange(a, b) for a, b in zip(starts, starts[1:], strict=False)], batch, seed=0)
    per_cycle = sum(-(-size // batch) for size in sizes)
    buckets = []
    for k in range(3 * per_cycle):
        found = {order.item(index)[0] for index in range(k * batch, (k + 1) * batch)}
        assert len(found) == 1
        buckets.append(found.pop())
    for cycle in range(3):
        counts = np.bincount(buckets[cycle * per_cycle : (cycle + 1) * per_cycle], minlength=4)
        assert counts.tolist() == [2, 3, 0, 8]
    assert buckets[:per_cycle] != buckets[per_cycle : 2 * per_cycle]
    shown = [order.item(index)[1] for index in range(3 * per_cycle * batch)]
    counts = np.bincount(shown, minlength=47)
    for a, b in zip(starts, starts[1:], strict=False):
        assert b == a or np.ptp(counts[a:b]) <= 1  # within a bucket none is shown twice more than another


def test_an_index_depends_on_the_seed_and_itself_alone():
    buckets = [np.arange(9), np.arange(9, 30)]
    order = Order(buckets, 4, seed=1)
    whole = items(order, 0, 400)
    assert items(Order(buckets, 4, seed=1), 333, 400) == whole[333:]
    assert items(pickle.loads(pickle.dumps(order)), 0, 400) == whole
    assert items(Order(buckets, 4, seed=2), 0, 400) != whole


def test_the_next_images_of_the_bucket_stand_in():
    order = Order([np.arange(5)], 2, seed=0)
    assert sorted(order.item(3, skip)[1] for skip in range(5)) == list(range(5))


def test_no_image_is_an_error():
    with pytest.raises(ValueError, match="at least one image"):
        Order([np.empty(0, dtype=np.int64)], 2, seed=0)
