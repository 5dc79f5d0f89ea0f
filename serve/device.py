"""The compiled half of the engine: slot state on the device, donated from step to step, and a fixed set of programs.

Every program is compiled before the first request and called as an executable, which cannot compile again: a shape that
was not foreseen is an error. The length of a context is in no shape.
"""

import enum
import functools
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.stages import Compiled, Lowered
from jaxtyping import Array, Int, UInt

from idlm_jax.decoding.loop import BITWISE_OPTIONS
from idlm_jax.decoding.method import Method, StepPlan, check_mask_id, step_plan
from idlm_jax.decoding.pacing import Pacer
from idlm_jax.decoding.sampling import SamplingParams
from idlm_jax.decoding.shaping import Shaping, empty_shaping, read_prompt
from idlm_jax.decoding.state import Counts, DecodeState, Finish, initial_state
from idlm_jax.decoding.step import decode_window, prefill_chunk
from idlm_jax.model.kv_cache import empty_cache
from idlm_jax.model.language_model import LanguageModel
from idlm_jax.model.transformer import INFERENCE_OPTIONS, Qwen3
from pallas_kernels.verify import Sampling
from serve.config import EngineConfig
from serve.grammar import mask_words
from serve.mesh import mesh_of, placed, state_shardings, whole
from serve.packing import (
    Layout,
    Prompts,
    decode_words,
    layout_of,
    pack_outcome,
    pack_windows,
    prefill_words,
    unpack_chunks,
    unpack_windows,
)

Kind = Literal["decode", "prefill"]
# Decode programs are timed where there is a choice; in rounds, since the first steps of a program take a third longer.
TIMED_ROUNDS, TIMED_S, TIMED_STEPS = 4, 0.05, 20  # seconds of a round, and its most steps

Progress = Callable[[int, int, str], None]  # programs compiled, all programs, what was compiled


class Draws(enum.IntEnum):
    """How much a step has to do with its logits; a program for more also does less."""

    GREEDY = 0
    PLAIN = 1  # some temperature
    FILTERED = 2  # top-k or top-p besides
    FULL = 3  # log-probabilities, biases, penalties, grammars besides: whatever the engine was built to serve


def draws_of(params: SamplingParams, *, has_grammar: bool = False) -> Draws:
    """What one request needs."""
    if params.logprobs is not None or params.is_shaped or has_grammar:
        return Draws.FULL
    if params.temperature == 0:
        return Draws.GREEDY
    return Draws.FILTERED if params.top_k > 0 or params.top_p < 1.0 else Draws.PLAIN


