"""The compiled half of the engine: slot state on the device, donated from step to step, and a fixed set of programs.

Every program is compiled before the first request and called as an executable, which cannot compile again: a shape that
was not foreseen is an error. The length of a context is in no shape.
"""

import enum
import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.stages import Compiled, Lowered
from jaxtyping import Array, Int

from idlm_jax.decoding.method import ISD, StepPlan
from idlm_jax.decoding.sampling import SamplingParams
from idlm_jax.decoding.state import Counts, DecodeState, Finish, initial_state
from idlm_jax.decoding.step import decode_window, prefill_chunk
from idlm_jax.model.kv_cache import empty_cache
from idlm_jax.model.language_model import LanguageModel
from idlm_jax.model.transformer import Qwen3
from pallas_kernels.verify import Sampling
from serve.config import EngineConfig
from serve.packing import (
    Layout,
    decode_words,
    layout_of,
    pack_outcome,
    prefill_words,
    unpack_chunks,
    unpack_windows,
)

Progress = Callable[[int, int, str], None]  # programs compiled, all programs, what was compiled


class Draws(enum.IntEnum):
    """How much a step has to do with its logits; a program for more also does less."""

    GREEDY = 0
    PLAIN = 1  # some temperature
    FILTERED = 2  # top-k or top-p besides
    REPORTED = 3  # log-probabilities besides


def draws_of(params: SamplingParams) -> Draws:
    """What one request needs."""
    if params.logprobs is not None:
        return Draws.REPORTED
    if params.temperature == 0:
        return Draws.GREEDY
    return Draws.FILTERED if params.top_k > 0 or params.top_p < 1.0 else Draws.PLAIN


class Device:
    """Runs decode batches and prefill batches on slots; calls return at once, results are read when wanted."""

    def __init__(self, lm: LanguageModel, config: EngineConfig, progress: Progress | None = None):
        """Compiles every program, on all cores, and lays out an idle state.

        Args:
            lm: the model.
            config: sizes and choices.
            progress: called after each program.

        Raises:
            ValueError: ISD is asked of a model without a MASK id.
        """
        if config.method.num_masks and lm.config.mask_token_id is None:
            raise ValueError(f"{config.method} needs a MASK id and this model has none: load it with one, or use AR()")
        limits = config.limits(lm.config)
        self.layout = layout_of(limits, config.max_stop_ids)
        self._leaves, tree = jax.tree.flatten(lm.params)
        levels = [Draws.GREEDY, Draws.PLAIN, Draws.FILTERED] if config.specialised else [Draws.FILTERED]
        if config.max_logprobs is not None:
            levels.append(Draws.REPORTED)
        plans = {level: _plan(lm, config, level) for level in levels}

        def make_state() -> DecodeState:
            return _idle_state(lm, config, plans[Draws.FILTERED], self.layout)

        state = jax.eval_shape(make_state)
        lowered: dict[Any, Lowered] = {"idle state": jax.jit(make_state).lower()}

        def lower(kind: str, shape: tuple[int, int], level: Draws) -> Lowered:
            body = _run_windows if kind == "decode" else _run_chunks
            program = functools.partial(body, lm.graph, tree, plans[level], self.layout)
            words = jax.ShapeDtypeStruct(shape, jnp.int32)
            return jax.jit(program, donate_argnums=1).lower(self._leaves, state, words)

        for level in levels:
            for batch in config.decode_buckets:
                shape = batch, decode_words(self.layout)
                lowered["decode", shape, level] = lower("decode", shape, level)
            for requests, rows in limits.prefill_shapes:
                shape = requests, prefill_words(self.layout, rows)
                lowered["prefill", shape, level] = lower("prefill", shape, level)
        programs = _compile(lowered, progress)
        self._make_state = programs.pop("idle state")
        self._programs = programs
        self._levels = levels
        self._state: DecodeState = self._make_state()

    def decode(self, words: np.ndarray, draws: Draws) -> jax.Array:
        """One window for each packed slot; int32 [batch, words] to read later."""
        return self._run("decode", words, draws)

    def prefill(self, words: np.ndarray, draws: Draws) -> jax.Array:
        """One stretch of a prompt for each packed slot; int32 [requests, words] to read later."""
        return self._run("prefill", words, draws)

    def reset(self) -> None:
        """An idle state in place of one that a failed step has consumed."""
        self._state = self._make_state()

    def _run(self, kind: str, words: np.ndarray, draws: Draws) -> jax.Array:
        level = next(level for level in self._levels if level >= draws)
        self._state, outcome = self._programs[kind, words.shape, level](self._leaves, self._state, words)
        outcome.copy_to_host_async()
        return outcome


def _compile(lowered: dict[Any, Lowered], progress: Progress | None) -> dict[Any, Compiled]:
    """Compiles in threads: the compiler lets go of the interpreter."""
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        running = {name: threads.submit(each.compile) for name, each in lowered.items()}
        compiled = {}
        for name, future in running.items():
            compiled[name] = future.result()
            if progress is not None:
                progress(len(compiled), len(running), " ".join(map(str, name)) if isinstance(name, tuple) else name)
    return compiled


