"""Counter-based randomness in plain jnp operations: the bits of jax.random on any backend, inside kernels or out.

Threefry-2x32 with 20 rounds (Salmon et al. 2011), keyed and counted as jax.random does it with
`jax_threefry_partitionable`: `jax.random.key(seed)`, one `fold_in` with the position and one with the purpose, element
v of a draw over the vocabulary reads counter v. Floats are made from bits as jax.random makes them in its default
("low") mode. Integer operations only up to the last step, so bits are equal on CPU, GPU and TPU and depend on no
neighbour.
"""

import enum
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
PARITY = np.uint32(0x1BD11BDA)
TINY = np.finfo(np.float32).tiny


class Purpose(enum.IntEnum):
    """Separate random streams at one position; each is consumed at most once on the way to a committed token."""

    COMMIT = 0  # bonus or correction
    ACCEPT = 1  # the uniform of the acceptance test
    PROPOSE = 2  # a draft at a MASK row


class Key(NamedTuple):
    """The two words of a threefry key, each of any one shape."""

    high: UInt32[Array, "*rows"]
    low: UInt32[Array, "*rows"]


def request_key(seed: UInt32[Array, "..."], position: Int[Array, "..."], purpose: Purpose) -> Key:
    """Key of a request's seed, an absolute position and a purpose; arrays broadcast."""
    key = Key(jnp.zeros_like(seed), seed)
    return fold_in(fold_in(key, position.astype(jnp.uint32)), jnp.full_like(seed, int(purpose)))


def fold_in(key: Key, data: UInt32[Array, "*rows"]) -> Key:
    """`jax.random.fold_in`."""
    return Key(*_hash(key, jnp.zeros_like(data), data))


def bits(key: Key, counter: UInt32[Array, "*rows"]) -> UInt32[Array, "*rows"]:
    """Element `counter` of `jax.random.bits(key, shape)`, counted in row-major order."""
    first, second = _hash(key, jnp.zeros_like(counter), counter)
    return first ^ second


def uniform(random_bits: UInt32[Array, "*rows"]) -> Float[Array, "*rows"]:
    """Uniform in [0, 1): 23 bits become the mantissa of a float in [1, 2)."""
    one_to_two = (random_bits >> np.uint32(9)) | np.uint32(0x3F800000)
    return jax.lax.bitcast_convert_type(one_to_two, jnp.float32) - np.float32(1.0)


def gumbel(random_bits: UInt32[Array, "*rows"]) -> Float[Array, "*rows"]:
    """Standard Gumbel noise, as `jax.random.gumbel` in mode "low"."""
    return -jnp.log(-jnp.log(jnp.maximum(uniform(random_bits), TINY)))


def _hash(
    key: Key, x0: UInt32[Array, "..."], x1: UInt32[Array, "..."]
) -> tuple[UInt32[Array, "..."], UInt32[Array, "..."]]:
    words = (key.high, key.low, key.high ^ key.low ^ PARITY)
    x0, x1 = x0 + words[0], x1 + words[1]
    for group in range(5):
        for distance in ROTATIONS[group % 2]:
            x0 = x0 + x1
            x1 = (x1 << np.uint32(distance)) | (x1 >> np.uint32(32 - distance))
            x1 = x0 ^ x1
        x0 = x0 + words[(group + 1) % 3]
        x1 = x1 + words[(group + 2) % 3] + np.uint32(group + 1)
    return x0, x1
