"""PagePool: which pages of the caches belong to which request.

Hides the free list and the page-table rows. Target and draft caches share the numbering: one page id names the same
64 tokens in every layer's latent and index cache. Page 0 is never handed out; it backs unused table entries.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nextn.errors import CapacityError, ConfigError


class PagePool:
    """Pages owned one by one by requests, with exact accounting.

    Args:
        num_pages: pages in every cache, the dummy page 0 included.
        page_size: tokens per page.
        device: where page-table rows lie.

    Raises:
        ConfigError: fewer than two pages, so that no request could own one.

    Example:
        >>> pool = PagePool(num_pages=4, page_size=64)
        >>> pool.reserve(7, num_tokens=100), pool.num_free, pool.reserve(8, num_tokens=100)
        (True, 1, False)
    """

    def __init__(self, *, num_pages: int, page_size: int = 64, device: torch.device | str = "cpu") -> None:
        if num_pages < 2 or page_size < 1:
            raise ConfigError(
                f"a pool of {num_pages} pages of {page_size} tokens holds no request; give it 2 or more pages"
            )
        self.num_pages = num_pages
        self.page_size = page_size
        self._device = torch.device(device)
        self._free = list(range(num_pages - 1, 0, -1))  # a stack; low ids first, so a small load touches little memory
        self._owned: dict[int, list[int]] = {}
        self._rows: dict[int, torch.Tensor] = {}

    @property
    def num_free(self) -> int:
        """Pages nobody owns."""
        return len(self._free)

    @property
    def num_usable(self) -> int:
        """Pages that can be owned at all: every page but the dummy."""
        return self.num_pages - 1

    @property
    def owners(self) -> frozenset[int]:
        """Every owner of at least one page."""
        return frozenset(self._owned)

    def count_pages(self, num_tokens: int) -> int:
        """Pages that ``num_tokens`` tokens take."""
        return -(-num_tokens // self.page_size)

    def pages_of(self, owner: int) -> tuple[int, ...]:
        """The owner's pages in order of position; empty if it has none."""
        return tuple(self._owned.get(owner, ()))

    def reserve(self, owner: int, *, num_tokens: int) -> bool:
        """Give ``owner`` pages for its first ``num_tokens`` tokens, keeping those it has.

        Returns:
            Whether it now has them. All or nothing: on False nothing changed.
        """
        pages = self._owned.get(owner, [])
        missing = self.count_pages(num_tokens) - len(pages)
        if missing <= 0:
            return True
        if missing > len(self._free):
            return False
        taken = [self._free.pop() for _ in range(missing)]
        self._write_row(owner, start=len(pages), pages=taken)
        self._owned.setdefault(owner, pages).extend(taken)
        return True

    def release(self, owner: int) -> int:
        """Take all pages back from ``owner``; returns how many there were, 0 for an unknown owner."""
        pages = self._owned.pop(owner, [])
        self._rows.pop(owner, None)
        self._free.extend(reversed(pages))
        return len(pages)

    def build_table(self, owners: Sequence[int], *, num_tokens: int) -> torch.Tensor:
        """The page table of a batch.

        Args:
            owners: one per request of the batch.
            num_tokens: the longest context of the batch; sets the width.

        Returns:
            int32 ``[B, P]``, P at least 1; entries beyond an owner's pages are 0, the dummy page.
        """
        width = max(self.count_pages(num_tokens), 1)
        table = torch.zeros(len(owners), width, dtype=torch.int32, device=self._device)
        for index, owner in enumerate(owners):
            row = self._rows[owner][:width]
            table[index, : row.shape[0]] = row
        return table

    def check(self) -> None:
        """Verify the accounting.

        Raises:
            CapacityError: a page is lost, or owned twice, or both free and owned.
        """
        owned = [page for pages in self._owned.values() for page in pages]
        if sorted(owned + self._free) != list(range(1, self.num_pages)):
            raise CapacityError(
                f"page accounting is broken: {len(owned)} owned and {len(self._free)} free of {self.num_usable} pages; "
                "this is a defect, please report it"
            )

    def _write_row(self, owner: int, *, start: int, pages: list[int]) -> None:
        """Append to the owner's table row, which doubles so that long contexts are not copied page by page."""
        row = self._rows.get(owner)
        end = start + len(pages)
        if row is None or row.shape[0] < end:
            grown = torch.zeros(max(end, 2 * start), dtype=torch.int32, device=self._device)
            if row is not None:
                grown[:start] = row[:start]
            self._rows[owner] = row = grown
        row[start:end] = torch.tensor(pages, dtype=torch.int32)
