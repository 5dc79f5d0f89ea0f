"""What is saved is what comes back, and no more is kept than was asked for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.checkpoint import Checkpoints


def state_at(step: int):
    return {"step": jnp.int32(step), "params": {"w": jnp.arange(6.0) / 7 + step}}


def test_only_due_steps_are_due_and_only_the_newest_are_kept(tmp_path):
    with Checkpoints(tmp_path, save_every=2, keep=2) as checkpoints:
        due = [step for step in range(1, 9) if checkpoints.is_due(step)]
        assert due == [2, 4, 6, 8]
        for step in due:
            checkpoints.save(step, state_at(step))
        checkpoints.save(9, state_at(9))  # the last step of a run saves although it is not due
        checkpoints.save(9, state_at(9))
        checkpoints.wait()
        assert checkpoints.steps == [8, 9]
    with Checkpoints(tmp_path, save_every=2, keep=2) as reopened:
        assert reopened.latest_step == 9


def test_state_comes_back_bit_for_bit_though_it_was_donated_during_the_save(tmp_path):
    state = state_at(3)
    with Checkpoints(tmp_path, save_every=1, keep=1) as checkpoints:
        checkpoints.save(3, state)
        jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)(state)
    with Checkpoints(tmp_path, save_every=1, keep=1) as checkpoints:
        restored, _ = checkpoints.restore(state_at(0))
    for one, other in zip(jax.tree.leaves(restored), jax.tree.leaves(state_at(3)), strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.dtype == other.dtype and one.sharding == other.sharding


def test_an_unfinished_save_is_no_checkpoint_and_is_swept_away(tmp_path):
    with Checkpoints(tmp_path, save_every=1, keep=3) as checkpoints:
        checkpoints.save(1, state_at(1))
    complete = tmp_path / "checkpoints" / "1"
    unfinished = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp"
    complete.rename(unfinished)
    with Checkpoints(tmp_path, save_every=1, keep=3) as checkpoints:
        assert checkpoints.latest_step == 0
        checkpoints.save(2, state_at(2))  # Orbax sweeps in the background, before it saves
        checkpoints.wait()
        assert checkpoints.steps == [2]
    assert not unfinished.exists()


def test_arrays_of_another_shape_are_refused(tmp_path):
    with Checkpoints(tmp_path, save_every=1, keep=1) as checkpoints:
        checkpoints.save(1, state_at(1))
        checkpoints.wait()
        wrong = {"step": jnp.int32(0), "params": {"w": jnp.zeros(7)}}
        with pytest.raises(ValueError, match=r"params/w: saved \(6,\), wanted \(7,\)"):
            checkpoints.restore(wrong)
