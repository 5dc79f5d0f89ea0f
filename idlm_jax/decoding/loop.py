"""The compiled entry points: prefill, and the whole decode loop as one program with donated state."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int

from idlm_jax.decoding.method import StepPlan
from idlm_jax.decoding.state import DecodeState
from idlm_jax.decoding.step import decode_step, is_running, prefill
from idlm_jax.model.transformer import INFERENCE_OPTIONS, Qwen3


@functools.partial(
    jax.jit,
    static_argnames=("graph", "plan", "num_rows"),
    donate_argnames="state",
    compiler_options=INFERENCE_OPTIONS,
)
def run_prefill(
    graph: nnx.GraphDef[Qwen3], params: nnx.State, plan: StepPlan, state: DecodeState, num_rows: int
) -> DecodeState:
    """`prefill` compiled; `state` is donated."""
    return prefill(nnx.merge(graph, params), plan, state, num_rows)


@functools.partial(
    jax.jit, static_argnames=("graph", "plan"), donate_argnames="state", compiler_options=INFERENCE_OPTIONS
)
def run_loop(
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
