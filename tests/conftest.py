"""Strict numerics for every test: no silent dtype promotion, no silent rank broadcasting, eight CPU devices."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

# Compiling is most of the test time, and programs this small gain nothing from LLVM's optimiser: 15 s of CPU instead
# of 23 for one sampling test. Programs as users compile them are run by `idlm demo` and `idlm eval`.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

MAPS = Path("/proc/self/maps")
MOST_MAPS = 20_000


@pytest.fixture(scope="module", autouse=True)
def forget_programs() -> Iterator[None]:
    """Between files: compiled programs take up to hundreds of memory maps each; past Linux's 65,530 XLA segfaults."""
    yield
    if MAPS.exists() and MAPS.read_text().count("\n") > MOST_MAPS:
        jax.clear_caches()
        gc.collect()
