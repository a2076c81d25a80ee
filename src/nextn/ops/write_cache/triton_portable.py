"""Latents and index keys normalised, rotated, quantised and scattered into pages in portable Triton: one launch.

Contract and maths: ``reference.py``. Hides which programs write which cache: the first ones take index keys, a block of
rows each, the others latents.

Rope values are the reference's bytes. So are latents and keys without norm and Hadamard transform; a norm adds the
order of its float32 sums and a Hadamard transform that of its butterflies, some 2^-23 of the row's largest value, so
about one code in 100,000 is rounded to the other neighbour.

Floor: every value read once and every byte written once: of a bfloat16 row 1408 bytes in, 788 out and 256 of angles
(4096 rows: 10 MB, 3.4 us at 3.0 TB/s, as long as launching takes); some 30 operations a value.
"""

# Device code is Triton's language, which a type checker takes for Python.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportAssignmentType=false
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from nextn.cache_format import LATENT_DIM, ROPE_DIM
from nextn.hardware import Arch
from nextn.ops._kernel import Kernel, Launch, OpPlan
from nextn.ops._triton_numerics import (
    absolute_bits,
    bfloat16_bits,
    e4m3_bytes,
    has_native_e4m3,
    load_parts,
    power_of_two_scale,
    rotate_parts,
    scale_parts,
)
from nextn.ops.write_cache.problem import WriteCacheProblem

_LATENTS = tl.constexpr(LATENT_DIM)
_ROPE = tl.constexpr(ROPE_DIM)
_BLOCKS = tl.constexpr(4)
_BLOCK = tl.constexpr(128)
_INT32_MAX = tl.constexpr(0x7FFFFFFF)
_REQUEST_BLOCK = 128  # requests whose rows' ends are looked at in one load


@dataclass(frozen=True, kw_only=True, slots=True)
class WriteCacheConfig:
    """How one launch is cut.

    Attributes:
        latent_rows: rows of a program that writes latents; a power of two.
        index_rows: rows of a program that writes index keys; a power of two.
        width: values of a part of an index key, 16 or 32.
        num_warps: warps of a program.
    """

    latent_rows: int = 1
    index_rows: int = 4
    width: int = 16
    num_warps: int = 1


