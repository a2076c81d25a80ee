"""Device code that makes one list of the distinct slots of up to four rows, with a bit per row, in shared memory.

Hides the two hash tables. A cell holds the largest slot that hashes to it, so whether a slot has a cell depends on
the slots alone, not on which thread came first; a slot that lost its cell in both tables is listed once for each row.
"""

# Device code is Gluon's language, which a type checker takes for Python.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportAssignmentType=false, reportReturnType=false
# pyright: reportOptionalOperand=false, reportIndexIssue=false, reportCallIssue=false
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from nextn.ops._gluon_names import barrier

_TOKEN_BITS = gl.constexpr(4)  # of a cell, below its slot
_TOKEN_MASK = gl.constexpr(15)
_STOP_SLOT = gl.constexpr(2**28)  # slots from here on do not fit a cell: 176 GB of latents


# Gluon has no scattered access to shared memory, hence PTX. The tables are the kernel's only allocation, at the
# beginning; cells are numbered through both.


@gluon.jit
def _run(TEXT: gl.constexpr, CONSTRAINTS: gl.constexpr, arguments):
    """One PTX block with effects, an int32 per thread."""
    return gl.inline_asm_elementwise(TEXT, CONSTRAINTS, arguments, dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _raise_cells(cells, keys):
    """Put keys into cells that hold less, unsigned."""
    return _run(
        "{ .reg .b32 a; mov.u32 a, global_smem; mad.lo.u32 a, $1, 4, a; red.shared.max.u32 [a], $2; mov.b32 $0, 0; }",
        "=&r,r,r",
        [cells, keys],
    )


@gluon.jit
def _raise_some_cells(cells, keys):
    """As ``_raise_cells``, but for cells below 0; a branch apiece, which pays where few lanes have a cell."""
    return _run(
        "{ .reg .pred p; .reg .b32 a; mov.u32 a, global_smem; mad.lo.u32 a, $1, 4, a;"
        " setp.ge.s32 p, $1, 0; @p red.shared.max.u32 [a], $2; mov.b32 $0, 0; }",
        "=&r,r,r",
        [cells, keys],
    )


@gluon.jit
def _read_cells(cells):
    return _run(
        "{ .reg .b32 a; mov.u32 a, global_smem; mad.lo.u32 a, $1, 4, a; ld.shared.b32 $0, [a]; }",
        "=r,r",
        [cells],
    )


@gluon.jit
def _mark_cells(cells, bits):
    """Set bits of cells; returns those that were set before."""
    return _run(
        "{ .reg .b32 a; mov.u32 a, global_smem; mad.lo.u32 a, $1, 4, a;"
        " atom.shared.or.b32 $0, [a], $2; and.b32 $0, $0, $2; }",
        "=&r,r,r",
        [cells, bits],
    )


@gluon.jit
def _meet(flags):
    """A barrier of all threads, one flag each; returns whether any was not 0."""
    return _run(
        "{ .reg .pred p, q; setp.ne.s32 p, $1, 0; bar.red.or.pred q, 0, p; selp.b32 $0, 1, 0, q; }",
        "=r,r",
        [flags],
    )


@gluon.jit
def _count_flags(flags):
    """How many lanes before a lane raised a flag, and how many of its warp did."""
    return gl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b32 b, m; setp.ne.s32 p, $2, 0; vote.sync.ballot.b32 b, p, -1;"
        " mov.u32 m, %lanemask_lt; and.b32 m, m, b; popc.b32 $1, b; popc.b32 $0, m; }",
        "=&r,=&r,r",
        [flags],
        dtype=(gl.int32, gl.int32),
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _write_cells(cells, values):
    return _run(
        "{ .reg .b32 a; mov.u32 a, global_smem; mad.lo.u32 a, $1, 4, a; st.shared.b32 [a], $2; mov.b32 $0, 0; }",
        "=&r,r,r",
        [cells, values],
    )


@gluon.jit
def _sum_warps_before(lanes, warps, cells):
    """Sum over a warp's lanes of the cells of those lanes whose number is below the warp's."""
    return _run(
        "{ .reg .pred p; .reg .b32 a, v; mov.u32 a, global_smem; mad.lo.u32 a, $3, 4, a; mov.b32 v, 0;"
        " setp.lt.s32 p, $1, $2; @p ld.shared.b32 v, [a]; redux.sync.add.s32 $0, v, -1; }",
        "=&r,r,r,r",
        [lanes, warps, cells],
    )


@gluon.jit
def _let_dependents_start():
    """The next kernel, if launched as a dependent, may set itself up; it waits for this one's end all the same."""
    return _run("griddepcontrol.launch_dependents; mov.b32 $0, 0;", "=r", [])


@gluon.jit
def _add(left, right):
    return left + right


@gluon.jit
def _or(left, right):
    return left | right


@gluon.jit
def _find_sharers(slots, token, is_slot, FIRST: gl.constexpr, SECOND: gl.constexpr):
    """Of each entry the tokens that name its slot, or its own alone where the slot lost both its cells.

    A slot that one row names twice spoils the list: all entries stand alone, so that each counts.
    """
    SHIFT: gl.constexpr = 32 - (FIRST.bit_length() - 1)
    can_share = is_slot & (slots < _STOP_SLOT)
    keys = gl.where(can_share, slots << _TOKEN_BITS, 0)  # slot 0 has the key of an empty cell, which is as good
    # Multiplied, so that runs of slots scatter.
    first = ((slots * -1640531535) >> SHIFT) & (FIRST - 1)
    second = FIRST + (((slots * -2048144777) >> (SHIFT + 1)) & (SECOND - 1))
    _raise_cells(first, keys)
    barrier()  # the first table is complete
    is_lost = can_share & (_read_cells(first) != keys)
    _raise_some_cells(gl.where(is_lost, second, -1), keys)
    barrier()  # the second is, and all have read the first
    cells = gl.where(is_lost, second, first)
    has_cell = can_share & ((_read_cells(cells) & ~_TOKEN_MASK) == keys)  # others may mark it already
    seen = _mark_cells(cells, gl.where(has_cell, 1 << token, 0))
    is_spoilt = _meet(gl.reduce(seen, 0, _or))  # and all marks are set
    marks = _read_cells(cells) & _TOKEN_MASK
    return gl.where(has_cell & (is_spoilt == 0)[None, :], marks, 1 << token)


@gluon.jit
def _unite_kernel(
    indices_ptr, slots_ptr, masks_ptr, counts_ptr, indices_stride, num_rows, topk, num_slots,
    TOKENS: gl.constexpr, DEPTH: gl.constexpr, TOPK_BLOCK: gl.constexpr, ENTRIES: gl.constexpr,
    NUM_WARPS: gl.constexpr,
):  # fmt: skip
    """List each slot once, for the first row that names it, in an order that depends on nothing but the indices."""
    _let_dependents_start()
    THREADS: gl.constexpr = 32 * NUM_WARPS
    EACH: gl.constexpr = ENTRIES // THREADS
    FIRST: gl.constexpr = 2 * ENTRIES
    SECOND: gl.constexpr = ENTRIES
    ENTRY: gl.constexpr = gl.BlockedLayout([EACH, 1], [1, 32], [1, NUM_WARPS], [1, 0])
    FILL: gl.constexpr = gl.BlockedLayout([4], [32], [NUM_WARPS], [0])
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    table = gl.allocate_shared_memory(gl.int32, [2 * FIRST], FLAT)
    list_id = gl.program_id(0)
    SUBGROUPS: gl.constexpr = (DEPTH + TOKENS - 1) // TOKENS
    first_row = (list_id // SUBGROUPS) * DEPTH + (list_id % SUBGROUPS) * TOKENS
    stop_row = gl.minimum(gl.minimum(first_row + TOKENS, (list_id // SUBGROUPS + 1) * DEPTH), num_rows)
    thread = gl.arange(0, THREADS, layout=gl.SliceLayout(0, ENTRY))
    entry = gl.arange(0, EACH, layout=gl.SliceLayout(1, ENTRY))[:, None] * THREADS + thread[None, :]  # [EACH, THREADS]
    token = entry // TOPK_BLOCK
    place = entry % TOPK_BLOCK
    row = first_row + token
    is_entry = (row < stop_row) & (place < topk)
    slots = gl.load(indices_ptr + row.to(gl.int64) * indices_stride + place, mask=is_entry, other=-1)
    table.slice(0, FIRST).store(gl.full([FIRST], 0, gl.int32, FILL))
    table.slice(FIRST, SECOND).store(gl.full([SECOND], 0, gl.int32, FILL))
    barrier()  # the tables are empty
    is_slot = (slots >= 0) & (slots < num_slots)
    sharers = _find_sharers(slots, token, is_slot, FIRST, SECOND)
    is_listed = is_slot & ((sharers & ((1 << token) - 1)) == 0)
    before, in_warp = _count_flags(is_listed.to(gl.int32))
    up_to = gl.associative_scan(in_warp, 0, _add)
    total = gl.sum(in_warp, axis=0)
    lane, warp = thread % 32, thread // 32
    _write_cells(FIRST + SECOND + warp, total)  # behind the tables
    barrier()  # all warps have said how many slots they list
    start = _sum_warps_before(lane, warp, FIRST + SECOND + lane)
    target = start[None, :] + up_to - in_warp + before
    first_entry = list_id.to(gl.int64) * TOKENS * topk
    gl.store(slots_ptr + first_entry + target, slots, mask=is_listed)
    gl.store(masks_ptr + first_entry + target, sharers, mask=is_listed)
    part = THREADS - 1 - thread  # the last thread knows the count; the parts after the first are empty
    gl.store(counts_ptr + list_id * TOKENS + part, gl.where(part == 0, start + total, 0), mask=part < TOKENS)
    table._keep_alive()
