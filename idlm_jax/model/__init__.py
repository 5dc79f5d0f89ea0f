"""Qwen3 in Flax NNX: layers, attention, the stack, the KV cache, and a model ready to use."""