def _plan(lm: LanguageModel, config: EngineConfig, level: Draws) -> StepPlan:
    method, mask_id = config.method, lm.config.mask_token_id
    return StepPlan(
        num_masks=method.num_masks,
        argmax_proposals=isinstance(method, ISD) and method.proposals == "argmax",
        soft_proposals=isinstance(method, ISD) and method.rule == "official",
        filtered=level >= Draws.FILTERED,
        all_greedy=level is Draws.GREEDY,
        num_top_logprobs=config.max_logprobs if level is Draws.REPORTED else None,
        mask_token_id=-1 if mask_id is None else mask_id,
    )


def _idle_state(lm: LanguageModel, config: EngineConfig, plan: StepPlan, layout: Layout) -> DecodeState:
    """All slots done, every page table full of the sink; one slot more than requests, for rows that nobody uses."""
    slots = layout.idle_slot + 1
    ones = np.ones(slots, np.int32)
    sampling = Sampling(
        temperature=jnp.zeros(slots), top_k=jnp.zeros(slots, jnp.int32), top_p=jnp.ones(slots),
        seed=jnp.zeros(slots, jnp.uint32),
    )  # fmt: skip
    return initial_state(
        lm.config,
        plan,
        tokens=np.zeros((slots, 0), np.int32),
        prompt_len=ones,
        end=ones,
        stop_ids=np.full((slots, layout.num_stop_ids), -1, np.int32),
        sampling=sampling,
        paging=(
            jnp.zeros((slots, layout.table_width), jnp.int32),
            empty_cache(lm.config, config.num_pages, config.page_size),
        ),
    )


def _take(state: DecodeState, slots: Int[Array, " B"]) -> DecodeState:
    """Those slots as a batch of their own, over the same pool."""
    rows = {name: jax.tree.map(lambda x: x[slots], value) for name, value in state._asdict().items() if name != "cache"}
    return DecodeState(**rows, cache=state.cache)


def _put(state: DecodeState, slots: Int[Array, " B"], batch: DecodeState) -> DecodeState:
    """The inverse of `_take`. Rows of the idle slot may collide: it stays idle whichever of them wins."""
    rows = {
        name: jax.tree.map(lambda x, new: x.at[slots].set(new), value, getattr(batch, name))
        for name, value in state._asdict().items()
        if name != "cache"
    }
    return DecodeState(**rows, cache=batch.cache)


def _merge(graph: nnx.GraphDef[Qwen3], tree: Any, leaves: Sequence[Array]) -> Qwen3:
    # Flat arguments: flattening nnx.State in Python would cost every call what a small step takes.
    return nnx.merge(graph, jax.tree.unflatten(tree, leaves))


def _run_windows(
    graph: nnx.GraphDef[Qwen3],
    tree: Any,
    plan: StepPlan,
    layout: Layout,
    leaves: Sequence[Array],
    state: DecodeState,
    words: Int[Array, "B words"],
) -> tuple[DecodeState, Int[Array, "B out"]]:
    """Hands out new pages and runs one window of each named slot; `state` is donated."""
    del layout
    new = unpack_windows(words)
    table = state.page_table.at[new.slot[:, None], new.place].set(new.page, mode="drop")
    state = state._replace(page_table=table)
    batch, committed = decode_window(_merge(graph, tree, leaves), plan, _take(state, new.slot))
    return _put(state, new.slot, batch), pack_outcome(batch, committed)


def _run_chunks(
    graph: nnx.GraphDef[Qwen3],
    tree: Any,
    plan: StepPlan,
    layout: Layout,
    leaves: Sequence[Array],
    state: DecodeState,
    words: Int[Array, "B words"],
) -> tuple[DecodeState, Int[Array, "B out"]]:
    """Gives each named slot to a request and reads a stretch of its prompt; `state` is donated.

    A request whose keys and values were thrown away is restored as it was: its prefill stops before its pending token,
    so the MASKs stand where those of its last forward stood and draft the same tokens. Only whether that forward left
    any drafts, and its pending token, must be told.
    """
    prompts = unpack_chunks(layout, words)
    batch = _take(state, prompts.slot)
    batch = batch._replace(
        context_len=prompts.start + prompts.num_tokens - 1,
        end=prompts.end,
        stop_ids=prompts.stop_ids,
        finish=jnp.where(prompts.is_last, jnp.int32(Finish.RUNNING), jnp.int32(Finish.LENGTH)),
        num_proposals=jnp.zeros_like(prompts.slot),
        sampling=prompts.sampling,
        counts=Counts(*(jnp.zeros_like(count) for count in batch.counts)),
        page_table=prompts.page_table,
    )
    batch, committed = prefill_chunk(_merge(graph, tree, leaves), plan, batch, prompts.tokens, prompts.start)
    is_restored = prompts.restored >= 0
    num_restored = jnp.where(prompts.has_drafts, jnp.int32(plan.num_masks), jnp.int32(0))
    batch = batch._replace(
        pending=jnp.where(is_restored, prompts.restored, batch.pending),
        finish=jnp.where(is_restored, jnp.int32(Finish.RUNNING), batch.finish),
        num_proposals=jnp.where(is_restored, num_restored, batch.num_proposals),
    )
    return _put(state, prompts.slot, batch), pack_outcome(batch, committed)
