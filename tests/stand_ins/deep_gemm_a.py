"""DeepGEMM of generation A: ``fp8_paged_mqa_logits`` with ``clean_logits``, any next_n on SM100."""

from __future__ import annotations

from types import ModuleType

import torch

from tests.stand_ins.paged_mqa import PagedMQA


def make_module(library: PagedMQA, file: str) -> ModuleType:
    """A module to put into ``sys.modules`` as ``deep_gemm``; ``file`` is where it pretends to lie."""

    def get_paged_mqa_logits_metadata(context_lens, block_kv, num_sms, indices=None):
        return library.build_schedule(context_lens, block_kv, num_sms, indices)

    def fp8_paged_mqa_logits(
        q,
        kv_cache,
        weights,
        context_lens,
        block_table,
        schedule_meta,
        max_context_len,
        clean_logits=False,
        indices=None,
    ):
        assert not clean_logits
        assert indices is None
        return library.score(q, kv_cache, weights, context_lens, block_table, schedule_meta, max_context_len)

    def fp8_fp4_paged_mqa_logits(
        q,
        kv_cache,
        weights,
        context_lens,
        block_table,
        schedule_meta,
        max_context_len,
        clean_logits=False,
        logits_dtype=torch.float32,
        indices=None,
    ):
        raise AssertionError("FP8 queries with FP32 scales have a function of their own in this generation")

    module = ModuleType("deep_gemm")
    module.__file__ = file
    module.__dict__.update(
        get_paged_mqa_logits_metadata=get_paged_mqa_logits_metadata,
        fp8_paged_mqa_logits=fp8_paged_mqa_logits,
        fp8_fp4_paged_mqa_logits=fp8_fp4_paged_mqa_logits,
    )
    return module
