"""The engine: continuous batching, speculation and the LLM front.

Hides nothing itself; its modules do. Import what is public from ``nextn``.
"""
