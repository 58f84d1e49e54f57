"""What is derived from tensors is made again exactly when they change."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from torch import nn

from ldm.support.calls import separate_call
from ldm.support.derived import COLUMNS, DIRECT, Derived, checksum, kept_for_call

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.int64, torch.uint8, torch.bool]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 7, 5000, 8 * COLUMNS * 3 + 5, 70001])
def test_a_checksum_depends_on_every_number_and_on_the_order(dtype, size):
    x = torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(0)).to(dtype)
    first = checksum(x)
    assert checksum(x.clone()) == first
    for at in {0, size // 2, size - 1}:
        y = x.clone()
        y[at] = 1 - y[at].long()
        assert checksum(y) != first
    if size > 1:
        z = torch.arange(size).remainder(101).to(dtype)
        assert checksum(z.flip(0)) != checksum(z) != checksum(z.roll(1))


def test_a_checksum_depends_on_the_numbers_as_they_are_in_memory():
    x = torch.randn(40, 24, 3, 3)
    assert checksum(x) != checksum(x.to(memory_format=torch.channels_last))
    views = (x[1:], x[:, ::2], x.transpose(0, 1), torch.randn(9001)[1:], torch.randn(5, 1).expand(5, 6000))
    for i, view in enumerate(views):
        before = checksum(view)
        assert checksum(view) == before
        view[(-1, *[0] * (view.ndim - 1))] = i + 0.5
        assert checksum(view) != before
    zeros = torch.zeros(DIRECT)
    minus = zeros.clone()
    minus[DIRECT // 2] = -0.0
    assert checksum(zeros) != checksum(minus) and checksum(torch.zeros(0)) == 0
    assert checksum(torch.empty(3, device="meta")) == 0


class Counted:
    """A derived value, twice the weight, with the number of times that it was made."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight, self.made, self.read, self.derived = weight, 0, 0, Derived()

    def double(self) -> torch.Tensor:
        self.made += 1
        return 2 * self.weight.detach()

    def count_read(self, x: torch.Tensor) -> None:
        self.read += 1

    def __call__(self) -> torch.Tensor:
        return self.derived.of([self.weight], self.double, read=self.count_read)


@pytest.mark.parametrize("size", [5, 40000])
def test_a_value_is_made_again_when_its_source_changes(size):
    own = Counted(nn.Parameter(torch.randn(size)))
    first = own()
    assert own() is first and own.made == 1
    with torch.no_grad():
        own.weight.add_(1)
    own.weight.data[-1] += 1
    own(), own.weight.detach().numpy().__setitem__(0, 7.0)
    assert torch.equal(own(), 2 * own.weight) and own.made == 3
    own.weight.data = own.weight.data + 1
    assert torch.equal(own(), 2 * own.weight) and own.made == 4
    own.weight = nn.Parameter(own.weight.detach().clone())
    own(), own()
    assert own.made == 5 and copy.deepcopy(own.derived).value is None
    assert pickle.loads(pickle.dumps(own.derived)).value is None
    own.derived.clear()
    assert own.derived.value is None and torch.equal(own(), 2 * own.weight)


def test_contents_are_compared_once_in_a_call_and_counters_always():
    own, pipe = Counted(nn.Parameter(torch.randn(40000))), nn.Identity()
    own()
    with separate_call(pipe):
        before = own.read
        first = own()
        assert own.read == before + 1
        assert own() is first and own.read == before + 1
        own.weight.data[3] += 1
        assert own() is first  # as documented: seen from the next call on
        with torch.no_grad():
            own.weight.add_(1)
        assert torch.equal(own(), 2 * own.weight)
        own.weight.data[3] += 1
        with separate_call(pipe):  # a call inside the call is another call
            assert torch.equal(own(), 2 * own.weight)
    own.weight.data[3] += 1
    with separate_call(pipe):
        assert torch.equal(own(), 2 * own.weight)


def test_tensors_without_memory_of_their_own_may_be_sources():
    owner = nn.Identity()
    with separate_call(owner):
        doubled = torch.func.vmap(lambda x: kept_for_call(owner, [x], lambda: 2 * x))(torch.ones(3, 2))
    assert torch.equal(doubled, torch.full((3, 2), 2.0))


def test_threads_make_a_value_once():
    own, gate = Counted(torch.randn(40000)), Barrier(8)

    def use(i: int) -> torch.Tensor:
        gate.wait()
        return own()

    with ThreadPoolExecutor(8) as pool:
        values = list(pool.map(use, range(8)))
    assert own.made == 1 and all(value is values[0] for value in values)


def test_what_is_kept_for_a_call_has_a_value_for_each_key_and_ends_with_its_owner():
    owner, x, made = nn.Identity(), torch.ones(3), []

    def make() -> int:
        made.append(1)
        return len(made)

    def kept(key: str) -> int:
        return kept_for_call(owner, [x], make, key=key)

    assert [kept("a"), kept("b"), kept("a")] == [1, 2, 1]
    x.numpy()[0] = 5
    assert kept("a") == 3
    with separate_call(owner):
        assert [kept("a"), kept("a")] == [4, 4]
    assert kept("a") == 3
    owner = nn.Identity()
    assert kept("a") == 5


def test_a_checksum_leaves_the_memory_resizable():
    """FSDP frees the whole weights of a block by resizing their memory."""
    for size in (8, 100_000):
        x = torch.ones(size)
        checksum(x)
        assert x.untyped_storage().resizable()
