"""The decode loop of a method that is "auto": stretches of forwards, each of the method that now is the fastest.

The host chooses between stretches, so each stretch is the compiled loop of a fixed method over the same donated state.
Whatever is chosen, the tokens are the same: greedy, and sampled too, since "auto" verifies by coupling.
"""

import time
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from idlm_jax.decoding.loop import programs
from idlm_jax.decoding.method import StepPlan
from idlm_jax.decoding.pacing import Pacer
from idlm_jax.decoding.state import DecodeState, Finish
from idlm_jax.model.language_model import LanguageModel

STRETCH = 16  # forwards between choices: one read of a few numbers each
TRIAL = 4  # forwards by which a method is timed; they decode like all others


def run_auto(lm: LanguageModel, plans: Sequence[StepPlan], pacer: Pacer, state: DecodeState) -> DecodeState:
    """Decodes until every slot is done, as `stretches`."""
    for after in stretches(lm, plans, pacer, state, longest=STRETCH):
        state = after
    return state


def stretches(
    lm: LanguageModel, plans: Sequence[StepPlan], pacer: Pacer, state: DecodeState, *, longest: int
) -> Iterator[DecodeState]:
    """Decodes until every slot is done, and yields the state after each stretch: read it before asking for the next.

    The first stretches at a batch size time each method once, after it was compiled.

    Args:
        lm: the model.
        plans: of the methods in the pacer's menu.
        pacer: keeps what it has seen from one batch to the next.
        state: behind its prefill, with room for the longest of the plans; donated.
        longest: forwards of a stretch.
    """
    batch = len(state.finish)
    _, run_loop = programs(plans[0])
    before = _progress(state)
    untimed = [index for index in range(len(plans)) if not pacer.is_timed(batch, index)]
    for index in untimed:
        state = run_loop(lm.graph, lm.params, plans[index], state, jnp.int32(0))  # compiles
    while np.any(before["finish"] == Finish.RUNNING):
        index, length = (untimed.pop(0), min(TRIAL, longest)) if untimed else (pacer.choose(batch, longest), longest)
        start = time.perf_counter()
        state = run_loop(lm.graph, lm.params, plans[index], state, jnp.int32(length))
        after = _progress(state)
        seconds = time.perf_counter() - start
        new = {name: after[name] - before[name] for name in ("forwards", "context_len", "verified", "accepted")}
        seconds /= new["forwards"].max()
        if pacer.is_timed(batch, index):
            pacer.follow_seconds(batch, index, seconds)
        else:
            pacer.set_seconds(batch, index, seconds)
        pacer.observe(
            index,
            int(new["forwards"].sum()),
            int(new["context_len"].sum()),
            new["verified"].sum(0).tolist(),
            new["accepted"].sum(0).tolist(),
        )
        before = after
        yield state


def _progress(state: DecodeState) -> dict[str, np.ndarray]:
    counts = state.counts
    return jax.device_get(
        {
            "finish": state.finish,
            "context_len": state.context_len,
            "forwards": counts.forwards,
            "verified": counts.verified,
            "accepted": counts.accepted,
        }
    )