class Device:
    """Runs decode batches and prefill batches on slots; calls return at once, results are read when wanted.

    `pacer` knows how long the methods of a menu take at each batch size; None if there is but one.
    """

    def __init__(self, lm: LanguageModel, config: EngineConfig, progress: Progress | None = None):
        """Compiles every program, on all cores, and lays out an idle state.

        Args:
            lm: the model; one that was loaded on a mesh is served by all its devices.
            config: sizes and choices.
            progress: called after each program.

        Raises:
            ValueError: the method needs a MASK id and the model has none, the mesh does not fit the model (`mesh_of`),
                or the bit-for-bit mode is asked of a mesh or of windows that are wider than its tiles.
        """
        check_mask_id(config.method, lm.config.mask_token_id)
        mesh = mesh_of(lm)
        is_bitwise = config.group_slots is not None
        if is_bitwise and mesh is not None:
            raise ValueError(f"{config.deterministic=} serves on one device, and the model was loaded on {mesh.size}")
        limits = config.limits(lm.config)
        menu = config.method.menu
        self.layout = layout_of(limits, config.max_stop_ids, config.num_biases, is_bitwise=is_bitwise)
        self._leaves, tree = jax.tree.flatten(lm.params)
        self._shapes, self._num_mask_words = config.shapes, mask_words(lm.config.vocab_size)
        self._num_anchors = [method.num_masks + 1 for method in menu]
        levels = _levels(config)
        plans = {
            (level, choice): _plan(lm, config, method, level, mesh)
            for level in levels
            for choice, method in enumerate(menu)
        }
        # The most drafts; a prefill has one group of MASKs whatever the rows.
        widest = max(range(len(menu)), key=lambda choice: menu[choice].num_masks)

        def make_state() -> DecodeState:
            keeps_confidence = any(plan.places_masks for plan in plans.values())
            return _idle_state(lm, config, plans[levels[-1], widest], self.layout, keeps_confidence=keeps_confidence)

        state = jax.eval_shape(make_state)
        everywhere = state_where = step_where = None  # on the default device
        if mesh is not None:
            # The state leaves a step as it came: nothing is laid out anew, and every part of the pool stays in place.
            everywhere, state_where = whole(mesh), state_shardings(state, mesh)
            state, step_where = placed(state, state_where), (state_where, everywhere)
        lowered: dict[Any, Lowered] = {"idle state": jax.jit(make_state, out_shardings=state_where).lower()}

        def lower(kind: Kind, shape: tuple[int, int], level: Draws, choice: int) -> Lowered:
            body = _run_windows if kind == "decode" else _run_chunks
            program = functools.partial(body, lm.graph, tree, plans[level, choice], self.layout)
            words = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=everywhere)
            masks = jax.ShapeDtypeStruct(self._mask_shape(kind, shape[0], choice), jnp.uint32, sharding=everywhere)
            shaped = (masks,) if self._takes_masks(level) else ()
            options = BITWISE_OPTIONS if is_bitwise else INFERENCE_OPTIONS
            step = jax.jit(program, donate_argnums=1, out_shardings=step_where, compiler_options=options)
            return step.lower(self._leaves, state, words, *shaped)

        windows: list[tuple[Kind, tuple[int, int], Draws, int]] = [
            ("decode", (batch, decode_words(self.layout)), level, choice)
            for batch in config.decode_buckets
            for level in levels
            for choice in range(len(menu))
        ]
        # A prefill gives a slot to its request with all that it may want, and few of its rows end in logits: one
        # program for whatever is drawn. A shorter window verifies the first of the drafts for the longest; AR none.
        self._drafts_for = [choice if method.num_masks == 0 else widest for choice, method in enumerate(menu)]
        chunks: list[tuple[Kind, tuple[int, int], Draws, int]] = [
            ("prefill", (config.whole_groups(requests), prefill_words(self.layout, rows)), levels[-1], choice)
            for requests, rows in limits.prefill_shapes
            for choice in sorted(set(self._drafts_for))
        ]
        lowered |= {name: lower(*name) for name in windows + chunks}
        programs = _compile(lowered, progress)
        self._make_state = programs.pop("idle state")
        self._programs = programs
        self._levels = levels
        self._no_masks = {
            shape: jnp.full(shape, 0xFFFFFFFF, jnp.uint32, device=everywhere)
            for shape in {
                self._mask_shape(kind, shape[0], choice)
                for kind, shape, level, choice in programs
                if self._takes_masks(level)
            }
        }
        self._state: DecodeState = self._make_state()
        self.pacer = Pacer(menu) if len(menu) > 1 else None
        if self.pacer is not None:
            for batch in config.decode_buckets:
                rounds = [[self._time(batch, choice) for choice in range(len(menu))] for _ in range(TIMED_ROUNDS)]
                for choice, seconds in enumerate(zip(*rounds, strict=True)):
                    self.pacer.set_seconds(batch, choice, min(seconds))

    def decode(self, words: np.ndarray, draws: Draws, masks: np.ndarray | None = None, choice: int = 0) -> jax.Array:
        """One window for each packed slot; int32 [batch, words] to read later.

        Args:
            words: from `pack_windows`.
            draws: the most that any of them wants.
            masks: uint32 [batch, M + 1, W], the ids that each anchor permits, for FULL draws; None permits all.
            choice: which method of the menu.
        """
        return self._run("decode", words, draws, masks, choice)

    def prefill(self, words: np.ndarray, masks: np.ndarray | None = None, choice: int = 0) -> jax.Array:
        """One stretch of a prompt for each packed slot; int32 [requests, words] to read later.

        Args:
            words: from `pack_chunks`.
            masks: uint32 [requests, 1, W], for the first token of each completion; None permits all.
            choice: which method of the menu to draft for.
        """
        return self._run("prefill", words, self._levels[-1], masks, self._drafts_for[choice])

    def reset(self) -> None:
        """An idle state in place of one that a failed step has consumed."""
        self._state = self._make_state()

    def _run(self, kind: Kind, words: np.ndarray, draws: Draws, masks: np.ndarray | None, choice: int) -> jax.Array:
        level = next(level for level in self._levels if level >= draws)
        shaped = ()
        if self._takes_masks(level):
            # A step without grammars uploads nothing.
            shaped = (self._no_masks[self._mask_shape(kind, len(words), choice)] if masks is None else masks,)
        program = self._programs[kind, words.shape, level, choice]
        self._state, outcome = program(self._leaves, self._state, words, *shaped)
        outcome.copy_to_host_async()
        return outcome

    def _time(self, batch: int, choice: int) -> float:
        """Seconds of a decode step over idle slots, launched one behind the other as the engine does.

        A step that is waited for takes longer, by as much for AR as for a long window: that would flatter the latter.
        """
        words = pack_windows(self.layout, [], [], batch)

        def seconds_of(steps: int) -> float:
            start = time.perf_counter()
            outcomes = [self.decode(words, self._levels[0], choice=choice) for _ in range(steps)]
            np.asarray(outcomes[-1])
            return time.perf_counter() - start

        steps = min(max(round(TIMED_S / seconds_of(1)), 2), TIMED_STEPS)
        return seconds_of(steps) / steps

    def _takes_masks(self, level: Draws) -> bool:
        return self._shapes and level is Draws.FULL

    def _mask_shape(self, kind: Kind, batch: int, choice: int) -> tuple[int, int, int]:
        return batch, self._num_anchors[choice] if kind == "decode" else 1, self._num_mask_words


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


