"""The work list of the index-logits kernels in plain Python: what the device must compute, to the last integer.

Hides nothing: groups in order of rows, then equal shares of their cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise


def list_groups(
    query_offsets: Sequence[int],
    lens: Sequence[int],
    *,
    rows_per_group: int,
    num_keys: int,
    tile: int,
    starts: Sequence[int] | None = None,
    start_jump: int = 256,
) -> list[tuple[int, int, int, int]]:
    """First row, rows, request and tiles of every group that has a tile.

    Args:
        query_offsets: ``B + 1`` ascending offsets; not read with ``starts``.
        lens: keys each row sees; with ``starts`` one past the last of them.
        rows_per_group: the most rows of one group.
        num_keys: what lengths are held to.
        tile: keys of a tile.
        starts: first key of each row; groups then begin every ``rows_per_group`` rows and where the start jumps.
        start_jump: keys between the starts of neighbouring rows that still share a group.
    """
    num_rows = len(lens)
    if starts is None:
        firsts = [
            (row, min(row + rows_per_group, stop, num_rows), request)
            for request, (start, stop) in enumerate(pairwise(query_offsets))
            for row in range(start, min(stop, num_rows), rows_per_group)
        ]
    else:
        held = [min(max(start, 0), num_keys) for start in starts]
        begins = [
            row for row in range(num_rows) if row % rows_per_group == 0 or abs(held[row] - held[row - 1]) > start_jump
        ]
        firsts = [(row, stop, 0) for row, stop in pairwise([*begins, num_rows])]
    groups = []
    for row, stop, request in firsts:
        spans = [(max(starts[r], 0) if starts else 0, min(lens[r], num_keys)) for r in range(row, stop)]
        seen = [(start, end) for start, end in spans if start < end]
        if seen:
            keys = max(end for _, end in seen) - min(start for start, _ in seen)
            groups.append((row, stop - row, request, -(-keys // tile)))
    return groups


def share_out(
    groups: Sequence[tuple[int, int, int, int]], *, num_programs: int, tile_costs: Sequence[int]
) -> list[tuple[int, int]]:
    """Group and tile at which each program starts, and where the last one ends."""
    costs = [tile_costs[rows - 1] for _, rows, _, _ in groups]
    offsets = list(accumulate((cost * group[3] for cost, group in zip(costs, groups)), initial=0))
    starts = []
    for program in range(num_programs + 1):
        target = program * offsets[-1] // num_programs
        group = max(sum(offset <= target for offset in offsets[:-1]) - 1, 0)
        tile = -(-(target - offsets[group]) // costs[group]) if groups else 0
        is_past = not groups or tile >= groups[group][3]
        starts.append((group + 1, 0) if is_past else (group, tile))
    return starts
