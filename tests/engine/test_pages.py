"""The page pool hands every page to at most one owner and loses none."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from nextn.engine.pages import PagePool
from nextn.errors import CapacityError, ConfigError

NUM_PAGES, PAGE_SIZE = 17, 4
owners = st.integers(0, 5)


class PoolMachine(RuleBasedStateMachine):
    """Random reserves and releases against a plain record of what was granted."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(num_pages=NUM_PAGES, page_size=PAGE_SIZE)
        self.granted: dict[int, tuple[int, ...]] = {}

    @rule(owner=owners, num_tokens=st.integers(1, NUM_PAGES * PAGE_SIZE + 5))
    def reserve(self, owner: int, num_tokens: int) -> None:
        before, free = self.granted.get(owner, ()), self.pool.num_free
        wanted = -(-num_tokens // PAGE_SIZE)
        is_granted = self.pool.reserve(owner, num_tokens=num_tokens)
        pages = self.pool.pages_of(owner)
        assert is_granted == (wanted - len(before) <= free)
        assert pages[: len(before)] == before, "a page changed its position"
        assert len(pages) == (max(wanted, len(before)) if is_granted else len(before))
        if pages:
            self.granted[owner] = pages

    @rule(owner=owners)
    def release(self, owner: int) -> None:
        assert self.pool.release(owner) == len(self.granted.pop(owner, ()))
        assert self.pool.pages_of(owner) == ()

    @invariant()
    def nothing_is_lost_or_shared(self) -> None:
        self.pool.check()
        pages = [page for each in self.granted.values() for page in each]
        assert len(set(pages)) == len(pages)
        assert 0 not in pages
        assert self.pool.num_free == NUM_PAGES - 1 - len(pages)
        assert self.pool.owners == set(self.granted)

    @invariant()
    def tables_show_the_owners_pages_and_then_the_dummy(self) -> None:
        present = sorted(self.granted)
        table = self.pool.build_table(present, num_tokens=NUM_PAGES * PAGE_SIZE)
        for owner, row in zip(present, table.tolist()):
            pages = self.granted[owner]
            assert tuple(row) == pages + (0,) * (NUM_PAGES - len(pages))


PoolMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=50, deadline=None, derandomize=True)
TestAccountingIsExact = PoolMachine.TestCase


def test_a_table_is_no_wider_than_the_longest_context_of_the_batch() -> None:
    pool = PagePool(num_pages=9, page_size=4)
    pool.reserve(1, num_tokens=20)
    assert tuple(pool.build_table([1], num_tokens=9).shape) == (1, 3)
    assert tuple(pool.build_table([], num_tokens=0).shape) == (0, 1)


def test_check_names_a_page_owned_twice() -> None:
    pool = PagePool(num_pages=5, page_size=4)
    pool.reserve(1, num_tokens=8)
    pool._free.append(pool.pages_of(1)[0])
    with pytest.raises(CapacityError, match="2 owned and 3 free of 4"):
        pool.check()


def test_a_pool_of_the_dummy_page_alone_is_refused() -> None:
    with pytest.raises(ConfigError, match="1 pages of 64"):
        PagePool(num_pages=1)