def _levels(config: EngineConfig) -> list[Draws]:
    """What decode programs are compiled for, ascending."""
    levels = [Draws.GREEDY, Draws.PLAIN, Draws.FILTERED] if config.specialised else []
    if config.max_logprobs is not None or config.shapes:
        levels.append(Draws.FULL)
    elif not config.specialised:
        levels.append(Draws.FILTERED)
    # With a menu there are as many programs a level as methods: the simplest, and one that does everything.
    return [levels[0], levels[-1]] if len(config.method.menu) > 1 and len(levels) > 2 else levels


def _plan(lm: LanguageModel, config: EngineConfig, method: Method, level: Draws, mesh: Mesh | None = None) -> StepPlan:
    return step_plan(
        method,
        lm.config.mask_token_id,
        filtered=level >= Draws.FILTERED,
        all_greedy=level is Draws.GREEDY,
        num_top_logprobs=config.max_logprobs if level is Draws.FULL else None,
        mesh=mesh,
        group_slots=config.group_slots,
    )


def _idle_state(
    lm: LanguageModel, config: EngineConfig, plan: StepPlan, layout: Layout, *, keeps_confidence: bool = False
) -> DecodeState:
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
        shaping=empty_shaping(slots, lm.config.vocab_size) if config.shapes else None,
        keeps_confidence=keeps_confidence,
    )


def _take(state: DecodeState, slots: Int[Array, " B"], *, shapes: bool) -> DecodeState:
    """Those slots as a batch of their own, over the same pool; their shaping stays behind unless it is used."""
    rest = state._replace(cache=None, shaping=state.shaping if shapes else None)
    return jax.tree.map(lambda x: x[slots], rest)._replace(cache=state.cache)


