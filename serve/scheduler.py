"""What the next step computes: admission, chunked prefill, reservation of pages, preemption. No JAX.

The invariant of a request that holds a slot:

    committed slots  = what the device is known to have written for good (`context_len`): all but the last token
    reserved slots   = what forwards that nobody has read yet, and the next one, may commit and may write as drafts
    its pages hold   = committed + reserved, and no more; rows that can count for nothing share the sink (`Limits.span`)

Rejected drafts and MASK rows lie in the reserve. They are never freed: the length does not advance over them, and the
next forward overwrites them. A request in its prefill reserves its whole prompt.

Steps run one ahead of what is known: while step t is planned, the outcome of step t - 1 is still unread.
"""

import itertools
from collections import deque
from collections.abc import Callable, Sequence

from serve.pages import PagePool
from serve.requests import Chunk, Limits, Phase, QueueFull, Request, Step, Window


class Scheduler:
    """Decides; whoever drives it calls `plan`, runs the step, and reports what came of every part that is not void."""

    def __init__(self, limits: Limits, choose: Callable[[int], int] = lambda num_decoding: 0):
        """An empty schedule.

        Args:
            limits: sizes to plan within.
            choose: which of the `limits.windows` the next step has, from how many requests decode.

        Raises:
            ValueError: no prefill shape is for one request.
        """
        smallest = min(rows for _, rows in limits.prefill_shapes)
        if smallest < 1 or not any(requests == 1 for requests, _ in limits.prefill_shapes):
            raise ValueError(f"{limits.prefill_shapes=} must hold a shape for one request, and no empty rows")
        self.limits, self._choose = limits, choose
        self.pool = PagePool(limits.num_pages, limits.page_size, caches_prefixes=limits.caches_prefixes)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in order of arrival, the order in which pages are kept
        self.num_preemptions = 0
        self.num_prompt_tokens = 0
        self.num_cached_tokens = 0
        self._free_slots = list(reversed(range(limits.num_slots)))

    @property
    def is_idle(self) -> bool:
        return not self.waiting and not self.running

    def add(self, request: Request) -> None:
        """Queues a request.

        Raises:
            ValueError: it could not run even if it were alone.
            QueueFull: too many requests are waiting.
        """
        self.check_fits(request.prompt_len, request.end - request.prompt_len)
        if len(self.waiting) >= self.limits.max_queued:
            raise QueueFull(f"{len(self.waiting)} requests are waiting, the most allowed")
        self.waiting.append(request)

    def check_fits(self, prompt_len: int, max_tokens: int) -> None:
        """Raises ValueError if a request of this size could not run even if it were alone."""
        longest = self.longest_request
        if prompt_len < 1 or max_tokens < 1:
            raise ValueError(f"a prompt of {prompt_len} tokens and max_tokens={max_tokens}: both must be at least 1")
        if prompt_len + max_tokens > longest:
            raise ValueError(
                f"a prompt of {prompt_len} tokens and max_tokens={max_tokens} exceed the {longest} tokens of a request"
            )

    @property
    def longest_request(self) -> int:
        """Most tokens of a request, prompt and completion; the pool must hold them and room for drafts."""
        room = self.pool.num_usable * self.limits.page_size
        return min(self.limits.max_len, room - self.limits.span(0))

    def plan(self) -> Step | None:
        """The next step, or None if there is nothing to compute before earlier steps are read."""
        num_decoding = sum(request.phase is Phase.DECODE for request in self.running)
        choice = self._choose(max(1, num_decoding))
        rows = self.limits.windows[choice].rows
        windows = self._plan_windows(rows)
        self._admit()
        shape, chunks = self._plan_chunks(self.limits.max_step_rows - len(windows) * rows)
        if not windows and not chunks:
            return None
        for window in windows:
            window.request.in_flight += 1
        for chunk in chunks:
            chunk.request.in_flight += chunk.commits
            chunk.request.has_unread_prefill = chunk.is_last
        return Step(choice, windows, shape, chunks)

    def read_chunk(self, chunk: Chunk) -> None:
        """The chunk is in its pages. If it commits, `read_forward` follows."""
        chunk.request.has_unread_prefill &= not chunk.is_last
        self._publish(chunk.request, chunk.start + chunk.num_tokens)

    def read_forward(self, request: Request, tokens: Sequence[int], *, num_drafts: int, is_finished: bool) -> None:
        """A window, or the end of a prompt, has committed `tokens`.

        Args:
            request: it still holds the slot.
            tokens: at least one, unless forwards work on blocks.
            num_drafts: that it left for the next forward to verify.
            is_finished: whether these are its last; its slot and its pages are free from now on.
        """
        request.in_flight -= 1
        request.tokens += tokens
        request.num_drafts = num_drafts
        assert (tokens or self.limits.block_length) and len(request.tokens) <= request.end
        self._publish(request, len(request.tokens) - 1)
        if is_finished:
            self._leave(request, Phase.DONE)

    def abort(self, request: Request) -> None:
        """Drops a request wherever it is; its slot and pages are free at once. Nothing happens if it is done.

        A forward that is still running may write to those pages: it was launched before any that reads them, and it
        writes behind every page that others can share.
        """
        if request.phase is Phase.WAITING:
            if request in self.waiting:
                self.waiting.remove(request)
            request.phase = Phase.DONE
        elif request.phase is not Phase.DONE:
            self._leave(request, Phase.DONE)

    def _plan_windows(self, rows: int) -> list[Window]:
        windows = []
        # Oldest first; whoever needs a page takes it from the youngest.
        for request in list(self.running):
            # Every forward in flight commits a token at least; of a block, it may: the last one then waits to be sure.
            is_over = len(request.tokens) + request.in_flight >= request.end
            if request.phase is not Phase.DECODE or is_over:
                continue
            if request.is_stepwise and (request.in_flight or request.has_unread_prefill):
                continue
            # At most: forwards in flight may have had another stride than this one.
            context_len = len(request.tokens) - 1 + request.in_flight * self.limits.stride
            first = len(request.pages)
            missing = self.limits.pages_for(request, context_len + rows) - first
            if missing > 0:
                pages = self._take_pages(missing, request)
                if pages is None:
                    continue  # it was itself the youngest
                request.pages += pages
            windows.append(Window(request, request.epoch, first, request.pages[first:]))
        return windows

    def _take_pages(self, num_pages: int, request: Request) -> list[int] | None:
        """Pages for `request`, at the cost of younger ones; None if that ended with its own preemption."""
        while (pages := self.pool.allocate(num_pages)) is None:
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is request:
                return None
        return pages

    def _preempt(self, request: Request) -> None:
        """Throws away its keys and values, but not its tokens: a prefill over them restores the same state."""
        self._leave(request, Phase.WAITING)
        request.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.appendleft(request)

    def _leave(self, request: Request, phase: Phase) -> None:
        self.running.remove(request)
        self._free_slots.append(request.slot)
        self.pool.release(request.pages)
        request.phase, request.slot, request.pages = phase, -1, []
        request.epoch += 1
        request.in_flight = request.prefilled = request.num_published = 0
        request.has_unread_prefill = False

    def _admit(self) -> None:
        """First come, first served: nobody overtakes a request that waits for pages."""
        while self.waiting and self._free_slots:
            request = self.waiting[0]
            size, prompt_len = self.limits.page_size, request.prefill_len
            # The last token must be computed, for its logits.
            num_full = 0 if request.reads_whole_prompt else (prompt_len - 1) // size
            pages = self.pool.match(request.page_keys(num_full, size))
            # The prompt, and the first window behind it.
            missing = max(self.limits.pages_for(request, prompt_len + self.limits.window_len) - len(pages), 0)
            # A page to grow for everybody who runs, or the newcomer would soon be preempted.
            if self.pool.num_available < missing + len(self.running):
                self.pool.release(pages)
                return
            new = self.pool.allocate(missing)
            assert new is not None
            self.waiting.popleft()
            request.pages, request.num_published = pages + new, len(pages)
            request.prefilled = request.num_cached_tokens = len(pages) * size
            self.num_prompt_tokens += prompt_len
            self.num_cached_tokens += request.num_cached_tokens
            request.slot = self._free_slots.pop()
            request.phase = Phase.PREFILL
            # Those preempted come back to the head of the queue, hence to their place by age.
            self.running.append(request)
            self.running.sort(key=lambda each: each.number)

    def _plan_chunks(self, max_rows: int) -> tuple[tuple[int, int], list[Chunk]]:
        """As many prompts as can be finished together; else the first one alone, as far as a chunk goes."""
        queue = [request for request in self.running if request.phase is Phase.PREFILL]
        if not queue:
            return (0, 0), []
        left = [request.prefill_len - request.prefilled for request in queue]
        shapes = [shape for shape in self.limits.prefill_shapes if shape[0] * shape[1] <= max_rows]
        # Nobody starves because others decode.
        smallest = min((rows, requests) for requests, rows in self.limits.prefill_shapes if requests == 1)
        shapes = shapes or [(smallest[1], smallest[0])]

        def num_served(shape: tuple[int, int]) -> int:
            together = itertools.takewhile(lambda tokens: tokens <= shape[1], left[: shape[0]])
            return max(1, len(list(together)))

        def worth(shape: tuple[int, int]) -> tuple[int, int]:
            """Prompt tokens read, then as few rows as possible."""
            return sum(min(tokens, shape[1]) for tokens in left[: num_served(shape)]), -shape[0] * shape[1]

        shape = max(shapes, key=worth)
        chunks = []
        for request, tokens in zip(queue[: num_served(shape)], left, strict=False):
            num_tokens = min(tokens, shape[1])
            is_last = num_tokens == tokens
            restored = request.tokens[-1] if is_last and request.is_resumed else None
            chunks.append(Chunk(request, request.epoch, request.prefilled, num_tokens, is_last, restored))
            request.prefilled += num_tokens
            if is_last:
                request.phase = Phase.DECODE
        return shape, chunks

    def _publish(self, request: Request, num_committed: int) -> None:
        """Lets others find the pages that `num_committed` tokens fill."""
        num_pages = num_committed // self.limits.page_size
        if num_pages > request.num_published:
            keys = request.page_keys(num_pages, self.limits.page_size)
            for index in range(request.num_published, num_pages):
                self.pool.publish(request.pages[index], keys[index])
            request.num_published = num_pages

    def check(self) -> None:
        """Raises AssertionError if an invariant is broken. For tests."""
        limits, size = self.limits, self.limits.page_size
        self.pool.check([request.pages for request in self.running])
        slots = [request.slot for request in self.running]
        assert sorted(slots + self._free_slots) == list(range(limits.num_slots))
        assert all(not request.pages and request.slot < 0 for request in self.waiting)
        prefix_of: dict[int, tuple[int, ...]] = {}
        for request in self.running:
            published = request.num_published * size
            if request.phase is Phase.PREFILL:
                committed = min(request.prefilled, request.prefill_len)
                reserve = request.prefill_len + limits.window_len - committed
            else:
                committed = len(request.tokens) - (limits.block_length is None)
                reserve = max(request.in_flight, 1) * limits.stride + limits.window_len
            assert published <= committed, "a page of uncommitted tokens was published"
            held = len(request.pages)
            assert held <= limits.pages_for(request, committed + reserve), "pages beyond the reserve"
            assert held >= limits.pages_for(request, committed), "committed tokens without a page"
            for index, page in enumerate(request.pages):
                # The same page of two requests holds the same committed tokens, and the same ones before them.
                prefix = tuple(request.tokens[: (index + 1) * size]) if index * size < published else (-request.number,)
                assert prefix_of.setdefault(page, prefix) == prefix, "a provisional page is shared"