# Sizes that change from call to call must not be compiled in.
@triton.jit(
    do_not_specialize=[
        "num_rows", "num_requests", "max_pages", "max_positions", "kv_num_pages", "index_num_pages",
        "num_index_programs",
    ]
)  # fmt: skip
def _write_cache_kernel(
    positions_ptr, table_ptr, offsets_ptr, pages_ptr, slots_ptr,
    kv_ptr, kv_cache_ptr, kv_weight_ptr, index_k_ptr, index_cache_ptr, index_weight_ptr, index_bias_ptr,
    num_rows, num_requests, max_pages, max_positions, kv_num_pages, index_num_pages, num_index_programs,
    positions_stride, table_row_stride, table_stride, offsets_stride, pages_row_stride, pages_stride, slots_stride,
    kv_row_stride, kv_stride, kv_page_stride, kv_weight_stride,
    index_row_stride, index_stride, index_page_stride, index_weight_stride, index_bias_stride,
    kv_eps, index_eps, hadamard_factor,
    PAGE: tl.constexpr, HAS_SLOTS: tl.constexpr, REQUEST_BLOCK: tl.constexpr, LATENT: tl.constexpr,
    INDEX: tl.constexpr, DIM: tl.constexpr, INTERLEAVED: tl.constexpr, HADAMARD: tl.constexpr, NATIVE: tl.constexpr,
    LATENT_ROWS: tl.constexpr, INDEX_ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program < num_index_programs:
        if INDEX != "none":
            key_rows = program * INDEX_ROWS + tl.arange(0, INDEX_ROWS)
            key_positions, key_slots = _find_slots(
                key_rows, num_rows, positions_ptr, offsets_ptr, pages_ptr, slots_ptr, num_requests, max_pages,
                max_positions, positions_stride, offsets_stride, pages_row_stride, pages_stride, slots_stride,
                PAGE, HAS_SLOTS, REQUEST_BLOCK,
            )  # fmt: skip
            _write_index_keys(
                index_k_ptr + key_rows.to(tl.int64)[:, None] * index_row_stride, index_stride,
                index_weight_ptr, index_weight_stride, index_bias_ptr, index_bias_stride,
                table_ptr + key_positions[:, None] * table_row_stride, table_stride,
                index_cache_ptr + (key_slots // PAGE) * index_page_stride, key_slots % PAGE, key_rows < num_rows,
                (key_slots >= 0) & (key_slots // PAGE < index_num_pages), index_eps, hadamard_factor,
                PAGE, INDEX, DIM, INTERLEAVED, HADAMARD, NATIVE, WIDTH,
            )  # fmt: skip
    elif LATENT != "none":
        rows = (program - num_index_programs) * LATENT_ROWS + tl.arange(0, LATENT_ROWS)
        positions, slots = _find_slots(
            rows, num_rows, positions_ptr, offsets_ptr, pages_ptr, slots_ptr, num_requests, max_pages,
            max_positions, positions_stride, offsets_stride, pages_row_stride, pages_stride, slots_stride,
            PAGE, HAS_SLOTS, REQUEST_BLOCK,
        )  # fmt: skip
        live = (slots >= 0) & (slots // PAGE < kv_num_pages)
        page = kv_cache_ptr + (slots // PAGE) * kv_page_stride
        values = kv_ptr + rows.to(tl.int64)[:, None] * kv_row_stride
        _write_latents(
            values, kv_stride, kv_weight_ptr, kv_weight_stride, page, slots % PAGE, rows < num_rows, live, kv_eps,
            LATENT, NATIVE,
        )  # fmt: skip
        _write_rope(
            values + kv_stride * _LATENTS, kv_stride, table_ptr + positions[:, None] * table_row_stride, table_stride,
            page, slots % PAGE, rows < num_rows, live, LATENT,
        )  # fmt: skip


@triton.jit
def _find_slots(
    rows, num_rows, positions_ptr, offsets_ptr, pages_ptr, slots_ptr, num_requests, max_pages, max_positions,
    positions_stride, offsets_stride, pages_row_stride, pages_stride, slots_stride,
    PAGE: tl.constexpr, HAS_SLOTS: tl.constexpr, REQUEST_BLOCK: tl.constexpr,
):  # fmt: skip
    """Positions inside the rope table and slots, int64 ``[ROWS]``; the slot is -1 where the row writes nothing."""
    exists = rows < num_rows
    rows64 = rows.to(tl.int64)
    positions = tl.load(positions_ptr + rows64 * positions_stride, mask=exists, other=-1).to(tl.int64)
    is_inside = (positions >= 0) & (positions < max_positions)
    if HAS_SLOTS:
        slots = tl.load(slots_ptr + rows64 * slots_stride, mask=exists, other=-1).to(tl.int64)
    else:
        requests = _find_requests(rows, offsets_ptr, offsets_stride, num_requests, REQUEST_BLOCK)
        is_known = is_inside & (requests < num_requests) & (positions // PAGE < max_pages)
        entry = pages_ptr + requests.to(tl.int64) * pages_row_stride + positions // PAGE * pages_stride
        pages = tl.load(entry, mask=is_known, other=-1).to(tl.int64)
        slots = pages * PAGE + positions % PAGE
        slots = tl.where((pages >= 0) & (slots <= _INT32_MAX), slots, -1)
    return tl.where(is_inside, positions, 0), tl.where(is_inside, slots, -1)


@triton.jit
def _find_requests(rows, offsets_ptr, offsets_stride, num_requests, BLOCK: tl.constexpr):
    """The request of each row: how many requests end at or before it; ``num_requests`` if none owns it."""
    ended = tl.zeros_like(rows)
    for start in range(0, num_requests, BLOCK):
        requests = start + tl.arange(0, BLOCK)
        places = offsets_ptr + (requests + 1) * offsets_stride
        ends = tl.load(places, mask=requests < num_requests, other=_INT32_MAX)
        ended += tl.sum((ends[None, :] <= rows[:, None]).to(tl.int32), axis=1)
    return ended


@triton.jit
def _write_latents(
    values_ptr, stride, weight_ptr, weight_stride, page, offset, exists, live, eps,
    LATENT: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Normalise the 512 latents of each row and store them, with their scales in the FP8 format."""
    ROWS: tl.constexpr = offset.shape[0]
    column = tl.arange(0, _LATENTS)[None, :]
    x = tl.load(values_ptr + column * stride, mask=exists[:, None], other=0.0).to(tl.float32)  # [ROWS, 512]
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + column * weight_stride).to(tl.float32)
        mean_square = tl.sum(x * x, axis=1) * (1.0 / _LATENTS)
        x = x * tl.div_rn(1.0, tl.sqrt_rn(mean_square + eps))[:, None] * weight
    if LATENT == "fp8":
        row = page + offset * 656
        blocks = tl.reshape(x, [ROWS, _BLOCKS, _BLOCK])
        scale, inverse = power_of_two_scale(tl.max(absolute_bits(blocks), axis=2))  # [ROWS, 4]
        codes = e4m3_bytes(tl.reshape(blocks * inverse[:, :, None], [ROWS, _LATENTS]), NATIVE)
        tl.store(row[:, None] + column, codes, mask=live[:, None])
        scale_places = (row + _LATENTS).to(tl.pointer_type(tl.float32))
        tl.store(scale_places[:, None] + tl.arange(0, _BLOCKS)[None, :], scale, mask=live[:, None])
    else:
        places = (page + offset * 576)[:, None] + column
        tl.store(places, _convert(x, LATENT), mask=live[:, None])


@triton.jit
def _convert(x, LATENT: tl.constexpr):
    """Values as their bits in the row: bfloat16, or float32 in a float32 cache."""
    return x if LATENT == "fp32" else bfloat16_bits(x)


@triton.jit
def _write_rope(values_ptr, stride, angles, angles_stride, page, offset, exists, live, LATENT: tl.constexpr):
    """Rotate the 64 rope values of each row and store them behind its latents."""
    parts = rotate_parts(load_parts(values_ptr, stride, exists[:, None], _ROPE, _ROPE), angles, angles_stride, True, 1)
    if LATENT == "fp8":
        rope = (page + offset * 656 + 528).to(tl.pointer_type(tl.uint16))
    else:
        rope = page + offset * 576 + _LATENTS
    tl.store(rope[:, None] + tl.arange(0, _ROPE)[None, :], _convert(parts[0], LATENT), mask=live[:, None])


@triton.jit
def _write_index_keys(
    keys_ptr, stride, weight_ptr, weight_stride, bias_ptr, bias_stride, angles, angles_stride, page, offset,
    exists, live, eps, hadamard_factor,
    PAGE: tl.constexpr, INDEX: tl.constexpr, DIM: tl.constexpr, INTERLEAVED: tl.constexpr, HADAMARD: tl.constexpr,
    NATIVE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Normalise, rotate and transform each row's index key and store it, with its scale in the FP8 format."""
    NUM_PARTS: tl.constexpr = DIM // WIDTH
    parts = load_parts(keys_ptr, stride, exists[:, None], DIM, WIDTH)
    if weight_ptr is not None:
        parts = _normalise_keys(parts, weight_ptr, weight_stride, bias_ptr, bias_stride, eps, DIM, WIDTH)
    parts = rotate_parts(parts, angles, angles_stride, INTERLEAVED, NUM_PARTS)
    parts, scale = scale_parts(parts, hadamard_factor, HADAMARD, INDEX == "fp8", NUM_PARTS)
    row = (page + offset * DIM)[:, None]
    for part in tl.static_range(NUM_PARTS):
        columns = (tl.arange(0, WIDTH) + part * WIDTH)[None, :]
        if INDEX == "fp8":
            tl.store(row + columns, e4m3_bytes(parts[part], NATIVE), mask=live[:, None])
        else:
            tl.store(row + columns, parts[part], mask=live[:, None])
    if INDEX == "fp8":
        scale_places = (page + PAGE * DIM + offset * 4).to(tl.pointer_type(tl.float32))
        tl.store(scale_places, scale, mask=live)


@triton.jit
def _normalise_keys(
    parts, weight_ptr, weight_stride, bias_ptr, bias_stride, eps, DIM: tl.constexpr, WIDTH: tl.constexpr
):
    """LayerNorm of each row."""
    total = parts[0]
    for part in tl.static_range(1, DIM // WIDTH):
        total += parts[part]
    mean = (tl.sum(total, axis=1) * (1.0 / DIM))[:, None]
    squares = (parts[0] - mean) * (parts[0] - mean)
    for part in tl.static_range(1, DIM // WIDTH):
        squares += (parts[part] - mean) * (parts[part] - mean)
    factor = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(squares, axis=1) * (1.0 / DIM) + eps))[:, None]
    normalised = ()
    for part in tl.static_range(DIM // WIDTH):
        columns = (tl.arange(0, WIDTH) + part * WIDTH)[None, :]
        x = (parts[part] - mean) * factor * tl.load(weight_ptr + columns * weight_stride).to(tl.float32)
        if bias_ptr is not None:
            x += tl.load(bias_ptr + columns * bias_stride).to(tl.float32)
        normalised = normalised + (x,)  # noqa: RUF005
    return normalised


def configure(problem: WriteCacheProblem) -> WriteCacheConfig:
    """The configuration for a problem: within 8 % of the best of benchmarks/results/small_ops_h100.jsonl."""
    return WriteCacheConfig()


def prepare(
    problem: WriteCacheProblem,
    *,
    plan: OpPlan | None = None,
    config: WriteCacheConfig | None = None,
    **tensors: Any,
) -> Launch:
    """Describe the call, which changes the caches in place.

    Args:
        problem: sizes and options.
        plan: nothing is planned for this op.
        config: how to cut the launch, for tuning; chosen by ``configure`` if None.
        tensors: every other argument of ``write_cache`` but the two options that ``problem`` holds.
    """
    del plan
    config = configure(problem) if config is None else config
    num_index_programs = triton.cdiv(problem.num_rows, config.index_rows) if problem.index_format else 0
    num_latent_programs = triton.cdiv(problem.num_rows, config.latent_rows) if problem.latent_format else 0
    arguments = {
        **_describe_rows(problem, tensors),
        **_describe_latents(problem, tensors),
        **_describe_index(problem, tensors),
        "num_index_programs": num_index_programs,
        "NATIVE": has_native_e4m3(problem.arch),
        "LATENT_ROWS": config.latent_rows,
        "INDEX_ROWS": config.index_rows,
        "WIDTH": config.width,
    }
    return Launch(
        function=_write_cache_kernel,
        arguments=arguments,
        grid=(num_index_programs + num_latent_programs,),
        options={"num_warps": config.num_warps, "enable_fp_fusion": False},
    )


def _describe_rows(problem: WriteCacheProblem, tensors: dict[str, Any]) -> dict[str, Any]:
    """The arguments that say where rows go."""
    positions, table = tensors["positions"], tensors["rope_table"]
    offsets, pages, slots = tensors["query_offsets"], tensors["page_table"], tensors["slots"]
    if problem.has_slots:
        offsets = pages = None
    num_requests = 0 if pages is None else pages.shape[0]
    return {
        "positions_ptr": positions,
        "table_ptr": table,
        "offsets_ptr": offsets,
        "pages_ptr": pages,
        "slots_ptr": slots,
        "num_rows": problem.num_rows,
        "num_requests": num_requests,
        "max_pages": 0 if pages is None else pages.shape[1],
        "max_positions": table.shape[0],
        "positions_stride": positions.stride(0),
        "table_row_stride": table.stride(0),
        "table_stride": table.stride(1),
        "offsets_stride": _stride(offsets, 0),
        "pages_row_stride": _stride(pages, 0),
        "pages_stride": _stride(pages, 1),
        "slots_stride": _stride(slots, 0),
        "PAGE": problem.page_size,
        "HAS_SLOTS": problem.has_slots,
        "REQUEST_BLOCK": _REQUEST_BLOCK,
    }


def _describe_latents(problem: WriteCacheProblem, tensors: dict[str, Any]) -> dict[str, Any]:
    """The arguments that say what the latent cache gets."""
    kv, cache, weight = tensors["kv"], tensors["kv_cache"], tensors["kv_norm_weight"]
    if cache is not None and problem.latent_format == "bf16":
        cache = cache.view(torch.int16)
    return {
        "kv_ptr": kv,
        "kv_cache_ptr": cache,
        "kv_weight_ptr": weight,
        "kv_num_pages": 0 if cache is None else cache.shape[0],
        "kv_row_stride": _stride(kv, 0),
        "kv_stride": _stride(kv, 1),
        "kv_page_stride": _stride(cache, 0),
        "kv_weight_stride": _stride(weight, 0),
        "kv_eps": tensors["kv_norm_eps"],
        "LATENT": problem.latent_format or "none",
    }


def _describe_index(problem: WriteCacheProblem, tensors: dict[str, Any]) -> dict[str, Any]:
    """The arguments that say what the index cache gets."""
    keys, cache = tensors["index_k"], tensors["index_cache"]
    weight, bias = tensors["index_norm_weight"], tensors["index_norm_bias"]
    return {
        "index_k_ptr": keys,
        "index_cache_ptr": cache,
        "index_weight_ptr": weight,
        "index_bias_ptr": bias,
        "index_num_pages": 0 if cache is None else cache.shape[0],
        "index_row_stride": _stride(keys, 0),
        "index_stride": _stride(keys, 1),
        "index_page_stride": _stride(cache, 0),
        "index_weight_stride": _stride(weight, 0),
        "index_bias_stride": _stride(bias, 0),
        "index_eps": tensors["index_norm_eps"],
        "hadamard_factor": max(problem.index_dim, 1) ** -0.5,
        "INDEX": problem.index_format or "none",
        "DIM": problem.index_dim,
        "INTERLEAVED": problem.interleaved,
        "HADAMARD": problem.hadamard,
    }


def _stride(tensor: torch.Tensor | None, dim: int) -> int:
    return 0 if tensor is None else tensor.stride(dim)


KERNEL = Kernel(
    op="write_cache",
    name="triton_portable",
    arches=frozenset(arch for arch in Arch if arch.is_cuda or arch.is_rocm),
    rejects=lambda problem: None,
    prepare=prepare,
    configure=configure,
    rank=lambda problem: 20,
)
