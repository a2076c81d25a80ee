"""DeepGEMM of generation B: only ``fp8_fp4_paged_mqa_logits((q, None), ...)``, for these queries on SM90 only."""

from __future__ import annotations

from types import ModuleType

from tests.stand_ins.paged_mqa import PagedMQA


def make_module(library: PagedMQA, file: str) -> ModuleType:
    """A module to put into ``sys.modules`` as ``deep_gemm``; ``file`` is where it pretends to lie."""

    def get_paged_mqa_logits_metadata(context_lens, block_kv, num_sms, indices=None):
        assert library.arch_major == 9, "this generation wants MX scales on SM100"
        return library.build_schedule(context_lens, block_kv, num_sms, indices)

    def fp8_fp4_paged_mqa_logits(
        q, kv_cache, weights, context_lens, block_table, schedule_meta, max_context_len, indices=None
    ):
        assert library.arch_major == 9, "this generation wants MX scales on SM100"
        assert indices is None
        values, scales = q
        assert scales is None
        return library.score(values, kv_cache, weights, context_lens, block_table, schedule_meta, max_context_len)

    module = ModuleType("deep_gemm")
    module.__file__ = file
    module.__dict__.update(
        get_paged_mqa_logits_metadata=get_paged_mqa_logits_metadata,
        fp8_fp4_paged_mqa_logits=fp8_fp4_paged_mqa_logits,
    )
    return module
