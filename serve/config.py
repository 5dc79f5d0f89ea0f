"""Sizes and choices of one engine, fixed at start-up because programs are compiled for them."""

import dataclasses
from typing import Literal

from idlm_jax.config import ModelConfig
from idlm_jax.decoding.fixed_width import group_slots_of
from idlm_jax.decoding.generate import bucket
from idlm_jax.decoding.method import ISD, BlockDiffusion, Method
from idlm_jax.decoding.sampling import MAX_BIASES
from idlm_jax.model.kv_cache import PAGE_SIZE
from serve.requests import Limits, WindowSize


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What an engine is built for.

    Attributes:
        method: of all requests; with something "auto", chosen for each step. Block diffusion serves neither
            log-probabilities nor `shapes`, and its blocks must divide pages and chunks.
        max_running: requests that run at once; the rest waits.
        num_pages: pages of the KV pool.
        page_size: tokens per page. The kernels are tuned for the default.
        max_len: longest request, prompt and completion; the model's own limit if None.
        decode_batches: batch sizes to compile; by default powers of two up to `max_running`.
        chunk_rows: most prompt tokens that a step reads: of one prompt, or of several short ones together.
        prefill_shapes: (requests, rows) to compile; by default powers of two whose product is at most `chunk_rows`.
        max_step_rows: query rows of one step, decode windows and chunk together; by default no limit but the two.
        max_queued: waiting requests before more are refused.
        max_stop_ids: stop ids of one request, the model's end-of-sequence ids included.
        max_logprobs: most alternatives per token that a request may ask for; None: no log-probabilities are served.
        shapes: serve biases, penalties, floors and grammars.
        specialised: also compile decode programs for steps whose requests are all greedy, use neither top-k nor top-p,
            or nothing beyond these. They are faster, not different.
        caches_prefixes: keep the pages of finished requests for later ones that begin alike.
        deterministic: "bitwise" gives every token the logits that it has in `generate(deterministic="bitwise")`, bit
            for bit, whatever else is served. One device; slower.
    """

    method: Method = dataclasses.field(default_factory=ISD)
    max_running: int = 32
    num_pages: int = 1024
    page_size: int = PAGE_SIZE
    max_len: int | None = None
    decode_batches: tuple[int, ...] = ()
    chunk_rows: int = 512
    prefill_shapes: tuple[tuple[int, int], ...] = ()
    max_step_rows: int | None = None
    max_queued: int = 1024
    max_stop_ids: int = 8
    max_logprobs: int | None = None
    shapes: bool = False
    specialised: bool = True
    caches_prefixes: bool = True
    deterministic: Literal["bitwise"] | None = None

    def __post_init__(self) -> None:
        for name in "max_running page_size chunk_rows max_queued max_stop_ids".split():
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.num_pages < 2:
            raise ValueError(f"{self.num_pages=} must be at least 2: one page is never given to a request")
        if self.max_len is not None and self.max_len < 2:
            raise ValueError(f"{self.max_len=} must be at least 2")
        if self.max_logprobs is not None and not 0 <= self.max_logprobs <= 20:
            raise ValueError(f"{self.max_logprobs=} must be None or lie in 0..20")
        if self.decode_batches and max(self.decode_batches) != self.max_running:
            raise ValueError(f"{self.decode_batches=} must end at {self.max_running=}")
        if self.prefill_shapes and not any(requests == 1 for requests, _ in self.prefill_shapes):
            raise ValueError(f"{self.prefill_shapes=} must hold a shape for one request")
        if isinstance(self.method, BlockDiffusion):
            self._check_blocks(self.method.block_length)
        if self.group_slots is not None and self.page_size != PAGE_SIZE:
            raise ValueError(
                f"{self.page_size=} must be {PAGE_SIZE} with {self.deterministic=}: attention sums by pages"
            )

    def _check_blocks(self, block_length: int) -> None:
        if self.shapes or self.max_logprobs is not None:
            raise ValueError("BlockDiffusion serves no log-probabilities, biases, penalties, floors or grammars")
        # What a cached page or a chunk holds must not depend on tokens behind it.
        rows = [rows for _, rows in self.prefill_shapes or _prefill_shapes(self.chunk_rows, self.max_running)]
        if any(size % block_length for size in (self.page_size, *rows)):
            raise ValueError(f"{block_length=} must divide {self.page_size=} and the rows of each prefill, {rows}")

    @property
    def num_biases(self) -> int:
        """Biases that one request may have."""
        return MAX_BIASES if self.shapes else 0

    @property
    def stride(self) -> int:
        return self.method.num_masks + 1

    @property
    def group_slots(self) -> int | None:
        """As in `StepPlan`."""
        return group_slots_of(self.deterministic)

    def whole_groups(self, requests: int) -> int:
        """Slots of a program for so many requests: more only in the bit-for-bit mode."""
        slots = self.group_slots or 1
        return -(-requests // slots) * slots

    @property
    def decode_buckets(self) -> tuple[int, ...]:
        """Batch sizes of the decode programs, ascending."""
        powers = [1 << exponent for exponent in range((self.max_running - 1).bit_length())]
        sizes = self.decode_batches or (*powers, self.max_running)
        return tuple(sorted({self.whole_groups(size) for size in sizes}))

    def limits(self, model: ModelConfig) -> Limits:
        """The sizes that the scheduler plans within.

        Raises:
            ValueError: `max_len` exceeds the model's positions.
        """
        max_len = model.max_position if self.max_len is None else self.max_len
        if max_len > model.max_position:
            raise ValueError(f"{self.max_len=} exceeds the model's {model.max_position} positions")
        shapes = self.prefill_shapes or _prefill_shapes(self.chunk_rows, self.max_running)
        widest = max(requests * rows for requests, rows in shapes)
        return Limits(
            num_slots=self.max_running,
            num_pages=self.num_pages,
            page_size=self.page_size,
            windows=tuple(WindowSize(method.num_masks + 1, method.window_len) for method in self.method.menu),
            max_len=max_len,
            prefill_shapes=shapes,
            max_step_rows=self.max_step_rows or self.max_running * self.method.window_len + widest,
            max_queued=self.max_queued,
            caches_prefixes=self.caches_prefixes,
            block_length=self.method.block_length if isinstance(self.method, BlockDiffusion) else None,
        )


def _prefill_shapes(chunk_rows: int, max_running: int) -> tuple[tuple[int, int], ...]:
    """Powers of two, fewer requests for longer stretches; 64 rows at least unless the chunk is shorter."""
    longest = bucket(chunk_rows, smallest=1)
    rows = [longest >> shift for shift in range(longest.bit_length()) if longest >> shift >= min(64, longest)]
    return tuple(
        (1 << exponent, each)
        for each in rows
        for exponent in range(max_running.bit_length())
        if (1 << exponent) * each <= longest
    )
