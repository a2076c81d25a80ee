"""The copying warp of ``gluon_sm90.py``: it walks the work list and brings each tile of keys to the warpgroups.

Hides what it takes to find the keys. Of each segment (the tiles of one group of rows in a share) it copies queries and
weights, then the first keys, for which the work list suffices, and only then waits for the lengths, from which it
writes a note: rows, tiles, what each row sees. Queries and notes have two slots, so the next segment's wait in shared
memory when a warpgroup gets there, and what it takes to find them hides behind the tiles.
"""

# Triton's types describe host values; device code is checked by the compile gate.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportReturnType=false
# pyright: reportAttributeAccessIssue=false, reportAssignmentType=false, reportOperatorIssue=false, reportCallIssue=false

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from nextn.ops._gluon_names import barrier, copy_tile

# A note is 32 int32: tiles (0 ends the share), first key, first row, five spare, of up to eight rows the visible
# lengths, and then the first keys they see; the last only if keys are contiguous, else it is 16.
NOTE_LAYOUT = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
_NOTE_WRITE_LAYOUT = gl.BlockedLayout([1], [32], [1], [0])


@gluon.constexpr_function
def item(rows, group):
    return rows[group]


@gluon.constexpr_function
def sum_of(rows, stop):
    return sum(rows[:stop])


@gluon.jit
def advance(stage, phase, FIRST: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr):
    """The stage STEP further in a ring, and its phase."""
    is_last = stage >= STAGES - STEP
    return gl.where(is_last, FIRST, stage + STEP), gl.where(is_last, phase ^ 1, phase)


@gluon.jit
def _read_share(programs_ptr, max_groups, max_pages):
    """This program's share: where it begins and ends (group, tile), its first group's record and first page."""
    record_ptr = programs_ptr + gl.program_id(0) * 8
    first_group = gl.maximum(gl.load(record_ptr), 0)
    first_tile = gl.minimum(gl.maximum(gl.load(record_ptr + 1), 0), max_pages - 1)
    record = (gl.load(record_ptr + 2), gl.load(record_ptr + 3), gl.load(record_ptr + 4))
    page = gl.load(record_ptr + 6)
    last_group = gl.minimum(gl.load(record_ptr + 8), max_groups)
    last_tile = gl.where(last_group < max_groups, gl.load(record_ptr + 9), 0)
    return (first_group, first_tile), (last_group, last_tile), record, page


@gluon.jit
def _hold_rows(record, num_rows, num_requests, MAX_ROWS: gl.constexpr):
    """A group's first row, rows and request, held within the call's sizes."""
    first_row = gl.minimum(gl.maximum(record[0], 0), num_rows - 1)
    rows = gl.minimum(gl.minimum(gl.maximum(record[1], 1), MAX_ROWS), num_rows - first_row)
    return first_row, rows, gl.minimum(gl.maximum(record[2], 0), num_requests - 1)


@gluon.jit
def _load_spans(spans, first_row, rows, NOTE: gl.constexpr):
    """Visible length of each row, and the first key it sees, in the row's fields of a note."""
    lens_ptr, starts_ptr, _ = spans
    field = gl.arange(0, NOTE, _NOTE_WRITE_LAYOUT)
    row = field % 8
    is_row = (field >= 8) & (field < 24) & (row < rows)
    visible = gl.load(lens_ptr + first_row + row, mask=is_row, other=0)
    start = 0
    if NOTE == 32:
        start = gl.load(starts_ptr + first_row + row, mask=is_row, other=0)
    return visible, start


@gluon.jit
def _hold_spans(visible, start, spans, max_context, NOTE: gl.constexpr, COMPRESSED: gl.constexpr):
    """Spans within the keys and columns there are, as in a note; the first key any row sees, and one past the last."""
    _, _, num_columns = spans
    visible = gl.minimum(gl.maximum(visible, 0), max_context)
    first_key = 0
    last_key = gl.max(visible, axis=0)
    if NOTE == 32:
        start = gl.maximum(start, 0)
        visible = gl.where(start < visible, visible, 0)
        last_key = gl.max(visible, axis=0)
        first_key = gl.minimum(gl.min(gl.where(visible > 0, start, max_context), axis=0), last_key)
        first_key = first_key // 4 * 4  # scales are copied from a multiple of 16 bytes on
        if COMPRESSED:
            visible = gl.minimum(visible, start.to(gl.int64) + num_columns).to(gl.int32)
        field = gl.arange(0, NOTE, _NOTE_WRITE_LAYOUT)
        visible = gl.where(field < 16, visible, gl.where(visible > 0, start, 0))
    return visible, first_key, last_key


@gluon.jit
def _load_page_id(table_row_ptr, tile, max_pages):
    return gl.load(table_row_ptr + gl.minimum(tile, max_pages - 1))


