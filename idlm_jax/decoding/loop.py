"""The compiled entry points: prefill, and the whole decode loop as one program with donated state."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int

from idlm_jax.decoding.method import StepPlan
from idlm_jax.decoding.state import DecodeState
from idlm_jax.decoding.step import decode_step, is_running, prefill
from idlm_jax.model.transformer import INFERENCE_OPTIONS, Qwen3

# Otherwise bfloat16 is rounded where fusions end, which is elsewhere in each program.
BITWISE_OPTIONS = {**INFERENCE_OPTIONS, "xla_allow_excess_precision": False}


def _prefill(
    graph: nnx.GraphDef[Qwen3], params: nnx.State, plan: StepPlan, state: DecodeState, num_rows: int
) -> DecodeState:
    """`prefill` compiled; `state` is donated."""
    return prefill(nnx.merge(graph, params), plan, state, num_rows)


def _loop(
    graph: nnx.GraphDef[Qwen3],
    params: nnx.State,
    plan: StepPlan,
    state: DecodeState,
    max_forwards: Int[Array, ""],
) -> DecodeState:
    """Decodes until every slot is done or `max_forwards` have run; `state` is donated.

    `max_forwards` is an array, so streaming (one forward per call) and batch decoding share one executable.
    """
    module = nnx.merge(graph, params)

    def keep_going(carry: tuple[DecodeState, Array]) -> Array:
        state, forwards = carry
        return is_running(state) & (forwards < max_forwards)

    def forward(carry: tuple[DecodeState, Array]) -> tuple[DecodeState, Array]:
        state, forwards = carry
        return decode_step(module, plan, state), forwards + 1

    return jax.lax.while_loop(keep_going, forward, (state, jnp.int32(0)))[0]


_jit = functools.partial(jax.jit, donate_argnames="state")
run_prefill = _jit(_prefill, static_argnames=("graph", "plan", "num_rows"), compiler_options=INFERENCE_OPTIONS)
run_loop = _jit(_loop, static_argnames=("graph", "plan"), compiler_options=INFERENCE_OPTIONS)
run_prefill_bitwise = _jit(_prefill, static_argnames=("graph", "plan", "num_rows"), compiler_options=BITWISE_OPTIONS)
run_loop_bitwise = _jit(_loop, static_argnames=("graph", "plan"), compiler_options=BITWISE_OPTIONS)


def programs(plan: StepPlan) -> tuple[Callable[..., DecodeState], Callable[..., DecodeState]]:
    """Prefill and loop, with the compiler's options that the plan needs."""
    if plan.group_slots is None:
        return run_prefill, run_loop
    return run_prefill_bitwise, run_loop_bitwise
