"""Hugging Face checkpoints and PEFT adapters, in and out."""

from idlm_jax.weights.adapter import export_adapter, load_adapter
from idlm_jax.weights.checkpoint import WeightsError
from idlm_jax.weights.export import export_hf
from idlm_jax.weights.load import load
from idlm_jax.weights.sglang import export_sglang

__all__ = ["WeightsError", "export_adapter", "export_hf", "export_sglang", "load", "load_adapter"]
