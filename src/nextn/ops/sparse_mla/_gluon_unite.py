"""Device code that makes one list of the distinct slots of up to four rows, with a bit per row, in shared memory.

Hides the hash table: open addressing, so that no slot is listed twice for want of a cell. Where a slot comes to lie
depends on the order of threads; what is listed, and where, does not.
"""

# Device code is Gluon's language, which a type checker takes for Python.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportAssignmentType=false, reportReturnType=false
# pyright: reportOptionalOperand=false, reportIndexIssue=false, reportCallIssue=false
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

_barrier = getattr(gl, "thread_barrier", None) or gl.barrier  # renamed in Triton 3.9
_TOKENS = gl.constexpr(4)  # first mentions of a slot are read as one 16-byte vector
_EMPTY = gl.constexpr(0x7FFFFFFF)


@gluon.jit
def _find_cells(slots, hashes, CELLS: gl.constexpr):
    """The cell of each slot, -1 for a negative slot; a free cell is taken. There are as many cells as slots at most.

    Gluon has no atomics in shared memory, hence PTX; the table is the kernel's only allocation, at its beginning.
    """
    return gl.inline_asm_elementwise(
        "{ .reg .pred p, q; .reg .b32 cell, address, found, base, tries;"
        " mov.u32 base, global_smem; mov.b32 cell, $2; mov.b32 tries, 0; mov.b32 $0, -1;"
        " setp.lt.s32 p, $1, 0; @p bra DONE;"
        " TRY: shl.b32 address, cell, 2; add.u32 address, address, base;"
        " atom.shared.cas.b32 found, [address], 0x7FFFFFFF, $1;"
        " setp.eq.s32 p, found, 0x7FFFFFFF; setp.eq.s32 q, found, $1; or.pred p, p, q; @p bra FOUND;"
        " add.u32 cell, cell, 1; and.b32 cell, cell, $3; add.u32 tries, tries, 1;"
        " setp.le.u32 q, tries, $3; @q bra TRY; bra DONE;"
        " FOUND: mov.b32 $0, cell; DONE: }",
        "=&r,r,r,r",
        [slots, hashes, hashes * 0 + (CELLS - 1)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _mention(cells, tokens, places, CELLS: gl.constexpr):
    """Note each row's first mention of a slot."""
    return gl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b32 base; mov.u32 base, global_smem; add.u32 base, base, $1;"
        " setp.ge.s32 p, $2, 0; @p red.shared.min.s32 [base], $2; mov.b32 $0, 0; }",
        "=&r,r,r",
        [CELLS * 4 + (cells * _TOKENS + tokens) * 4, gl.where(cells >= 0, places, -1)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _read_mentions(cells, CELLS: gl.constexpr):
    """The first mentions of each cell's slot by the four rows."""
    return gl.inline_asm_elementwise(
        "{ .reg .b32 base; mov.u32 base, global_smem; add.u32 base, base, $4;"
        " ld.shared.v4.b32 {$0, $1, $2, $3}, [base]; }",
        "=r,=r,=r,=r,r",
        [CELLS * 4 + gl.maximum(cells, 0) * (_TOKENS * 4)],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32),
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _add(left, right):
    return left + right


@gluon.jit
def _unite_kernel(
    indices_ptr, slots_ptr, masks_ptr, counts_ptr, indices_stride, num_rows, topk, num_slots,
    TOKENS: gl.constexpr, DEPTH: gl.constexpr, TOPK_BLOCK: gl.constexpr, NUM_WARPS: gl.constexpr,
):  # fmt: skip
    """List row 0's slots in their order, then what row 1 adds, and so on; second mentions within a row alone."""
    ENTRIES: gl.constexpr = _TOKENS * TOPK_BLOCK
    ENTRY: gl.constexpr = gl.BlockedLayout([4], [32], [NUM_WARPS], [0])
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    table = gl.allocate_shared_memory(gl.int32, [1 + _TOKENS, ENTRIES], FLAT)
    for part in gl.static_range(1 + _TOKENS):
        table.index(part).store(gl.full([ENTRIES], _EMPTY, gl.int32, ENTRY))
    list_id = gl.program_id(0)
    SUBGROUPS: gl.constexpr = (DEPTH + TOKENS - 1) // TOKENS
    first_row = (list_id // SUBGROUPS) * DEPTH + (list_id % SUBGROUPS) * TOKENS
    stop_row = gl.minimum(gl.minimum(first_row + TOKENS, (list_id // SUBGROUPS + 1) * DEPTH), num_rows)
    entry = gl.arange(0, ENTRIES, layout=ENTRY)
    token = entry // TOPK_BLOCK
    place = entry % TOPK_BLOCK
    row = first_row + token
    is_entry = (row < stop_row) & (place < topk)
    slots = gl.load(indices_ptr + row.to(gl.int64) * indices_stride + place, mask=is_entry, other=-1)
    slots = gl.where((slots >= 0) & (slots < num_slots), slots, -1)
    _barrier()  # the table is empty
    hashes = ((slots * -1640531535) >> 15) & (ENTRIES - 1)  # scattered: runs of slots would make runs of full cells
    cells = _find_cells(slots, hashes, ENTRIES)
    _mention(cells, token, place, ENTRIES)
    _barrier()  # all mentions are noted
    first, second, third, fourth = _read_mentions(cells, ENTRIES)
    sharers = gl.where(first != _EMPTY, 1, 0) | gl.where(second != _EMPTY, 2, 0)
    sharers |= gl.where(third != _EMPTY, 4, 0) | gl.where(fourth != _EMPTY, 8, 0)
    own = gl.where(token == 0, first, gl.where(token == 1, second, gl.where(token == 2, third, fourth)))
    sharers = gl.where(own == place, sharers, 1 << token)
    is_listed = (cells >= 0) & ((sharers & ((1 << token) - 1)) == 0)
    rank = gl.associative_scan(is_listed.to(gl.int32), 0, _add)
    target = list_id.to(gl.int64) * TOKENS * topk + rank - 1
    gl.store(slots_ptr + target, slots, mask=is_listed)
    gl.store(masks_ptr + target, sharers, mask=is_listed)
    count = gl.max(rank, axis=0)
    for part in gl.static_range(TOKENS):
        gl.store(counts_ptr + list_id * TOKENS + part, count if part == 0 else 0)
    table._keep_alive()
