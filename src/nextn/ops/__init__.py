"""The operations of sparse attention, tensors in and tensors out; each name is a function and a folder of kernels."""

from nextn.ops.accept_drafts import accept_drafts
from nextn.ops.index_logits import contiguous_index_logits, index_logits
from nextn.ops.prepare_query import prepare_query
from nextn.ops.select_topk import select_topk
from nextn.ops.sparse_mla import sparse_mla
from nextn.ops.write_cache import write_cache

__all__ = [
    "accept_drafts",
    "contiguous_index_logits",
    "index_logits",
    "prepare_query",
    "select_topk",
    "sparse_mla",
    "write_cache",
]
