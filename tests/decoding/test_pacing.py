"""What the pacer chooses, against what it would choose if it knew everything. No JAX."""

import math
import random

import pytest

from idlm_jax.decoding import pacing
from idlm_jax.decoding.chain import tokens_per_forward
from idlm_jax.decoding.method import ISD, Method
from idlm_jax.decoding.pacing import CONSIDER_EVERY, LONG_SHOT_EVERY, PROBE_EVERY, PROBE_FORWARDS, Pacer

MENU = ISD(stride="auto", branches="auto", max_stride=4).menu
WINDOWS = 4


class World:
    """Forwards that end where drafts of a given quality make them end, in a time that is hard to read.

    A tenth of noise, a machine that wanders, and now and then a pause.
    """

    def __init__(self, acceptance: float, seconds_per_row: float, seed: int = 0):
        self.acceptance, self.seconds_per_row = acceptance, seconds_per_row
        self.rng = random.Random(seed)
        self.num_drafts = [0] * WINDOWS
        self.slowness = 0.0

    def seconds(self, index: int) -> float:
        """What they would take without."""
        return 1.0 + self.seconds_per_row * MENU[index].window_len

    def measured(self, index: int) -> float:
        self.slowness = 0.98 * self.slowness + self.rng.gauss(0, 0.02)
        pause = 3.0 if self.rng.random() < 0.01 else 1.0
        return self.seconds(index) * pause * math.exp(self.slowness + self.rng.gauss(0, 0.1))

    def masks_behind(self, method: Method, num_drafts: int) -> list[int]:
        """Of each prefix: those that are most likely to be of use, of drafts that are all alike."""
        ends = [self.acceptance**prefix * (1 - self.acceptance) for prefix in range(num_drafts)]
        ends.append(self.acceptance**num_drafts)
        worth = {(at, d): ends[at] * self.acceptance**d for at in range(len(ends)) for d in range(method.num_masks)}
        chosen = sorted(worth, key=lambda mask: -worth[mask])[: method.window_len - 1 - num_drafts]
        return [sum(prefix == at for at, _ in chosen) for prefix in range(len(ends))]

    def forward(self, pacer: Pacer, index: int) -> tuple[int, float]:
        method = MENU[index]
        num_tokens, verified, accepted = 0, [0] * 3, [0] * 3
        for window, num_drafts in enumerate(self.num_drafts):
            drafts = min(num_drafts, method.num_masks)
            good = 0
            while good < drafts and self.rng.random() < self.acceptance:
                good += 1
            num_tokens += good + 1
            for depth in range(3):
                verified[depth] += depth < min(drafts, good + 1)
                accepted[depth] += depth < good
            self.num_drafts[window] = self.masks_behind(method, drafts)[good]
        pacer.observe(index, WINDOWS, num_tokens, verified, accepted)
        if pacer.is_timed(WINDOWS, index):
            pacer.follow_seconds(WINDOWS, index, self.measured(index))
        return num_tokens, self.seconds(index)


def rate(world: World, pacer: Pacer, num: int, fixed: int | None = None) -> float:
    tokens, seconds = zip(
        *(world.forward(pacer, pacer.choose(WINDOWS) if fixed is None else fixed) for _ in range(num)), strict=True
    )
    return sum(tokens) / sum(seconds)


def timed(world: World, error: float = 0.1) -> Pacer:
    """A pacer that was told, before the first forward, what they take; not quite."""
    pacer = Pacer(MENU)
    for index in range(len(MENU)):
        pacer.set_seconds(WINDOWS, index, world.seconds(index) * math.exp(world.rng.gauss(0, error)))
    return pacer


# AR far ahead, just ahead, level; drafts just ahead, far ahead; rows for nothing.
WORLDS = [
    *((0.05, 0.02), (0.6, 0.3), (0.9, 0.02), (0.9, 1.0)),
    *(pytest.param(*each, marks=pytest.mark.proof) for each in ((0.6, 0.45), (0.4, 0.1), (0.4, 0.0))),
]


@pytest.mark.parametrize(("acceptance", "seconds_per_row"), WORLDS)
def test_it_is_as_fast_as_the_best_fixed_method_and_as_ar(acceptance, seconds_per_row):
    fixed = [rate(World(acceptance, seconds_per_row), Pacer(MENU), 2000, fixed=index) for index in range(len(MENU))]
    world = World(acceptance, seconds_per_row, seed=1)
    pacer = timed(world)
    assert rate(world, pacer, 1000) > 0.97 * fixed[0]  # while it learns
    assert rate(world, pacer, 4000) > 0.98 * max(fixed)


@pytest.mark.parametrize(("acceptance", "seconds_per_row"), [(0.6, 0.3), (0.57, 0.3)])
def test_ar_that_was_timed_half_too_slow_is_back_soon(acceptance, seconds_per_row):
    world = World(acceptance, seconds_per_row, seed=1)
    pacer = Pacer(MENU)
    for index in range(len(MENU)):
        pacer.set_seconds(WINDOWS, index, world.seconds(index) * (1.5 if index == 0 else 1.0))
    assert pacer.choose(WINDOWS) != 0
    ar = rate(World(acceptance, seconds_per_row), Pacer(MENU), 2000, fixed=0)
    assert rate(world, pacer, 2000) > 0.95 * ar
    assert rate(world, pacer, 2000) > 0.98 * ar