@gluon.jit
def _copy_rows(segments, slot, phase, q_desc, weights_desc, first_row, ROWS: gl.constexpr, HEADS: gl.constexpr):
    """Copy queries and weights of a segment, once its slot is free. Rows past its last are other requests' or zeros."""
    _, queries, weights, ready_bars, empty_bars = segments
    ready_bar = ready_bars.index(slot)
    mbarrier.wait(empty_bars.index(slot), phase)
    mbarrier.expect(ready_bar, sum_of(ROWS, len(ROWS)) * HEADS * 128 + weights.shape[1] * HEADS * 4)
    for group in gl.static_range(len(ROWS)):
        for row in gl.static_range(item(ROWS, group)):
            q_smem = queries.index(slot * len(ROWS) + group).slice(row * HEADS, HEADS)
            copy_tile(q_desc, [(first_row + sum_of(ROWS, group) + row) * HEADS, 0], ready_bar, q_smem)
    copy_tile(weights_desc, [first_row, 0], ready_bar, weights.index(slot))


@gluon.jit
def _copy_keys(pages, ring, stage, phase, page, key):
    """Copy 64 keys and their scales, from a page or from a key on, into a stage of the ring, once that is free."""
    _, _, keys_desc, scales_desc = pages
    keys, scales, ready_bars, empty_bars = ring
    ready_bar = ready_bars.index(stage)
    mbarrier.wait(empty_bars.index(stage), phase)
    mbarrier.expect(ready_bar, 64 * 128 + 64 * 4)
    copy_tile(keys_desc, [page, key, 0], ready_bar, keys.index(stage))
    copy_tile(scales_desc, [page, key], ready_bar, scales.index(stage))


@gluon.jit
def _announce(segments, slot, note):
    """Write a segment's note into its slot, the last of what its warpgroups wait for."""
    notes, _, _, ready_bars, _ = segments
    notes.index(slot).store(note)
    barrier()
    mbarrier.arrive(ready_bars.index(slot), count=1)


@gluon.jit
def load_partition(
    given, ring, segments, ROWS: gl.constexpr, HEADS: gl.constexpr, STAGES: gl.constexpr,
    IS_CONTIGUOUS: gl.constexpr, COMPRESSED: gl.constexpr,
):  # fmt: skip
    work, pages, rows, sizes = given
    programs_ptr, groups_ptr, spans = work
    table_ptr, table_row_stride = pages[0], pages[1]
    q_desc, weights_desc = rows
    num_rows, num_requests, num_pages, max_pages, max_context, max_groups = sizes
    NOTE: gl.constexpr = segments[0].shape[1]
    field = gl.arange(0, NOTE, _NOTE_WRITE_LAYOUT)
    stage = 0
    phase = 1
    slot = 0
    slot_phase = 1
    begin, end, record, first_page = _read_share(programs_ptr, max_groups, max_pages)
    for group in range(begin[0], end[0] + 1):
        first_tile = gl.where(group == begin[0], begin[1], 0)
        if (group < end[0]) | (first_tile < end[1]):
            first_row, num_here, request = _hold_rows(record, num_rows, num_requests, sum_of(ROWS, len(ROWS)))
            visible, start = _load_spans(spans, first_row, num_here, NOTE)
            table_row_ptr = table_ptr + request.to(gl.int64) * table_row_stride
            page = 0
            if not IS_CONTIGUOUS:
                page = first_page
                if group > begin[0]:
                    page = _load_page_id(table_row_ptr, 0, max_pages)
            _copy_rows(segments, slot, slot_phase, q_desc, weights_desc, first_row, ROWS, HEADS)
            if not IS_CONTIGUOUS:
                # The first keys do not wait for the lengths, for a schedule lists no tile that no row sees.
                next_page = _load_page_id(table_row_ptr, first_tile + 1, max_pages)
                page = gl.where((page >= 0) & (page < num_pages), page, 0)  # in the cache whatever the table says
                _copy_keys(pages, ring, stage, phase, page, 0)
                stage, phase = advance(stage, phase, 0, 1, STAGES)
                page = next_page
            visible, first_key, last_key = _hold_spans(visible, start, spans, max_context, NOTE, COMPRESSED)
            stop_tile = gl.maximum(gl.cdiv(last_key - first_key, 64), first_tile + 1)
            stop_tile = gl.where(group == end[0], gl.minimum(end[1], stop_tile), stop_tile)
            first_key += first_tile * 64
            place = gl.where(field == 0, stop_tile - first_tile, gl.where(field == 1, first_key, first_row))
            _announce(segments, slot, gl.where(field < 8, place, visible))
            slot, slot_phase = advance(slot, slot_phase, 0, 1, 2)
            if IS_CONTIGUOUS:
                for _tile in range(first_tile, stop_tile):
                    _copy_keys(pages, ring, stage, phase, 0, first_key)
                    first_key += 64
                    stage, phase = advance(stage, phase, 0, 1, STAGES)
            else:
                for tile in range(first_tile + 1, stop_tile):
                    next_page = _load_page_id(table_row_ptr, tile + 1, max_pages)  # ahead of a wait, which hides it
                    page = gl.where((page >= 0) & (page < num_pages), page, 0)
                    _copy_keys(pages, ring, stage, phase, page, 0)
                    page = next_page
                    stage, phase = advance(stage, phase, 0, 1, STAGES)
        record_ptr = groups_ptr + gl.minimum(group + 1, max_groups - 1) * 4
        record = (gl.load(record_ptr), gl.load(record_ptr + 1), gl.load(record_ptr + 2))
    mbarrier.wait(segments[4].index(slot), slot_phase)
    mbarrier.arrive(segments[3].index(slot), count=1)
    _announce(segments, slot, field * 0)
