"""What a server does before it serves: finds its port, its compiled programs, and room for keys and values."""

import os
import socket
from pathlib import Path

import jax

from idlm_jax.config import ModelConfig
from serve.config import EngineConfig

CPU_TOKENS = 65_536  # a CPU does not say what it can spare


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections; port 0 takes any that is free.

    Raises:
        ValueError: the address is not ours, or taken.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise ValueError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error


def keep_compiled(folder: Path | None) -> None:
    """Programs are read from a folder if they were compiled before; a start then takes seconds.

    Args:
        folder: by default JAX_COMPILATION_CACHE_DIR, or a folder in the user's cache.
    """
    if folder is None and "JAX_COMPILATION_CACHE_DIR" in os.environ:
        folder = Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
    if folder is None:
        folder = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "idlm-jax" / "compiled"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # A start compiles dozens of programs; by default those that take less than a second are not kept.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def num_pages(model: ModelConfig, max_total_tokens: int | None, memory_share: float, num_shards: int) -> int:
    """Pages of the pool: for `max_total_tokens`, or as many as fit the device beside the loaded weights.

    Args:
        model: whose keys and values they hold.
        max_total_tokens: None to go by the device's memory; on a CPU, which does not tell, 65,536.
        memory_share: of the device's memory that weights and pool may take; the rest is for activations.
        num_shards: devices that share the heads.

    Raises:
        ValueError: the weights leave no room.
    """
    size = EngineConfig.page_size
    if max_total_tokens is None:
        stats = jax.local_devices()[0].memory_stats() or {}
        if "bytes_limit" not in stats:
            return -(-CPU_TOKENS // size) + 1
        heads = max(1, model.num_kv_heads // num_shards)
        page_bytes = 2 * model.num_layers * heads * model.head_dim * size * model.compute.itemsize
        free = int(stats["bytes_limit"] * memory_share) - stats["bytes_in_use"]
        if free < 2 * page_bytes:
            raise ValueError(
                f"no room for keys and values: {stats['bytes_in_use'] / 1e9:.1f} GB of the device are taken, and "
                f"--mem-fraction-static {memory_share:g} of {stats['bytes_limit'] / 1e9:.1f} GB may be used"
            )
        return free // page_bytes
    return -(-max_total_tokens // size) + 1  # one page is never given out