def _put(state: DecodeState, slots: Int[Array, " B"], taken: DecodeState, batch: DecodeState) -> DecodeState:
    """The inverse of `_take`, which gave `taken`. Rows of the idle slot may collide: it stays idle whichever wins.

    What is still what was taken is not written back. XLA would: a dozen scatters, one launch each, in a step of AR.
    """
    is_shaped = batch.shaping is not None
    rest = state._replace(cache=None, shaping=state.shaping if is_shaped else None)
    rest = jax.tree.map(
        lambda x, old, new: x if new is old else x.at[slots].set(new),
        rest,
        taken._replace(cache=None),
        batch._replace(cache=None),
    )
    return rest._replace(cache=batch.cache, shaping=rest.shaping if is_shaped else state.shaping)


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
    masks: UInt[Array, "B C mask"] | None = None,
) -> tuple[DecodeState, Int[Array, "B out"]]:
    """Hands out new pages and runs one window of each named slot; `state` is donated."""
    new = unpack_windows(layout, words)
    table = state.page_table.at[new.slot[:, None], new.place].set(new.page, mode="drop")
    state = state._replace(page_table=table)
    taken = batch = _take(state, new.slot, shapes=masks is not None)
    if masks is not None:
        # Drafts that a grammar has put in place of those that were drawn, where it leaves no choice.
        is_given = new.num_drafts >= 0
        batch = batch._replace(
            proposals=jnp.where(is_given[:, None], new.drafts, batch.proposals),
            num_proposals=jnp.where(is_given, new.num_drafts, batch.num_proposals),
        )
    batch, committed = decode_window(_merge(graph, tree, leaves), plan, batch, masks)
    return _put(state, new.slot, taken, batch), pack_outcome(batch, committed)


def _run_chunks(
    graph: nnx.GraphDef[Qwen3],
    tree: Any,
    plan: StepPlan,
    layout: Layout,
    leaves: Sequence[Array],
    state: DecodeState,
    words: Int[Array, "B words"],
    masks: UInt[Array, "B 1 mask"] | None = None,
) -> tuple[DecodeState, Int[Array, "B out"]]:
    """Gives each named slot to a request and reads a stretch of its prompt; `state` is donated.

    A request whose keys and values were thrown away is restored as it was: its prefill stops before its pending token,
    so the MASKs stand where those of its last forward stood and draft the same tokens. How many of them it had, and its
    pending token, must be told.
    """
    prompts = unpack_chunks(layout, words)
    taken = _take(state, prompts.slot, shapes=masks is not None)
    batch = taken._replace(
        context_len=prompts.start + prompts.num_tokens - 1,
        end=prompts.end,
        stop_ids=prompts.stop_ids,
        finish=jnp.where(prompts.is_last, jnp.int32(Finish.RUNNING), jnp.int32(Finish.LENGTH)),
        num_proposals=jnp.zeros_like(prompts.slot),
        sampling=prompts.sampling,
        counts=Counts(*(jnp.zeros_like(count) for count in taken.counts)),
        page_table=prompts.page_table,
    )
    if batch.shaping is not None:
        batch = batch._replace(shaping=_shaping_of(batch.shaping, prompts))
    module = _merge(graph, tree, leaves)
    batch, committed = prefill_chunk(
        module, plan, batch, prompts.tokens, prompts.start, known=prompts.restored, allowed=masks
    )
    num_restored = jnp.minimum(prompts.num_drafts, plan.num_masks)
    batch = batch._replace(num_proposals=jnp.where(prompts.restored >= 0, num_restored, batch.num_proposals))
    return _put(state, prompts.slot, taken, batch), pack_outcome(batch, committed)


def _shaping_of(before: Shaping, prompts: Prompts) -> Shaping:
    """What the requests want, and what has been read of them."""
    shaping = read_prompt(
        before, prompts.tokens, prompts.num_tokens[:, None], prompts.start[:, None], prompts.prompt_len[:, None]
    )
    row = jnp.arange(len(prompts.slot), dtype=jnp.int32)[:, None]
    vocab_size = shaping.bias.shape[1]
    at = jnp.where(prompts.bias_ids >= 0, prompts.bias_ids, vocab_size)  # one past the end is dropped
    bias = jnp.zeros_like(shaping.bias).at[jnp.broadcast_to(row, at.shape), at].add(prompts.biases, mode="drop")
    return shaping._replace(wishes=prompts.wishes, bias=bias)
