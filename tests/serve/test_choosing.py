"""An engine whose steps may be of any method says what AR says, and learns how good its drafts are."""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idlm_jax.decoding import AR, ISD, SamplingParams, generate
from idlm_jax.decoding.pacing import Pacer
from serve import device
from serve.config import EngineConfig
from serve.device import Device, Draws
from serve.engine import Engine
from serve.packing import decode_words, layout_of
from tests.decoding.test_coupled import EVERY_PAIR
from tests.serve.conftest import CONFIG
from tests.support.tiny_model import random_prompts

# AR, stride 2 with a branch behind each prefix, stride 4 with two placed ones.
AUTO = dataclasses.replace(
    CONFIG,
    method=ISD(stride="auto", branches=2),
    decode_batches=(4,),
    prefill_shapes=((1, 16),),
    max_logprobs=2,
)
TIGHT = dataclasses.replace(AUTO, num_pages=13)
PROMPTS = random_prompts(24, 40, 11, seed=1)
PARAMS = [
    SamplingParams(max_tokens=16 + seed % 7, temperature=0.5 * (seed % 3), top_k=(seed % 3) * 4, seed=seed)
    for seed in range(24)
]
PARAMS[4] = dataclasses.replace(PARAMS[4], logprobs=2)


class Dice(Pacer):
    """Chooses anything at any time, and remembers what it was told."""

    def __init__(self) -> None:
        super().__init__(AUTO.method.menu)
        for index in range(len(self.menu)):
            self.set_seconds(4, index, 1.0)
        self.chosen: list[int] = []
        self.totals = np.zeros((2, 3), np.int64)

    def choose(self, batch: int, forwards: int = 1) -> int:
        assert batch == 4
        self.chosen.append(EVERY_PAIR[len(self.chosen) % len(EVERY_PAIR)])
        return self.chosen[-1]

    def observe(self, index, forwards, tokens, verified, accepted) -> None:
        self.totals += np.array([verified, accepted])
        super().observe(index, forwards, tokens, verified, accepted)


@pytest.fixture(scope="module")
def compiled(lm) -> Device:
    return Device(lm, AUTO)


@pytest.fixture
def engine_of(lm, compiled) -> Iterator:
    engines = []

    def start(config, pacer) -> Engine:
        compiled.reset()
        engines.append(Engine(lm, config, device=compiled, pacer=pacer, after_step=lambda it: it.check()))
        return engines[-1]

    yield start
    for engine in engines:
        assert engine.close(timeout_s=60.0)


@pytest.mark.parametrize("config", [AUTO, TIGHT], ids=["roomy", "preempting"])
def test_any_sequence_of_methods_says_what_ar_says(lm, engine_of, config):
    dice = Dice()
    engine = engine_of(config, dice)
    handles = [engine.submit(*each) for each in zip(PROMPTS, PARAMS, strict=True)]
    pieces = [list(handle) for handle in handles]
    results = [[token for piece in each for token in piece.token_ids] for each in pieces]
    assert results == [each.token_ids for each in generate(lm, PROMPTS, AR(), PARAMS)]
    [wanted] = generate(lm, PROMPTS[4:5], AR(), PARAMS[4:5])
    reported = [entry for piece in pieces[4] for entry in piece.logprobs or ()]
    assert wanted.logprobs is not None and [entry.token_id for entry in reported] == results[4]
    np.testing.assert_allclose(
        [entry.logprob for entry in reported], [entry.logprob for entry in wanted.logprobs], rtol=1e-4
    )
    stats = engine.stats()
    assert set(dice.chosen) == {0, 1, 2} and all(stats.num_decode_forwards_by_method.values())
    assert sum(stats.num_decode_forwards_by_method.values()) == stats.num_decode_forwards
    assert (stats.num_preemptions > 0) == (config is TIGHT)
    # What the pacer was told is what the device counted, but for windows that ended a request.
    verified, accepted = dice.totals
    assert np.all(accepted <= verified) and np.all(accepted <= stats.tally.accepted)
    assert np.all(verified <= stats.tally.verified)
    assert np.all(stats.tally.verified - verified <= len(PROMPTS))


class Script(Pacer):
    """Chooses as it is told, the last for ever."""

    def __init__(self, *choices: int) -> None:
        super().__init__(AUTO.method.menu)
        self.set_seconds(4, choices[-1], 1.0)
        self.choices = list(choices)

    def choose(self, batch: int, forwards: int = 1) -> int:
        return self.choices.pop(0) if len(self.choices) > 1 else self.choices[0]


@pytest.mark.parametrize(("choices", "cold_starts"), [((2,), 0), ((1,), 0), ((0, 2), 1)])
def test_a_prefill_drafts_for_the_step_it_belongs_to(engine_of, choices, cold_starts):
    # The prefill commits one token of two and one window the other.
    handle = engine_of(AUTO, Script(*choices)).submit(PROMPTS[0][:8], SamplingParams(max_tokens=2))
    assert sum(len(piece.token_ids) for piece in handle) == 2
    assert handle.tally.cold_starts == cold_starts


def test_a_pacer_that_knows_the_times_settles_for_one_method(lm, compiled, engine_of):
    assert compiled.pacer is not None
    assert all(compiled.pacer.is_timed(4, index) for index in range(3))
    pacer = Pacer(AUTO.method.menu)
    for index, seconds in enumerate((1.0, 100.0, 100.0)):
        pacer.set_seconds(4, index, seconds)
    engine = engine_of(AUTO, pacer)
    assert engine.submit(PROMPTS[0], PARAMS[0]).result()[0] == generate(lm, PROMPTS[:1], AR(), PARAMS[:1])[0].token_ids
    by_method = engine.stats().num_decode_forwards_by_method
    assert by_method["AR"] == engine.stats().num_decode_forwards > 0


def num_scatters(lm, config: EngineConfig) -> int:
    """Of a decode step by the first method of the menu, over a state with room for the last."""
    layout = layout_of(config.limits(lm.config), config.max_stop_ids, config.num_biases)
    first, *_, last = (device._plan(lm, config, method, Draws.GREEDY) for method in (AR(), *config.method.menu))
    state = jax.eval_shape(lambda: device._idle_state(lm, config, last, layout))
    leaves, tree = jax.tree.flatten(lm.params)
    step = functools.partial(device._run_windows, lm.graph, tree, first, layout)
    words = jax.ShapeDtypeStruct((4, decode_words(layout)), jnp.int32)
    return str(jax.make_jaxpr(step)(leaves, state, words)).count("= scatter[")


def test_ar_of_a_menu_writes_back_no_more_than_ar_alone_but_that_there_are_no_drafts(lm):
    alone = dataclasses.replace(AUTO, method=AR())
    assert 0 < num_scatters(lm, AUTO) == num_scatters(lm, alone) + 1
