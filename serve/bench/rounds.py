"""Which target is asked when: round by round, so that what drifts (clocks, neighbours, heat) meets all alike."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence

from serve.bench.client import Answer, Client, Failure
from serve.bench.load import Load
from serve.bench.prompts import Prompt

WARM_UP = 0  # the round that is not counted


@dataclasses.dataclass
class Run:
    """One load on one target, once. It is filled while it goes on, so that an interruption leaves what was done.

    Attributes:
        load: label of the load.
        target: name of the endpoint.
        round: from 1; 0 is the warm-up.
        first: prompt of request 0, counted on from the first of the file and over its end.
        records: of the requests that ended, in that order.
        seconds: from the first request to the last answer.
        client_cpu_s: what the load generator itself used of the processor.
        is_complete: False after an interruption.
    """

    load: str
    target: str
    round: int
    first: int = 0
    records: list[Answer | Failure] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    client_cpu_s: float = 0.0
    is_complete: bool = False

    @property
    def answers(self) -> list[Answer]:
        return [record for record in self.records if isinstance(record, Answer)]

    @property
    def failures(self) -> list[Failure]:
        return [record for record in self.records if isinstance(record, Failure)]


def schedule(loads: Sequence[Load], num_rounds: int, targets: Sequence[str]) -> Iterator[tuple[int, int, str]]:
    """Yields (place of the load, round, target): per load a warm-up and the rounds, the order turning every round."""
    for place in range(len(loads)):
        for number in range(num_rounds + 1):
            for target in targets if number % 2 else reversed(targets):
                yield place, number, target


async def run_rounds(
    clients: Sequence[Client],
    loads: Sequence[Load],
    prompts: Sequence[Prompt],
    runs: list[Run],
    *,
    num_rounds: int,
    num_prompts: int,
    seed: int,
    on_record: Callable[[Run], None],
) -> None:
    """Runs everything and appends to `runs`, each before it begins.

    A round takes the next `num_prompts` prompts of the file, the same ones for every target: a server that remembers
    prompts must not find those of the round before. After the last prompt comes the first.

    Args:
        clients: of the targets, in the order named.
        loads: the points to measure.
        prompts: of the file.
        runs: where the results go.
        num_rounds: counted ones.
        num_prompts: requests of a run.
        seed: of the arrival times, which are the same for every target.
        on_record: called after each request.
    """
    by_name = {client.endpoint.name: client for client in clients}
    for place, number, target in schedule(loads, num_rounds, list(by_name)):
        run = Run(loads[place].label, target, number, (place * (num_rounds + 1) + number) * num_prompts)
        runs.append(run)
        client = by_name[target]
        began, cpu = time.perf_counter(), time.process_time()

        # The loop's variables are bound now; the run ends before they change.
        async def send(request: int, due: float, run=run, client=client, began=began) -> None:
            offset = run.first + request
            prompt = prompts[offset % len(prompts)]
            run.records.append(await client.ask(prompt, number=request, seed=offset, due=due, began=began))
            on_record(run)

        try:
            await loads[place].run(send, num_prompts, [seed, place, number])
            run.is_complete = True
        finally:
            run.seconds = time.perf_counter() - began
            run.client_cpu_s = time.process_time() - cpu
