"""What the load sweep makes of the steps that "auto" ran."""

import pytest

from benchmarks.load_aware import Fixed, Turn, Turns, over_ar_by_steps
from idlm_jax.decoding.method import AR, ISD

AR_STEP, DRAFTING_STEP = 0.010, 0.016


def turn(
    *, num_ar: int, num_drafting: int = 0, num_untold: int = 0, per_window: float = 1.5, host: float = 0.0
) -> Turn:
    """At a batch of 4; tokens of `num_untold` steps of those that draft are not told."""
    found = Turn(host_seconds=host)
    found.steps.update({(4, 0): num_ar, (4, 1): num_drafting})
    found.seconds[4, 0] = [AR_STEP] * num_ar
    found.seconds[4, 1] = [DRAFTING_STEP] * num_drafting
    told = num_drafting - num_untold
    found.windows[1], found.tokens[1], found.untold[1] = 4 * told, int(4 * told * per_window), num_untold
    return found


def test_ar_alone_is_ar():
    assert over_ar_by_steps([turn(num_ar=50), turn(num_ar=70)]) == pytest.approx(1.0)


def test_steps_that_draft_count_by_their_tokens_and_their_seconds():
    """Of 100 steps 10 commit half as much again in 1.6 of the time: tokens of 105 steps of AR in the time of 106."""
    assert over_ar_by_steps([turn(num_ar=90, num_drafting=10)]) == pytest.approx(105 / 106)
    faster = [turn(num_ar=40, num_drafting=5, per_window=2.0), turn(num_ar=50, num_drafting=5, per_window=2.0)]
    assert over_ar_by_steps(faster) == pytest.approx(110 / 106)


def test_a_step_after_a_change_counts_a_token_a_window():
    assert over_ar_by_steps([turn(num_ar=90, num_drafting=10, num_untold=4)]) == pytest.approx((90 + 4 + 9) / 106)


def test_what_choosing_takes_counts_in_full():
    assert over_ar_by_steps([turn(num_ar=100, host=0.02)]) == pytest.approx(1 / 1.02)


def test_a_turn_keeps_account_of_whoever_has_it():
    menu = [AR(), ISD(2)]
    turns = Turns([Fixed(menu, 0), Fixed(menu, 1)])
    assert [turns.choose(4), turns.choose(4, 3)] == [0, 0]
    turns.now, turns.turn = Fixed(menu, 1), Turn()
    assert turns.choose(2) == 1
    turns.follow_seconds(2, 1, 0.5)
    turns.observe(1, 2, 3, [2], [1])
    turns.observe(1, 0, 0, [2], [1])
    now = turns.turn
    assert now.steps == {(2, 1): 1} and now.seconds == {(2, 1): [0.5]}
    assert (now.windows[1], now.tokens[1], now.untold[1]) == (2, 3, 1) and now.host_seconds > 0
