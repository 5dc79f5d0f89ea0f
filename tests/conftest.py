"""Strict numerics for every test: no silent dtype promotion, no silent rank broadcasting, eight CPU devices."""

import os

# Compiling is most of the test time, and programs this small gain nothing from LLVM's optimiser: 15 s of CPU instead
# of 23 for one sampling test. Programs as users compile them are run by `idlm demo` and `idlm eval`.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
