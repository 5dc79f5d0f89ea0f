"""The bit-for-bit mode: whatever computes logits runs on tiles of one shape, `[plan.group_slots, TILE_ROWS]`.

A row then has the same bits whichever method asked for it, in whatever batch and place:

- a window (AR's has one row) is padded to a tile, and a prompt is read in tiles;
- a batch is worked through group by group, so that its size is in no shape: matrix products, and the draws behind them;
- attention sums at absolute positions (`Body.PAGE_WALK` in place of the reference, which sums over a table's width);
- barriers around the tile keep the compiler from rounding it otherwise in another program. Programs of this mode are
  compiled without excess precision (`loop.py`), which would let bfloat16 roundings move with fusions.

What is left to trust is that a product of this one shape treats its rows alike; `tests/decoding/test_bitwise.py` and
`benchmarks/bitwise.py` look at that.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt

from idlm_jax.decoding.method import TILE_ROWS, StepPlan
from idlm_jax.decoding.state import Committed, DecodeState, Finish
from idlm_jax.decoding.window import Outputs, Window
from idlm_jax.model.attention import paged_attend
from idlm_jax.model.kv_cache import KVCache
from idlm_jax.model.transformer import Qwen3
from pallas_kernels.bodies import Body

# What one forward adds to some slots: the slots as it leaves them, and the tokens.
Step = Callable[..., tuple[DecodeState, Committed]]


def group_slots_of(deterministic: Literal["bitwise"] | None) -> int | None:
    """Slots per tile on this platform, or None for the default mode.

    Reading the weights is most of a small product on an accelerator (on an H100 up to about 295 rows), so 8 slots, 128
    rows, cost little more than one; a CPU computes every row.

    Raises:
        ValueError: `deterministic` is neither None nor "bitwise".
    """
    if deterministic is None:
        return None
    if deterministic != "bitwise":
        raise ValueError(f"{deterministic=} must be None or 'bitwise'")
    return 1 if jax.default_backend() == "cpu" else 8


def over_groups(step: Step, plan: StepPlan, state: DecodeState, is_due: Bool[Array, " B"], *given: Any) -> Any:
    """Runs `step` on every due slot, a group at a time; the others are left as they are, and commit nothing.

    Due slots are moved together, so the last group alone may hold others, on which `step` runs as on idle ones.

    Args:
        step: takes a group's state over the whole cache and its part of `given`.
        plan: its `group_slots` must divide the batch.
        state: of the batch.
        is_due: slots to run.
        given: pytrees of arrays with a leading slot axis.

    Returns:
        The state, and what was committed.
    """
    slots, batch = plan.group_slots, len(state.pending)
    assert slots is not None
    if batch % slots:
        raise ValueError(f"a batch of {batch} slots cannot be worked through in groups of {slots}")
    # Kept by their owner, who writes them when the step is over.
    kept = {"tokens": state.tokens, "logprobs": state.logprobs, "checksums": state.checksums}
    state = state._replace(tokens=None, logprobs=None, checksums=None)
    order = jnp.argsort(~is_due, stable=True)
    num_groups = (jnp.sum(is_due, dtype=jnp.int32) + slots - 1) // slots

    def take(tree: Any, chosen: Int[Array, " slots"]) -> Any:
        return jax.tree.map(lambda x: x[chosen], tree)

    def run(state: DecodeState, chosen: Int[Array, " slots"]) -> tuple[DecodeState, Committed]:
        group = take(state._replace(cache=None), chosen)._replace(cache=state.cache)
        return step(group, *take(given, chosen))

    def body(number: Int[Array, ""], carry: tuple[DecodeState, Committed]) -> tuple[DecodeState, Committed]:
        state, committed = carry
        chosen = jax.lax.dynamic_slice(order, (number * slots,), (slots,))
        group, new = run(state, chosen)
        rest, committed = jax.tree.map(
            lambda x, new: x.at[chosen].set(new),
            (state._replace(cache=None), committed),
            (group._replace(cache=None), new),
        )
        return rest._replace(cache=group.cache), committed

    shapes = jax.eval_shape(run, state, order[:slots])[1]
    nothing = jax.tree.map(lambda x: jnp.zeros((batch, *x.shape[1:]), x.dtype), shapes)
    # A count that the compiler does not know: it would unroll a loop of one turn, and the body with it.
    num_groups = jax.lax.optimization_barrier(num_groups)
    state, committed = jax.lax.fori_loop(0, num_groups, body, (state, nothing))
    return state._replace(**kept), committed


def write_prompt(
    module: Qwen3, plan: StepPlan, state: DecodeState, tokens: Int[Array, "B R"], start: Int[Array, " B"]
) -> DecodeState:
    """Writes the keys and values of stretches of prompts, but for each one's last token, which stands at `context_len`.

    Rows of padding go to the slots behind, up to a tile behind `start + R`.
    """
    batch, num_rows = tokens.shape
    tokens = jnp.pad(tokens, ((0, 0), (0, -num_rows % TILE_ROWS)))
    causal = jnp.broadcast_to(jnp.tril(jnp.ones((TILE_ROWS, TILE_ROWS), bool))[None], (batch, TILE_ROWS, TILE_ROWS))
    is_mask = jnp.zeros((batch, TILE_ROWS), bool)

    def tile(number: Int[Array, ""], cache: KVCache) -> KVCache:
        first = number * TILE_ROWS
        rows = jax.lax.dynamic_slice(tokens, (0, first), (batch, TILE_ROWS))
        at = start + first
        positions = at[:, None] + jnp.arange(TILE_ROWS, dtype=jnp.int32)[None]
        return _tile(module, plan, state._replace(cache=cache), Window(rows, positions, causal, is_mask), at)[1]

    num_tiles = jnp.max(state.context_len - start + TILE_ROWS - 1) // TILE_ROWS
    return state._replace(cache=jax.lax.fori_loop(0, num_tiles, tile, state.cache))


def window_outputs(module: Qwen3, plan: StepPlan, state: DecodeState, window: Window) -> tuple[Outputs, KVCache]:
    """What a window's rows give, which start at `context_len`, and the cache with their keys and values."""
    num_rows = window.tokens.shape[1]
    behind = TILE_ROWS - num_rows
    row = state.context_len[:, None] + jnp.arange(num_rows, TILE_ROWS, dtype=jnp.int32)[None]
    padded = Window(
        tokens=jnp.pad(window.tokens, ((0, 0), (0, behind))),
        positions=jnp.concatenate([window.positions, row], axis=1),
        visible=jnp.pad(window.visible, ((0, 0), (0, behind), (0, behind))),
        is_mask=jnp.pad(window.is_mask, ((0, 0), (0, behind))),
    )
    hidden, cache = _tile(module, plan, state, padded, state.context_len)
    logits = jax.lax.optimization_barrier(module.logits(hidden))
    return Outputs(hidden[:, :num_rows], logits[:, :num_rows]), cache


