"""Memory filled so that touching what must not be touched shows.

Hides the bytes. What must not be read is 0xFF throughout: NaN in e4m3, bfloat16 and float32 alike, and -1 in integers.
What must not be written is another byte, since -1 and NaN are what a kernel would write there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

POISON_BYTE = 0xFF
GUARD_BYTE = 0xA5  # no NaN in any dtype, neither -1 nor 0, and no token, position or page id of 4 such bytes
WILD_PAGES = (2**30, -1, 2**31 - 1, -(2**31))


@dataclass(frozen=True, kw_only=True, slots=True)
class PoisonedOutput:
    """A poisoned output inside guarded memory.

    Attributes:
        view: the output, rows further apart than they are long, ``POISON_BYTE`` throughout.
        memory: all bytes around and including it.
        owned: bool, one per byte of ``memory``: whether it belongs to ``view``.
    """

    view: torch.Tensor
    memory: torch.Tensor
    owned: torch.Tensor

    def assert_untouched_around(self) -> None:
        """Check that nothing was written outside the view.

        Raises:
            AssertionError: a byte around the view changed.
        """
        changed = (self.memory.cpu() != GUARD_BYTE) & ~self.owned
        assert not changed.any(), f"{int(changed.sum())} bytes outside the output were written"


def poison_output(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str, *, row_padding: int = 0
) -> PoisonedOutput:
    """A poisoned output ``shape``, with a guard before and after it and ``row_padding`` elements between rows.

    Args:
        shape: at least one dimension; the first is rows.
        dtype: its dtype.
        device: where it lies.
        row_padding: elements between two rows. 16-byte aligned rows need a multiple of ``16 / itemsize``.
    """
    num_rows, row_shape = shape[0], shape[1:]
    row = int(torch.Size(row_shape).numel())
    guard = 256  # elements; keeps the view's start aligned
    total = guard * 2 + num_rows * (row + row_padding)
    flat = torch.empty(total, dtype=dtype, device=device)
    places = torch.arange(total)[guard : total - guard].view(num_rows, row + row_padding)[:, :row]
    owned = torch.zeros(total, dtype=torch.bool)
    owned[places.reshape(-1)] = True
    owned = owned.repeat_interleave(flat.element_size())
    memory = flat.view(torch.uint8)
    memory.copy_(torch.where(owned, POISON_BYTE, GUARD_BYTE))
    view = flat[guard : total - guard].view(num_rows, row + row_padding)[:, :row].unflatten(1, row_shape)
    return PoisonedOutput(view=view, memory=memory, owned=owned)


def poison_cache(cache: torch.Tensor) -> torch.Tensor:
    """Fill a cache with NaN in every reading of its bytes, in place; returns it."""
    if cache.is_floating_point():
        return cache.fill_(float("nan"))
    return cache.fill_(POISON_BYTE)


def poison_table_tails(page_table: torch.Tensor, used_pages: torch.Tensor) -> torch.Tensor:
    """A copy of a page table whose unused entries are wild ids and whose rows lie further apart than they are long.

    Args:
        page_table: int32 ``[B, P]``.
        used_pages: int64 ``[B]``, entries of each row that stay; entry 0 always does, as a batch guarantees it.

    Returns:
        int32 ``[B, P]``, unit column stride, row stride ``P + 3``.
    """
    num_requests, num_columns = page_table.shape
    wide = torch.full((num_requests, num_columns + 3), WILD_PAGES[0], dtype=torch.int32, device=page_table.device)
    columns = torch.arange(num_columns, device=page_table.device)
    wild = torch.tensor(WILD_PAGES, dtype=torch.int32, device=page_table.device)[columns % len(WILD_PAGES)]
    unused = columns >= used_pages.to(page_table.device).clamp(min=1)[:, None]
    wide[:, :num_columns] = torch.where(unused, wild, page_table)
    return wide[:, :num_columns]
