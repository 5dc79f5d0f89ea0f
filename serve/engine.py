"""The engine: one thread that plans a step, launches it, and reads the one before while the device computes.

The committed length that the scheduler knows, the pages it has given out and the device's `context_len` move together:
the device may be ahead by what is in flight, which the scheduler has reserved for; it is never behind.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from idlm_jax.decoding.method import method_name
from idlm_jax.decoding.pacing import Pacer
from idlm_jax.decoding.prompts import Prompt
from idlm_jax.decoding.sampling import SamplingParams
from idlm_jax.decoding.state import Finish
from idlm_jax.model.language_model import LanguageModel
from serve.admission import admit
from serve.choosing import Choosing
from serve.config import EngineConfig
from serve.device import Device, Progress
from serve.grammar import Matcher, mask_words
from serve.handle import EngineError, FinishReason, Piece, RequestHandle
from serve.packing import (
    Outcome,
    layout_of,
    no_tally,
    pack_chunks,
    pack_windows,
    unpack_logprobs,
    unpack_outcome,
)
from serve.requests import Chunk, Phase, QueueFull, Request, Window
from serve.runs import Launched, Runs
from serve.scheduler import Scheduler
from serve.stats import EngineStats

logger = logging.getLogger(__name__)

REASONS: dict[int, FinishReason | None] = {Finish.RUNNING: None, Finish.STOP: "stop", Finish.LENGTH: "length"}


class Engine:
    """Continuous batching of one model. `submit`, `stats` and `close` may be called from any thread."""

    def __init__(
        self,
        lm: LanguageModel,
        config: EngineConfig,
        *,
        progress: Progress | None = None,
        device: Runs | None = None,
        pacer: Pacer | None = None,
        after_step: Callable[[Scheduler], None] | None = None,
    ):
        """Compiles everything and starts the thread.

        Args:
            lm: the model.
            config: sizes and choices.
            progress: called after each compiled program.
            device: what runs the steps; compiled for `lm` if None.
            pacer: what chooses the method of each step where the config's leaves a choice: that of `Device`, which has
                timed them. Without one it is always the first of the menu.
            after_step: called in the engine's thread after each step; an exception counts as one of the step.

        Raises:
            ValueError: the sizes do not fit the model, or ISD is asked of a model without a MASK id.
        """
        limits = config.limits(lm.config)
        self._lm, self._config = lm, config
        is_bitwise = config.group_slots is not None
        self._layout = layout_of(limits, config.max_stop_ids, config.num_biases, is_bitwise=is_bitwise)
        if device is None:
            device = compiled = Device(lm, config, progress)
            pacer = compiled.pacer
        self._device = device
        self._choosing = Choosing(limits, config.decode_buckets, pacer)
        self._scheduler = Scheduler(limits, self._choosing.choose)
        self._after_step = after_step
        self._handles: dict[int, RequestHandle] = {}
        self._no_tally = no_tally(self._layout.num_masks)
        self._ended = self._no_tally
        self._finished: Counter[FinishReason] = Counter()
        self._num_steps = self._num_prefills = self._num_committed = 0
        self._num_decodes = [0] * len(limits.windows)
        # Between callers and the engine's thread, under `_wake`: requests to add or, with False, to abort.
        self._wake = threading.Condition()
        self._inbox: list[tuple[RequestHandle, bool]] = []
        self._num_arriving = 0
        self._flushes = False
        self._closing: Literal["drain", "abort"] | None = None
        self._broken: str | None = None
        # When the thread last came round; None while it has nothing to do.
        self._came_round: float | None = None
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def submit(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        *,
        matcher: Matcher | None = None,
        deliver: Callable[[Piece], None] | None = None,
    ) -> RequestHandle:
        """Queues a request.

        Args:
            prompt: token ids, or text if the model has a tokenizer.
            sampling: what it wants; greedy by default.
            matcher: a fresh place in a grammar, which every committed token then obeys. What comes next is known only
                when the tokens before are, so such a request takes part in every second step at most.
            deliver: takes each piece, in the engine's thread, so it must only pass it on; by default pieces wait in
                the handle, to be iterated.

        Raises:
            ValueError: the prompt or the parameters are out of bounds.
            QueueFull: too many requests are waiting.
            EngineError: the engine is closed.
        """
        params = SamplingParams() if sampling is None else sampling
        request, words, constraint = admit(
            self._lm, self._config, self._layout, self._scheduler, prompt, params, matcher
        )
        handle = RequestHandle(request, params, words, constraint, self._ask_abort, deliver, self._no_tally)
        with self._wake:
            if self.failure is not None:
                raise EngineError(self.failure)
            num_waiting = len(self._scheduler.waiting) + self._num_arriving
            if num_waiting >= self._config.max_queued:
                raise QueueFull(f"{num_waiting} requests are waiting, the most allowed")
            self._num_arriving += 1
            self._inbox.append((handle, True))
            self._wake.notify()
        return handle

    def stats(self) -> EngineStats:
        """A snapshot, possibly of different moments within a step."""
        scheduler = self._scheduler
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting) + self._num_arriving,
            num_free_pages=scheduler.pool.num_available,
            num_cached_pages=scheduler.pool.num_cached,
            num_steps=self._num_steps,
            num_decode_forwards=sum(self._num_decodes),
            num_decode_forwards_by_method={
                method_name(method): count
                for method, count in zip(self._config.method.menu, self._num_decodes, strict=True)
            },
            num_prefill_forwards=self._num_prefills,
            num_committed=self._num_committed,
            finished=dict(self._finished),
            num_preemptions=scheduler.num_preemptions,
            num_prompt_tokens=scheduler.num_prompt_tokens,
            num_cached_tokens=scheduler.num_cached_tokens,
            tally=sum((handle.tally for handle in list(self._handles.values())), self._ended),
        )

    @property
    def failure(self) -> str | None:
        """Why the engine takes no requests any more, if it does not."""
        return self._broken or ("the engine is closed" if self._closing else None)

    @property
    def stalled_s(self) -> float:
        """Seconds since the thread last came round, if requests wait for it: a device that hangs does not say so."""
        came_round = self._came_round
        return 0.0 if came_round is None else time.monotonic() - came_round

    @property
    def longest_request(self) -> int:
        """Most tokens of a request, prompt and completion."""
        return self._scheduler.longest_request

    def flush_cache(self) -> None:
        """Forgets all cached prefixes, at the next step."""
        with self._wake:
            self._flushes = True
            self._wake.notify()

    def close(self, *, drain: bool = True, timeout_s: float | None = None) -> bool:
        """Refuses new requests, finishes those that are there, or aborts them, and ends the thread.

        Returns whether it has ended; with a timeout, a device that hangs keeps it.
        """
        with self._wake:
            self._closing = "drain" if drain else "abort"
            self._wake.notify()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close(drain=exception[0] is None)

    def _ask_abort(self, handle: RequestHandle) -> None:
        with self._wake:
            self._inbox.append((handle, False))
            self._wake.notify()

    def _work(self) -> None:
        """The engine's thread. Nobody may wait for ever because it ended."""
        try:
            self._loop()
        except Exception as error:
            logger.exception("the engine failed and is closed")
            self._break(f"the engine failed: {type(error).__name__}: {error}")

    def _loop(self) -> None:
        before: Launched | None = None
        while self._broken is None:
            with self._wake:
                while before is None and self._scheduler.is_idle:
                    if self._inbox or self._flushes or self._closing:
                        break
                    self._came_round = None
                    self._choosing.pause()
                    self._wake.wait()
                self._came_round = time.monotonic()
                inbox, self._inbox, self._num_arriving = self._inbox, [], 0
                flushes, self._flushes = self._flushes, False
                for handle, is_new in inbox:
                    if is_new:
                        self._handles[handle.request.number] = handle
                        self._scheduler.waiting.append(handle.request)
                closing = self._closing
            for handle, is_new in inbox:
                if not is_new:
                    self._drop(handle, Piece([], "abort"))
            if flushes:
                self._scheduler.pool.forget()
            if closing == "abort":
                for handle in list(self._handles.values()):
                    self._drop(handle, Piece([], "abort"))
            if closing and before is None and self._scheduler.is_idle:
                return
            before = self._step(before)

    def _step(self, before: Launched | None) -> Launched | None:
        """Launches a step and reads the one before it. An exception fails the requests that have a slot, no others."""
        try:
            launched = self._launch()
            if before is not None:
                self._read(before)
            elif launched is None and not self._scheduler.is_idle:
                raise RuntimeError("requests are left and there is nothing to compute")
            if self._after_step is not None:
                self._after_step(self._scheduler)
            return launched
        except Exception as error:
            logger.exception("a step failed; the requests in it fail with it")
            self._recover(error)
            return None

    def _recover(self, error: Exception) -> None:
        """Starts over with an idle device: its state went into the failed step, and so did all cached prefixes."""
        message = f"a step failed: {type(error).__name__}: {error}"
        for handle in list(self._handles.values()):
            if handle.request.phase is not Phase.WAITING:
                self._drop(handle, Piece([], "error", message))
        self._scheduler.pool.forget()
        try:
            self._device.reset()
        except Exception as second:
            logger.exception("the device does not come back; the engine is closed")
            self._break(f"{message}; and the device does not come back: {type(second).__name__}: {second}")

    def _break(self, message: str) -> None:
        """Refuses newcomers from now on and fails everybody who is left."""
        with self._wake:
            self._broken = message
            self._handles |= {handle.request.number: handle for handle, is_new in self._inbox if is_new}
            self._inbox, self._num_arriving = [], 0
        self._scheduler = Scheduler(self._scheduler.limits, self._choosing.choose)
        for handle in list(self._handles.values()):
            self._end(handle, Piece([], "error", message))

    def _drop(self, handle: RequestHandle, last: Piece) -> None:
        """Ends a request before its time, unless it has ended already."""
        if self._handles.get(handle.request.number) is handle:
            self._scheduler.abort(handle.request)
            self._end(handle, last)

    def _end(self, handle: RequestHandle, last: Piece) -> None:
        assert last.finish_reason is not None
        del self._handles[handle.request.number]
        self._ended += handle.tally
        self._finished[last.finish_reason] += 1
        self._deliver(handle, last)

    def _deliver(self, handle: RequestHandle, piece: Piece) -> None:
        try:
            handle.deliver(piece)
        except Exception:
            # A caller who cannot take his tokens must not stop those of others.
            logger.exception("request %d: its tokens cannot be delivered", handle.request.number)
            if piece.finish_reason is None:
                self._drop(handle, Piece([], "abort"))

    def _launch(self) -> Launched | None:
        step = self._scheduler.plan()
        if step is None:
            return None
        self._num_steps += 1
        windows = chunks = None
        if step.windows:
            self._num_decodes[step.choice] += 1
            batch = self._choosing.bucket(len(step.windows))
            stride = self._scheduler.limits.windows[step.choice].stride
            masks, drafts = self._constraints(step.windows, (batch, stride))
            words = pack_windows(self._layout, step.windows, drafts, batch)
            draws = max(self._handles[window.request.number].draws for window in step.windows)
            windows = self._device.decode(words, draws, masks, step.choice)
        if step.chunks:
            self._num_prefills += 1
            fixed = [self._handles[chunk.request.number].fixed_words for chunk in step.chunks]
            batch, rows = self._config.whole_groups(step.prefill_shape[0]), step.prefill_shape[1]
            words = pack_chunks(self._layout, step.chunks, fixed, (batch, rows))
            masks, _ = self._constraints(step.chunks, (batch, 1))
            chunks = self._device.prefill(words, masks, step.choice)
        return Launched(step, windows, chunks)

    def _constraints(
        self, planned: Sequence[Window | Chunk], shape: tuple[int, int]
    ) -> tuple[np.ndarray | None, list[list[int] | None]]:
        """Masks of a batch, None where everything is permitted, and the drafts that take the place of drawn ones."""
        found = [self._handles[each.request.number].constraint for each in planned]
        if not any(found):
            return None, [None] * len(planned)
        masks = np.full((*shape, mask_words(self._lm.config.vocab_size)), 0xFFFFFFFF, np.uint32)
        for row, constraint in enumerate(found):
            if constraint is not None:
                masks[row] = constraint.masks[: shape[1]]
        return masks, [None if constraint is None else constraint.drafts for constraint in found]

    def _read(self, launched: Launched) -> None:
        """Waits for a step and hands out what it committed; parts whose request has lost its slot are nobody's."""
        step, outcomes = launched.step, None
        if launched.windows is not None:
            stride = self._scheduler.limits.windows[step.choice].stride
            outcomes = unpack_outcome(self._layout, np.asarray(launched.windows), stride)
        self._choosing.learn(step, outcomes)
        if outcomes is not None:
            for window, outcome in zip(step.windows, outcomes, strict=False):
                if not window.is_void:
                    self._commit(window.request, outcome)
        if launched.chunks is not None:
            outcomes = unpack_outcome(self._layout, np.asarray(launched.chunks), 1)
            for chunk, outcome in zip(launched.step.chunks, outcomes, strict=False):
                if not chunk.is_void:
                    self._scheduler.read_chunk(chunk)
                    self._handles[chunk.request.number].num_extra_forwards += not chunk.is_last
                    if chunk.commits:
                        self._commit(chunk.request, outcome)
                    elif chunk.is_last:
                        chunk.request.num_drafts = len(outcome.drafts)
                        self._follow(self._handles[chunk.request.number], [], outcome.drafts)

    def _commit(self, request: Request, outcome: Outcome) -> None:
        handle = self._handles[request.number]
        handle.count(outcome.tally)
        if outcome.checksums is not None:
            handle.logit_checksums += outcome.checksums
        reason = REASONS[outcome.finish]
        num_top = handle.params.logprobs
        piece = Piece(outcome.tokens, reason, logprobs=None if num_top is None else unpack_logprobs(outcome, num_top))
        self._num_committed += len(outcome.tokens)
        self._scheduler.read_forward(
            request, outcome.tokens, num_drafts=len(outcome.drafts), is_finished=reason is not None
        )
        if reason is None:
            if outcome.tokens:
                self._deliver(handle, piece)
            self._follow(handle, outcome.tokens, outcome.drafts)
        else:
            self._end(handle, piece)

    def _follow(self, handle: RequestHandle, tokens: list[int], drafts: list[int]) -> None:
        """Moves a request on in its grammar."""
        if handle.constraint is None:
            return
        try:
            handle.constraint.follow(tokens, drafts)
        except RuntimeError as error:
            logger.error("request %d: %s", handle.request.number, error)
            self._drop(handle, Piece([], "error", str(error)))