def test_chains_are_followed_anew_only_when_enough_of_the_drafts_are_new(monkeypatch):
    followed = []
    monkeypatch.setattr(pacing, "tokens_per_forward", lambda chain: followed.append(chain) or tokens_per_forward(chain))
    pacer = timed(World(0.5, 0.1))

    def look(num_drafts: int) -> int:
        before = len(followed)
        pacer.observe(1, num_drafts, num_drafts, [num_drafts, 0, 0], [num_drafts // 2, 0, 0])
        pacer.rates(WINDOWS)
        return len(followed) - before

    assert look(3200) == len(MENU)
    assert [look(60), look(20), look(60)] == [0, 0, len(MENU)]


def test_it_notices_that_drafts_have_become_better_while_it_ran_ar():
    world = World(0.02, 0.1)
    pacer = timed(world)
    rate(world, pacer, 4000)
    assert pacer.choose(WINDOWS) == 0
    world.acceptance = 0.95
    rate(world, pacer, 60 * PROBE_EVERY)
    assert MENU[pacer.choose(WINDOWS)].num_masks == 3


def test_ar_is_seldom_left_where_drafts_are_bad():
    world = World(0.02, 0.1)
    pacer = timed(world)
    rate(world, pacer, 4000)
    chosen = []
    num_probes = 4 * LONG_SHOT_EVERY
    for _ in range(num_probes * PROBE_EVERY):
        chosen.append(pacer.choose(WINDOWS))
        world.forward(pacer, chosen[-1])
    assert 0 < sum(index != 0 for index in chosen) <= num_probes // LONG_SHOT_EVERY * PROBE_FORWARDS


def test_nothing_is_probed_that_could_not_win_with_perfect_drafts():
    world = World(0.02, 10.0)
    pacer = timed(world)
    assert [pacer.could_win(WINDOWS, index) for index in range(len(MENU))] == [True, *[False] * 5]
    assert {pacer.choose(WINDOWS) for _ in range(3 * LONG_SHOT_EVERY * PROBE_EVERY)} == {0}


def test_a_guess_is_not_enough_to_leave_ar():
    """Seconds at rest say that two more rows cost a third more, and a guessed 0.7 of drafts would be accepted."""
    pacer = Pacer(MENU)
    for index in range(len(MENU)):
        pacer.set_seconds(WINDOWS, index, 1.0 + 0.15 * (MENU[index].window_len - 1))
    assert max(pacer.rates(WINDOWS).values(), key=lambda rate: rate.log).log > 0.1
    assert pacer.choose(WINDOWS) == 0


# The second is so far ahead at the start that nothing seems worth a probe; AR has one all the same, now and then.
@pytest.mark.parametrize(("claimed", "num_probes"), [(0.6, 16), (0.35, 64)])
def test_a_probe_tells_what_a_method_takes(claimed, num_probes):
    """Timed at a part of what it takes, N=2 runs at first; then its steps are compared with AR's."""
    world = World(0.6, 0.6)
    pacer = timed(world, error=0.0)
    pacer.set_seconds(WINDOWS, 1, claimed * world.seconds(1))
    assert pacer.choose(WINDOWS) == 1
    rate(world, pacer, num_probes * PROBE_EVERY + 2 * PROBE_FORWARDS)
    assert pacer.choose(WINDOWS) == 0
    found = pacer.seconds(WINDOWS)
    assert found[1] / found[0] == pytest.approx(world.seconds(1) / world.seconds(0), rel=0.1)


def test_a_step_that_turns_out_slower_than_timed_is_left():
    world = World(0.9, 0.0)
    pacer = timed(world)
    rate(world, pacer, 1000)
    first = pacer.choose(WINDOWS)
    for _ in range(20 * PROBE_EVERY):
        index = pacer.choose(WINDOWS)
        pacer.follow_seconds(WINDOWS, index, 5.0 if index == first else 1.0)
    assert first not in [pacer.choose(WINDOWS) for _ in range(2 * CONSIDER_EVERY)][CONSIDER_EVERY:]


def test_a_machine_that_slows_down_slows_all_methods_down():
    pacer = timed(World(0.9, 0.0), error=0.0)
    before = pacer.seconds(WINDOWS)
    for _ in range(200):
        pacer.follow_seconds(WINDOWS, 3, 1.9)  # 1.0 before
    after = pacer.seconds(WINDOWS)
    assert after[3] == pytest.approx(1.9, rel=0.02)
    relative = [after[index] / before[index] for index in range(len(MENU))]
    # Of a slowdown by 90 %, a few per cent are held against the method that ran.
    assert min(relative) > 0.93 * max(relative)


def test_one_pause_changes_little():
    pacer = timed(World(0.9, 0.0), error=0.0)
    for _ in range(64):
        pacer.follow_seconds(WINDOWS, 3, 1.0)
    before = pacer.seconds(WINDOWS)[3]
    for seconds in [1000.0] + [1.0] * 7:
        pacer.follow_seconds(WINDOWS, 3, seconds)
    assert pacer.seconds(WINDOWS)[3] < 1.01 * before


def test_batch_sizes_have_their_own_times():
    pacer = timed(World(0.5, 0.1))
    with pytest.raises(KeyError):
        pacer.choose(16)
