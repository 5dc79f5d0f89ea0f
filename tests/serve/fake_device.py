"""A device without arithmetic: it remembers what every page slot holds, so that a wrong page is found when it is read.

Its model is a hash: the next token is a function of all tokens before it, so what a request must become is known.
"""

import random
import zlib
from collections.abc import Sequence
from typing import NamedTuple

from serve.pages import SINK
from serve.requests import Chunk, Limits, Request, Step, Window, WindowSize

STOP = 0
DRAFTED = ("draft",)


def next_token(tokens: Sequence[int]) -> int:
    number = zlib.crc32(bytes(tokens))
    return STOP if number % 32 == 0 else 1 + number % 6


def completion(prompt: Sequence[int], max_tokens: int) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_tokens:
        tokens.append(next_token(tokens))
        if tokens[-1] == STOP:
            break
    return tokens[len(prompt) :]


class Result(NamedTuple):
    tokens: list[int]
    num_drafts: int
    is_finished: bool


class Slot:
    def __init__(self, tokens: list[int], end: int, table: list[int]):
        self.tokens, self.end, self.table = tokens, end, table
        self.is_running = False
        self.num_drafts = 0


class FakeDevice:
    """Runs steps in order, at once; the driver reads their results when it likes."""

    def __init__(self, limits: Limits, seed: int):
        self.limits = limits
        self.rng = random.Random(seed)
        self.slots: dict[int, Slot] = {}
        self.memory: dict[tuple[int, int], tuple[int, ...] | tuple[str]] = {}

    def run(self, step: Step) -> list[Result]:
        windows = [self.run_window(window, self.limits.windows[step.choice]) for window in step.windows]
        return windows + [self.run_chunk(chunk, step.prefill_shape[1]) for chunk in step.chunks]

    def run_window(self, window: Window, size: WindowSize) -> Result:
        slot = self.slots[window.request.slot]
        slot.num_drafts = min(slot.num_drafts, size.stride - 1)
        for place, page in enumerate(window.new_pages, window.first_new_page):
            self.set_page(slot, place, page)
        context_len = len(slot.tokens) - 1
        self.check_reads(slot, context_len)
        # What each row predicts. MASKs follow the drafts, behind any of their prefixes and in any order.
        predicted = [draft + 1 for draft in range(slot.num_drafts + 1)]
        masks_behind = [0] * len(predicted)
        for _ in range(size.rows - len(predicted)):
            prefix = self.rng.randrange(len(masks_behind))
            if masks_behind[prefix] < size.stride - 1:
                masks_behind[prefix] += 1
                predicted.append(prefix + masks_behind[prefix] + 1)
        for row, predicts in enumerate(predicted):
            if slot.is_running and context_len + predicts < slot.end:
                assert self.where(slot, context_len + row)[0] != SINK, "a row that may count lies in the sink"
        self.write(slot, context_len, slot.tokens[-1:], size.rows - 1)
        if not slot.is_running:
            return Result([], False, True)
        accepted = self.rng.randint(0, slot.num_drafts)
        tokens = self.commit(slot, accepted + 1)
        self.write(slot, context_len, slot.tokens[context_len:-1] if tokens else [], 0)
        slot.num_drafts = masks_behind[accepted]
        return Result(tokens, slot.num_drafts, not slot.is_running)

    def run_chunk(self, chunk: Chunk, rows: int) -> Result:
        request = chunk.request
        read = request.tokens[: chunk.start + chunk.num_tokens]
        slot = self.slots[request.slot] = Slot(read, request.end, [])
        for place, page in enumerate(request.pages):
            self.set_page(slot, place, page)
        self.check_reads(slot, chunk.start)
        padding = rows - chunk.num_tokens + self.limits.stride - 1
        self.write(slot, chunk.start, read[chunk.start :], padding)
        if not chunk.is_last:
            return Result([], False, False)
        slot.is_running = True
        if chunk.restored is not None:
            slot.tokens = [*read, chunk.restored]
            slot.num_drafts = min(request.num_drafts, self.limits.stride - 1)
            return Result([], slot.num_drafts, False)
        tokens = self.commit(slot, 1)
        slot.num_drafts = self.limits.stride - 1
        return Result(tokens, slot.num_drafts, not slot.is_running)

    def commit(self, slot: Slot, most: int) -> list[int]:
        tokens: list[int] = []
        while len(tokens) < most and slot.is_running:
            tokens.append(next_token(slot.tokens))
            slot.tokens = [*slot.tokens, tokens[-1]]
            slot.is_running = tokens[-1] != STOP and len(slot.tokens) < slot.end
        return tokens

    def set_page(self, slot: Slot, place: int, page: int) -> None:
        assert place <= len(slot.table), "a hole in a page table"
        slot.table[place : place + 1] = [page]

    def where(self, slot: Slot, position: int) -> tuple[int, int]:
        place, offset = divmod(position, self.limits.page_size)
        return (slot.table[place] if place < len(slot.table) else SINK), offset

    def write(self, slot: Slot, start: int, clean: list[int], num_drafts: int) -> None:
        for position in range(start, start + len(clean) + num_drafts):
            is_clean = position < start + len(clean)
            self.memory[self.where(slot, position)] = tuple(slot.tokens[: position + 1]) if is_clean else DRAFTED

    def check_reads(self, slot: Slot, context_len: int) -> None:
        for position in range(context_len):
            place = self.where(slot, position)
            assert place[0] != SINK, "a committed token lies in the sink"
            assert self.memory[place] == tuple(slot.tokens[: position + 1]), (
                "a page does not hold what its reader thinks"
            )


def report(scheduler, step: Step, results: list[Result]) -> list[Request]:
    """Tells the scheduler what came of a step, and returns the requests that ended."""
    ended = []
    for planned, result in zip([*step.windows, *step.chunks], results, strict=True):
        if planned.is_void:
            continue
        if isinstance(planned, Chunk):
            scheduler.read_chunk(planned)
            if not planned.commits:
                continue
        scheduler.read_forward(
            planned.request, result.tokens, num_drafts=result.num_drafts, is_finished=result.is_finished
        )
        if result.is_finished:
            ended.append(planned.request)
    return ended
