"""The host stays ahead of the device."""

import itertools

import numpy as np

from benchmarks.host_time import Later, StandIn, measure
from idlm_jax.decoding import ISD, SamplingParams
from idlm_jax.qwen3_sizes import QWEN3_SIZES
from serve.config import EngineConfig
from serve.device import Draws
from serve.engine import Engine
from serve.packing import layout_of
from tests.serve.conftest import CONFIG


def test_a_step_of_32_requests_costs_the_host_little():
    """0.3 to 0.6 ms of processor time on the development machine without the type checks that tests switch on."""
    config = EngineConfig(method=ISD(stride=4), max_running=32, num_pages=2048)
    found = measure(config, QWEN3_SIZES["Qwen3-8B"], device_ms=0.0, rounds=2, max_tokens=100)
    assert found.num_steps > 50
    assert found.median_ms < 10.0


def test_the_next_step_is_launched_before_the_last_one_is_read(lm):
    log: list[tuple[str, int]] = []

    class Logged(StandIn):
        def decode(self, words: np.ndarray, draws: Draws, masks: np.ndarray | None = None, choice: int = 0) -> "Read":
            log.append(("launch", len(log)))
            return Read(super().decode(words, draws, masks, choice), len(log) - 1)

    class Read:
        def __init__(self, outcome: Later, number: int):
            self.outcome, self.number = outcome, number

        def __array__(self) -> np.ndarray:
            log.append(("read", self.number))
            return np.asarray(self.outcome)

    layout = layout_of(CONFIG.limits(lm.config), CONFIG.max_stop_ids, CONFIG.num_biases)
    with Engine(lm, CONFIG, device=Logged(layout, 0.0)) as engine:
        engine.submit([1, 2, 3], SamplingParams(max_tokens=60)).result()
    launches = [at for at, (kind, _) in enumerate(log) if kind == "launch"]
    reads = {number: at for at, (kind, number) in enumerate(log) if kind == "read"}
    assert len(launches) > 10
    # All but the last, which has no successor.
    assert all(after < reads[launch] for launch, after in itertools.pairwise(launches))
