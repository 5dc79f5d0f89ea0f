"""A request while it is served, the sizes it is served within, and its part in a step. No JAX."""

import dataclasses
import enum
import itertools
from collections.abc import Sequence
from typing import NamedTuple

from serve.pages import ROOT, page_key


class Phase(enum.Enum):
    """Where a request stands."""

    WAITING = enum.auto()
    PREFILL = enum.auto()
    DECODE = enum.auto()
    DONE = enum.auto()


class WindowSize(NamedTuple):
    """What a decode window of one method takes.

    Attributes:
        stride: most tokens that it commits.
        rows: the pending token, drafts and MASKs.
    """

    stride: int
    rows: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Fixed sizes that the scheduler plans within.

    Attributes:
        num_slots: most requests that run at once.
        num_pages: pages of the pool, the sink included.
        page_size: tokens per page.
        windows: of the methods that steps choose from.
        max_len: longest request, prompt and completion.
        prefill_shapes: (requests, rows) of the prefill programs.
        max_step_rows: query rows that decode windows and prefill chunks may add up to. Prompts still advance by the
            smallest shape in a step whose windows fill it.
        max_queued: waiting requests before more are refused.
        caches_prefixes: whether finished requests leave their pages to be found.
        block_length: of block diffusion, whose forwards commit a block or nothing and write the keys and values of
            every token they commit; None for methods that commit with each forward and have a pending token.
    """

    num_slots: int
    num_pages: int
    page_size: int
    windows: tuple[WindowSize, ...]
    max_len: int
    prefill_shapes: tuple[tuple[int, int], ...]
    max_step_rows: int
    max_queued: int
    caches_prefixes: bool = True
    block_length: int | None = None

    @property
    def stride(self) -> int:
        """Most tokens that any forward commits."""
        return max(window.stride for window in self.windows)

    @property
    def window_len(self) -> int:
        """Rows of the longest decode window."""
        return max(window.rows for window in self.windows)

    def span(self, end: int) -> int:
        """Slots in which a request that ends before position `end` may write anything that counts.

        Its last token is never written, except with its block. But MASKs stand behind all drafts and behind MASKs of
        other prefixes: the last row may be the first MASK behind the pending token, which drafts the second token after
        it, and that may be the request's last.
        """
        num_written = end if self.block_length is not None else end - 1
        return num_written + max(max(window.rows - 2, 0) for window in self.windows)

    def pages_for(self, request: "Request", num_slots: int) -> int:
        """Pages of a request that wants to write `num_slots` slots, of which those past its span count for nothing."""
        return -(-min(num_slots, self.span(request.end)) // self.page_size)


class Request:
    """One request as the scheduler sees it. `tokens` is the prompt and every token known to be committed."""

    _numbers = itertools.count()

    def __init__(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        *,
        is_stepwise: bool = False,
        reads_whole_prompt: bool = False,
        has_pending: bool = True,
    ):
        """A request before its admission.

        Args:
            prompt: token ids.
            max_tokens: most tokens to generate.
            is_stepwise: the host must have read a forward before it can plan the next one.
            reads_whole_prompt: its prefill may not skip what the prefix cache holds.
            has_pending: keys and values of its last token are written by the forward after the one that commits it.
        """
        self.is_stepwise, self.reads_whole_prompt, self.has_pending = is_stepwise, reads_whole_prompt, has_pending
        self.number = next(Request._numbers)
        self.tokens = list(prompt)
        self.prompt_len = len(prompt)
        self.end = len(prompt) + max_tokens
        self.phase = Phase.WAITING
        self.slot = -1
        self.pages: list[int] = []
        self.num_published = 0  # of its pages, those whose tokens are committed and can be found by others
        self.prefilled = 0  # prompt tokens in the pages or on their way there
        self.in_flight = 0  # forwards that commit tokens, planned and not yet read
        self.has_unread_prefill = False  # the end of its prompt is planned, and not yet read
        # Counts the slots it has had: what was planned for an earlier one is void.
        self.epoch = 0
        self.num_drafts = 0  # that the last forward read has left to verify
        self.num_cached_tokens = 0  # of its prompt, found in the prefix cache when it was last admitted
        self.num_preemptions = 0
        self._page_keys: list[bytes] = []

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.prompt_len

    @property
    def is_resumed(self) -> bool:
        """Whether its prefill restores a state that was thrown away, so that the token behind it is known."""
        return self.has_pending and self.num_generated > 0

    @property
    def prefill_len(self) -> int:
        """Tokens that its prefill reads. The pending token is not among them: its turn comes in the next window."""
        return len(self.tokens) - self.is_resumed

    def page_keys(self, num_pages: int, page_size: int) -> list[bytes]:
        """Keys of the pages that its first tokens fill."""
        keys = self._page_keys
        for index in range(len(keys), num_pages):
            tokens = self.tokens[index * page_size : (index + 1) * page_size]
            keys.append(page_key(keys[-1] if keys else ROOT, tokens))
        return keys[:num_pages]


@dataclasses.dataclass(frozen=True)
class Planned:
    """A request's part in one step."""

    request: Request
    epoch: int

    @property
    def is_void(self) -> bool:
        """Whether the request has lost the slot for which this was planned: the outcome is nobody's."""
        return self.request.epoch != self.epoch


@dataclasses.dataclass(frozen=True)
class Chunk(Planned):
    """A stretch of one prompt."""

    start: int
    num_tokens: int
    is_last: bool
    # The pending token behind a prompt that is read again; None to commit a new one.
    restored: int | None

    @property
    def commits(self) -> bool:
        """Whether the forward commits a token."""
        return self.is_last and self.restored is None


@dataclasses.dataclass(frozen=True)
class Window(Planned):
    """One request in a decode batch."""

    first_new_page: int  # place in its page table
    new_pages: Sequence[int]  # pages reserved since its last forward


@dataclasses.dataclass(frozen=True)
class Step:
    """One step: a decode batch, then a prefill batch; either may be empty, not both.

    Attributes:
        choice: which of the `Limits.windows` the decode batch has, and the prefill batch drafts for.
        windows: the decode batch.
        prefill_shape: of the prefill batch.
        chunks: the prefill batch.
    """

    choice: int
    windows: list[Window]
    prefill_shape: tuple[int, int]
    chunks: list[Chunk]


class QueueFull(Exception):
    """Too many requests are waiting."""
