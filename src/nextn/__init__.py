"""DeepSeek Sparse Attention with native multi-token verification, and the speculative decoding around it."""

__version__ = "0.1.0"
