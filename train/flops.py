"""Floating-point operations of a training step, counted from shapes: the numerator of MFU.

Counted is what the method needs, not what an implementation adds: no recomputation (`remat`), no padding, no row that
is not scored, no key that is not seen; a multiplication and an addition are two operations. So, with M the weights of
all projections of all blocks, V D those of the head, and `attended` the visible pairs of a query and a key,

    objective     projections        head                                  attention, per layer
    ar            6 M T              6 V D clean                           12 N H attended / 2
    introspective 6 M 2T             6 V D (noisy + clean)                 12 N H attended
    with lora     4 M T + 2 M T      V D (4 noisy + 2 clean)               4 N H attended + 8 N H attended / 2
                  + 6 A T
    a Markov head                    6 K noisy

for T tokens, `noisy` and `clean` scored rows, A weights of an adapter, and K of a Markov head. KL and TV add the
teacher's and the student's logits and the student's gradient: V D 8 noisy, 6 with lora; with the head, 6 K noisy.
"""

from typing import NamedTuple

from idlm_jax.config import ModelConfig
from idlm_jax.model.markov_head import markov_shapes


class Work(NamedTuple):
    """What a step works on.

    Attributes:
        tokens: real tokens, T; each has a row in either stream.
        noisy: scored rows of the noisy stream.
        clean: scored rows of the clean stream.
        attended: pairs (row, key it sees) over both streams: sum of l (l + 1) over documents of l tokens.
    """

    tokens: float
    noisy: float
    clean: float
    attended: float


def projection_weights(config: ModelConfig) -> int:
    """M: weights of all projections of all blocks."""
    attention = 2 * config.hidden_size * config.head_dim * (config.num_heads + config.num_kv_heads)
    return config.num_layers * (attention + 3 * config.hidden_size * config.mlp_size)


def adapter_weights(config: ModelConfig) -> int:
    """A: both factors of all seven projections; 0 without an adapter."""
    if config.lora is None:
        return 0
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    ends = 2 * (config.hidden_size + query) + 2 * (config.hidden_size + key)
    return config.num_layers * config.lora.rank * (ends + 3 * (config.hidden_size + config.mlp_size))


def markov_weights(config: ModelConfig) -> int:
    """K: all of a Markov head; 0 without one."""
    if config.markov_rank is None:
        return 0
    return sum(rows * columns for rows, columns in markov_shapes(config, config.markov_rank).values())


def full_rows(rows: int, row_len: int) -> Work:
    """The most that a batch can be: rows without padding, one document each, every token scored."""
    tokens = float(rows * row_len)
    return Work(tokens, tokens, tokens, tokens * (row_len + 1))


def formula(config: ModelConfig, *, is_ar: bool) -> str:
    """The count of `step_flops`, in the letters of this module's docstring, for people."""
    if is_ar:
        return "6 M T + 6 V D clean + 6 layers N H attended"
    markov = "" if config.markov_rank is None else " + 6 K noisy"
    if config.lora is None:
        return f"12 M T + 6 V D (noisy + clean) + 12 layers N H attended{markov}"
    return f"(6 M + 6 A) T + V D (4 noisy + 2 clean) + 8 layers N H attended{markov}"


def step_flops(config: ModelConfig, work: Work, *, is_ar: bool, has_divergence: bool) -> float:
    """Operations of one optimizer step; the formula is this module's docstring.

    Args:
        config: the model; an adapter means that the base is frozen.
        work: of the step, over all devices.
        is_ar: the next-token objective on the clean stream alone.
        has_divergence: KL or TV has a weight.
    """
    projections, head = projection_weights(config), config.vocab_size * config.hidden_size
    pair = config.num_layers * config.num_heads * config.head_dim
    if is_ar:
        return float(6 * projections * work.tokens + 6 * head * work.clean + 6 * pair * work.attended)
    markov = 6 * markov_weights(config) * work.noisy * (1 + has_divergence)
    if config.lora is None:
        flops = 12 * projections * work.tokens + 6 * head * (work.noisy + work.clean) + 12 * pair * work.attended
        return float(flops + 8 * head * work.noisy * has_divergence + markov)
    flops = (6 * projections + 6 * adapter_weights(config)) * work.tokens + head * (4 * work.noisy + 2 * work.clean)
    return float(flops + 8 * pair * work.attended + 6 * head * work.noisy * has_divergence + markov)


def recomputed_flops(config: ModelConfig, work: Work, *, is_ar: bool) -> float:
    """What `remat: full` runs a second time: the forward pass of the rows that have a backward pass."""
    if config.remat != "full":
        return 0.0
    share = 1.0 if is_ar or config.lora else 2.0
    pair = config.num_layers * config.num_heads * config.head_dim
    return share * (2 * projection_weights(config) * work.tokens + 4 * pair * work.attended / 2)
