"""From logits to the distribution a request asked for, and draws from it.

One transform serves the causal distribution p and the MASK distribution q: exactness of the acceptance rule needs both
to be filtered alike. Temperature 0 is not a special case of the algorithm; its distribution is a point mass.
"""

import dataclasses
import enum
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, UInt32


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """What one request wants.

    Attributes:
        max_tokens: most tokens to generate.
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_k: keep the k most likely tokens, ties included; 0 keeps all.
        top_p: keep the smallest set of likeliest tokens whose mass reaches top_p; 1.0 keeps all. Applied after top_k.
        seed: 0 to 2**32 - 1. All randomness of the request is keyed by (seed, position, purpose).
        stop_token_ids: ids that end the completion, besides the model's own end-of-sequence ids.
        ignore_eos: do not stop at the model's end-of-sequence ids.
        logprobs: None for none; n >= 0 reports each token's log-probability under the causal distribution before
            temperature and filters, and those of the n likeliest alternatives (at most 20).
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"{self.max_tokens=} must be at least 1")
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"{self.temperature=} must be finite and not negative")
        if self.top_k < 0:
            raise ValueError(f"{self.top_k=} must not be negative (0 keeps every token)")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"{self.top_p=} must lie in (0, 1]")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"{self.seed=} must lie in [0, 2**32)")
        if any(token < 0 for token in self.stop_token_ids):
            raise ValueError(f"{self.stop_token_ids=} must not be negative")
        if self.logprobs is not None and not 0 <= self.logprobs <= 20:
            raise ValueError(f"{self.logprobs=} must be None or lie in 0..20")


class SamplingState(NamedTuple):
    """`SamplingParams` of a batch as arrays."""

    temperature: Float[Array, " B"]
    top_k: Int[Array, " B"]
    top_p: Float[Array, " B"]
    seed: UInt32[Array, " B"]


class Purpose(enum.IntEnum):
    """Separate random streams at one position; each is consumed at most once on the way to a committed token."""

    COMMIT = 0  # bonus or correction
    ACCEPT = 1  # the uniform of the acceptance test
    PROPOSE = 2  # a draft at a MASK row


def remove_token(logits: Float[Array, "B T V"], token_id: int) -> Float[Array, "B T V"]:
    """Makes one id impossible: a generated MASK id would be read as a MASK row. Negative ids remove nothing."""
    if token_id < 0:
        return logits
    keep = jnp.arange(logits.shape[-1]) != token_id
    return jnp.where(keep[None, None], logits, -jnp.inf)


def target_probs(logits: Float[Array, "B T V"], sampling: SamplingState, *, filtered: bool) -> Float[Array, "B T V"]:
    """The distribution of each row after temperature, top-k and top-p.

    Args:
        logits: float32 scores; -inf entries stay impossible.
        sampling: per-request parameters.
        filtered: whether any request uses top-k or top-p; False skips the sort. A row with both off has the same
            bits either way.
    """
    greedy = (sampling.temperature == 0.0)[:, None, None]
    # Subtracting the maximum first keeps 1e-30 a legal temperature: 0 / T is 0, the rest becomes -inf.
    shifted = logits - jnp.max(logits, axis=-1, keepdims=True)
    scaled = shifted / jnp.where(greedy, 1.0, sampling.temperature[:, None, None])
    if filtered:
        scaled = jnp.where(scaled >= _filter_threshold(scaled, sampling), scaled, -jnp.inf)
    point_mass = jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1], dtype=jnp.float32)
    return jnp.where(greedy, point_mass, jax.nn.softmax(scaled, axis=-1))


def _filter_threshold(scaled: Float[Array, "B T V"], sampling: SamplingState) -> Float[Array, "B T 1"]:
    """Smallest kept score per row."""
    vocab_size = scaled.shape[-1]
    descending = jnp.flip(jnp.sort(scaled, axis=-1), axis=-1)
    k = jnp.where(sampling.top_k > 0, jnp.minimum(sampling.top_k, vocab_size), vocab_size)[:, None, None]
    kth = jnp.take_along_axis(descending, jnp.broadcast_to(k - 1, (*scaled.shape[:2], 1)), axis=-1)
    probs = jax.nn.softmax(jnp.where(descending >= kth, descending, -jnp.inf), axis=-1)
    mass_before = jnp.cumsum(probs, axis=-1) - probs
    top_p = sampling.top_p[:, None, None]
    nucleus = jnp.where(mass_before < top_p, descending, jnp.inf).min(axis=-1, keepdims=True)
    return jnp.maximum(kth, jnp.where(top_p < 1.0, nucleus, -jnp.inf))


def request_keys(seeds: UInt32[Array, " B"], positions: Int[Array, "B T"], purpose: Purpose) -> Key[Array, "B T"]:
    """One key per request and absolute position: tokens depend on neither batch neighbours nor window layout."""

    def one(seed: Array, position: Array) -> Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), position), purpose)

    return jax.vmap(jax.vmap(one, in_axes=(None, 0)))(seeds, positions)


def draw(probs: Float[Array, "B T V"], keys: Key[Array, "B T"]) -> Int[Array, "B T"]:
    """One token per row by the Gumbel trick; zero-probability tokens are never drawn, a point mass always is."""
    categorical = jax.vmap(jax.vmap(lambda key, row: jax.random.categorical(key, jnp.log(row))))
    return categorical(keys, probs).astype(jnp.int32)


def uniforms(keys: Key[Array, "B T"]) -> Float[Array, "B T"]:
    """Uniforms in [0, 1)."""
    return jax.vmap(jax.vmap(lambda key: jax.random.uniform(key)))(keys)