def _tile(
    module: Qwen3, plan: StepPlan, state: DecodeState, rows: Window, start: Int[Array, " B"]
) -> tuple[Float[Array, "B W D"], KVCache]:
    """The stack on one tile of rows that are written from slot `start` on."""
    kernels = module.config.kernels
    if kernels.paged_attention is Body.REFERENCE:
        kernels = dataclasses.replace(kernels, paged_attention=Body.PAGE_WALK)
    rows, start, table = jax.lax.optimization_barrier((rows, start, state.page_table))
    hidden, cache = module.hidden_states(
        rows.tokens,
        rows.positions,
        paged_attend(table, start, rows.visible, kernels, plan.mesh),
        carried=state.cache,
        lora_gate=rows.is_mask,
    )
    return jax.lax.optimization_barrier(hidden), cache


def checksums(logits: Float[Array, "B C V"]) -> UInt[Array, "B C"]:
    """An exact function of every bit of a row: sum of (2 v + 1) * bits of logit v, modulo 2**32.

    Integer sums have no order. Odd factors are invertible, so a change of one logit always shows.
    """
    bits = jax.lax.bitcast_convert_type(logits.astype(jnp.float32), jnp.uint32)
    factors = 2 * jnp.arange(logits.shape[-1], dtype=jnp.uint32) + 1
    return jnp.sum(bits * factors[None, None], axis=-1, dtype=jnp.uint32)


def is_due(state: DecodeState) -> Bool[Array, " B"]:
    """Slots that a decode step has to run."""
    return state.finish == Finish.RUNNING
