"""What is saved is what comes back, and no more is kept than was asked for."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.tiny_run import tiny_dataset
from train.checkpoint import Checkpoints
from train.data import make_train_iterator


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_dataset(tmp_path_factory.mktemp("checkpoint"))


def batches(dataset: Path):
    return make_train_iterator(dataset, batch_size=2, seed=3, random_block_phase=True)


def state_at(step: int):
    return {"step": jnp.int32(step), "params": {"w": jnp.arange(6.0) / 7 + step}}


def test_only_due_steps_are_due_and_only_the_newest_are_kept(dataset, tmp_path):
    with Checkpoints(tmp_path, save_every=2, keep=2) as checkpoints:
        due = [step for step in range(1, 9) if checkpoints.is_due(step)]
        assert due == [2, 4, 6, 8]
        for step in due:
            checkpoints.save(step, state_at(step), batches(dataset))
        checkpoints.save(9, state_at(9), batches(dataset))  # the last step of a run saves although it is not due
        checkpoints.save(9, state_at(9), batches(dataset))
        checkpoints.wait()
        assert checkpoints.steps == [8, 9]
    with Checkpoints(tmp_path, save_every=2, keep=2) as reopened:
        assert reopened.latest_step == 9


def test_state_and_data_come_back_bit_for_bit_though_both_moved_on_during_the_save(dataset, tmp_path):
    data = batches(dataset)
    for _ in range(3):
        next(data)
    with Checkpoints(tmp_path, save_every=1, keep=1) as checkpoints:
        checkpoints.save(3, state_at(3), data)
        expected = [next(data) for _ in range(4)]
    with Checkpoints(tmp_path, save_every=1, keep=1) as checkpoints:
        fresh = batches(dataset)
        restored = checkpoints.restore(state_at(0), fresh)
    for one, other in zip(jax.tree.leaves(restored), jax.tree.leaves(state_at(3)), strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.dtype == other.dtype and one.sharding == other.sharding
    for batch in expected:
        jax.tree.map(np.testing.assert_array_equal, next(fresh), batch)


def test_the_state_alone_can_be_restored(dataset, tmp_path):
    with Checkpoints(tmp_path, save_every=1, keep=1) as checkpoints:
        checkpoints.save(1, state_at(1), batches(dataset))
        checkpoints.wait()
        assert int(checkpoints.restore(state_at(0), None)["step"]) == 1


def test_an_unfinished_save_is_no_checkpoint_and_is_swept_away(dataset, tmp_path):
    with Checkpoints(tmp_path, save_every=1, keep=3) as checkpoints:
        checkpoints.save(1, state_at(1), batches(dataset))
    complete = tmp_path / "checkpoints" / "1"
    unfinished = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp"
    complete.rename(unfinished)
    with Checkpoints(tmp_path, save_every=1, keep=3) as checkpoints:
        assert checkpoints.latest_step == 0
        checkpoints.save(2, state_at(2), batches(dataset))  # Orbax sweeps in the background, before it saves
        checkpoints.wait()
        assert checkpoints.steps == [2]
    assert not unfinished.exists()


def test_arrays_of_another_shape_are_refused(dataset, tmp_path):
    with Checkpoints(tmp_path, save_every=1, keep=1) as checkpoints:
        checkpoints.save(1, state_at(1), batches(dataset))
        checkpoints.wait()
        wrong = {"step": jnp.int32(0), "params": {"w": jnp.zeros(7)}}
        with pytest.raises(ValueError, match=r"params/w: saved \(6,\), wanted \(7,\)"):
            checkpoints.restore(wrong, None)
