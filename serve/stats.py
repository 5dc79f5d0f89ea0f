"""The engine's numbers at one moment."""

import dataclasses

from serve.handle import FinishReason
from serve.packing import Tally


@dataclasses.dataclass(frozen=True)
class EngineStats:
    """Where the engine stands, and what it has done since it started.

    Attributes:
        num_running: requests with a slot.
        num_waiting: requests without one.
        num_free_pages: pages that could be handed out now, those of the prefix cache included.
        num_cached_pages: pages that only the prefix cache holds.
        num_steps: steps launched.
        num_decode_forwards: decode programs run, one per step at most.
        num_decode_forwards_by_method: the same by the name of the method that was chosen.
        num_prefill_forwards: prefill programs run.
        num_committed: tokens committed and delivered.
        finished: requests by reason.
        num_preemptions: slots taken away for lack of pages.
        num_prompt_tokens: prompt tokens of admitted requests; those read again after a preemption count again.
        num_cached_tokens: how many of them the prefix cache had.
        tally: statistics of all requests, ended or running; forwards are counted per request.
    """

    num_running: int
    num_waiting: int
    num_free_pages: int
    num_cached_pages: int
    num_steps: int
    num_decode_forwards: int
    num_decode_forwards_by_method: dict[str, int]
    num_prefill_forwards: int
    num_committed: int
    finished: dict[FinishReason, int]
    num_preemptions: int
    num_prompt_tokens: int
    num_cached_tokens: int
    tally: Tally
