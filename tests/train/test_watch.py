"""What keeps an eye on a run: the guard, the best checkpoint, samples, the profiler, broken checkpoints, MFU."""

import gc
import json
import sys
import time
import types

import numpy as np
import pytest

from tests.support.tiny_run import tiny_dataset, tiny_run
from train import loop
from train.config import ConfigError
from train.data import make_train_iterator
from train.guard import LEAST, SpikeGuard, TrainingDiverged
from train.loop import export_checkpoint, run_training
from train.metrics import format_train, read_metrics
from train.targets import Device


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return tiny_dataset(tmp_path_factory.mktemp("watch"))


def quietly(line):
    del line


def stopped_after(count):
    """`should_stop` that says so after so many steps."""
    answers = iter([False] * (count - 1) + [True])
    return lambda: next(answers)


def losses(values):
    return [{"loss": float(value), "grad_norm": 1.0} for value in values]


def test_a_loss_far_over_the_recent_median_is_a_spike():
    guard = SpikeGuard(3.0)
    for step, metrics in enumerate(losses([2.0] * LEAST + [5.9]), 1):
        guard.check(step, metrics)
    with pytest.raises(TrainingDiverged, match=r"step 18: loss=6.1 is over spike_ratio=3 times 2;"):
        guard.check(18, *losses([6.1]))


def test_without_enough_losses_in_another_stage_or_without_a_ratio_there_is_no_spike():
    SpikeGuard(None).check(99, *losses([1e9]))
    guard = SpikeGuard(3.0)
    for step, metrics in enumerate(losses([2.0] * (LEAST - 1) + [1e6]), 1):
        guard.check(step, metrics)
    guard = SpikeGuard(3.0)
    for step in range(2 * LEAST):
        stage = 1.0 + (step >= LEAST)
        guard.check(step, {"loss": 10.0**stage, "grad_norm": 1.0, "stage": stage})


def test_the_batch_of_a_spike_is_saved_and_the_checkpoints_are_from_before(dataset, tmp_path, monkeypatch):
    config = tiny_run(dataset, tmp_path, steps=40, save_every=5, eval_batches=0, spike_ratio=1.0001, learning_rate=1e-9)
    monkeypatch.setattr("train.guard.LEAST", 8)
    # Losses of such small steps wander with the batches alone, so one exceeds the median within a few steps.
    with pytest.raises(TrainingDiverged, match="is over spike_ratio") as raised:
        run_training(config, echo=quietly)
    step = raised.value.step
    assert str(config.run_dir / f"diverged_step{step}.npz") in str(raised.value)
    saved = np.load(config.run_dir / f"diverged_step{step}.npz")
    batches = make_train_iterator(
        dataset, batch_size=4, seed=config.seed, random_block_phase=False, first_batch=step - 1, rows=range(4)
    )
    for name, array in next(batches)._asdict().items():
        np.testing.assert_array_equal(saved[name], array)
    assert all(int(path.name) < step for path in (config.run_dir / "checkpoints").iterdir())


def test_the_best_evaluation_is_kept_beyond_the_newest_and_exported_by_name(dataset, tmp_path, monkeypatch):
    config = tiny_run(dataset, tmp_path, steps=8, save_every=4, keep=1, eval_every=1, keep_best=True)
    scores = iter([0.1, 0.9, 0.3, 0.2, 0.8, 0.1, 0.1, 0.4])
    monkeypatch.setattr(loop, "score_of", lambda config, measured: next(scores))
    run_training(config, echo=quietly)
    assert sorted(int(path.name) for path in (config.run_dir / "checkpoints").iterdir()) == [2, 8]
    lines = []
    export_checkpoint(config, "best", echo=lines.append)
    assert lines[0] == "step 2 of 8"
    with pytest.raises(ConfigError, match=r"checkpoints of steps \[2, 8\], not of 5"):
        export_checkpoint(config, 5, echo=quietly)


def test_without_scores_there_is_no_best_to_export(dataset, tmp_path):
    config = tiny_run(dataset, tmp_path, steps=2)
    run_training(config, echo=quietly)
    with pytest.raises(ConfigError, match="keep_best was off"):
        export_checkpoint(config, "best", echo=quietly)


def overwritten(folder):
    """The end of the largest file, which holds arrays, is other bytes."""
    path = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = path.read_bytes()
    path.write_bytes(content[:100] + b"\xff" * (len(content) - 100))


def emptied(folder):
    """Every file is there and holds nothing."""
    for path in folder.rglob("*"):
        if path.is_file():
            path.write_bytes(b"")


# Orbax gives reads up where one fails. They end later, in threads of its storage, and the collector complains of their
# errors whenever it comes by: it must come by before another test begins.
leaves_failed_reads = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def collect_failed_reads():
    until = time.monotonic() + 30
    while any(
        type(each) is types.CoroutineType and each.__qualname__.startswith("_read_") for each in gc.get_objects()
    ):
        assert time.monotonic() < until
        time.sleep(0.05)
        gc.collect()


@leaves_failed_reads
@pytest.mark.parametrize("harm", [overwritten, pytest.param(emptied, marks=pytest.mark.proof)])
def test_a_broken_checkpoint_is_set_aside_and_the_one_before_continues_to_the_same_end(dataset, tmp_path, harm):
    changes = {"steps": 8, "save_every": 2, "keep": 3, "eval_batches": 0}
    whole = tiny_run(dataset, tmp_path / "whole", **changes)
    run_training(whole, echo=quietly)
    config = tiny_run(dataset, tmp_path / "broken", **changes)
    run_training(config, should_stop=stopped_after(6), echo=quietly)
    harm(config.run_dir / "checkpoints" / "6")
    lines = []
    run_training(config, echo=lines.append)
    assert lines[0].startswith("checkpoint 6 cannot be read, going back to the one before: ")
    assert lines[1].endswith("after step 4")
    assert (config.run_dir / "unreadable" / "6").is_dir()
    assert [record["loss"] for record in read_metrics(config.run_dir)] == [
        record["loss"] for record in read_metrics(whole.run_dir)
    ]
    collect_failed_reads()


@leaves_failed_reads
def test_when_no_checkpoint_can_be_read_nothing_is_moved(dataset, tmp_path):
    config = tiny_run(dataset, tmp_path, steps=4, keep=2, eval_batches=0)
    run_training(config, should_stop=stopped_after(2), echo=quietly)
    folder = config.run_dir / "checkpoints" / "2"
    overwritten(folder)
    with pytest.raises(ValueError, match=r"none of the checkpoints \[2\]"):
        run_training(config, echo=quietly)
    assert folder.is_dir() and not (config.run_dir / "unreadable").exists()
    collect_failed_reads()


@pytest.mark.parametrize(
    "mesh", [{}, pytest.param({"fsdp": 2, "tensor": 1}, marks=pytest.mark.proof)], ids=["one device", "mesh"]
)
def test_samples_are_drawn_at_each_evaluation_and_kept(dataset, tmp_path, mesh):
    introspective = {"objective": "introspective", "mask_token_id": 299}
    config = tiny_run(dataset, tmp_path, steps=4, eval_every=2, eval_samples=2, mesh=mesh, **introspective)
    lines = []
    run_training(config, echo=lines.append)
    kept = [json.loads(line) for line in (config.run_dir / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in kept] == [2, 2, 4, 4]
    assert kept[0]["prompt"] == kept[2]["prompt"] != kept[1]["prompt"]
    assert all(line["tokens_per_forward"] >= 0.5 and line["text"] for line in kept)
    assert sum(line.startswith("sample · ") for line in lines) == 4


@pytest.mark.proof
def test_the_profiler_records_its_window_and_nothing_when_the_run_ends_before(dataset, tmp_path):
    config = tiny_run(dataset, tmp_path / "a", steps=4, eval_batches=0, profile_start=2, profile_steps=2)
    run_training(config, echo=quietly)
    assert list((config.run_dir / "profile").rglob("*.xplane.pb"))
    late = tiny_run(dataset, tmp_path / "b", steps=2, eval_batches=0, profile_start=3, profile_steps=2)
    run_training(late, echo=quietly)
    assert not (late.run_dir / "profile").exists()


def test_mfu_is_flop_per_second_of_a_device_over_its_peak(dataset, tmp_path, monkeypatch):
    fake = Device(name="fake", kinds=("cpu",), memory=1, flops=1e9, link=1.0)
    monkeypatch.setattr(loop, "find_device", lambda kind: fake)
    config = tiny_run(dataset, tmp_path, steps=3, eval_batches=0)
    lines = []
    run_training(config, echo=lines.append)
    for record in read_metrics(config.run_dir):
        record = {name: value for name, value in record.items() if name not in ("step", "kind")}
        assert record["mfu"] == pytest.approx(record["tflops_per_device"] * 1e12 / 1e9)
        # Six operations a weight and token at the least, and not ten times more: the head is most of this model.
        weights = 300 * 16 + 2 * (16 * 8 * 6 + 3 * 16 * 24)
        least = 6 * weights * record["tokens_per_s"] / 1e12
        assert 0.5 * least < record["tflops_per_device"] < 2 * least
        assert f"MFU {record['mfu']:.1%}" in format_train(1, 3, record)
    assert any("TFLOP/s/device · MFU" in line for line in lines)


@pytest.mark.proof
def test_moments_on_the_host_change_no_loss(dataset, tmp_path):
    runs = [
        tiny_run(dataset, tmp_path / str(offload), offload_optimizer=offload, eval_batches=0, mesh=mesh)
        for offload, mesh in [(False, {}), (True, {}), (True, {"fsdp": 2})]
    ]
    curves = []
    for config in runs:
        run_training(config, should_stop=stopped_after(3), echo=quietly)
        run_training(config, echo=quietly)
        curves.append([record["loss"] for record in read_metrics(config.run_dir)])
    assert curves[0] == curves[1]
    np.testing.assert_allclose(curves[2], curves[0], rtol=1e-4)


def test_wandb_gets_the_metrics_where_it_is_installed_and_is_asked_for_where_not(dataset, tmp_path, monkeypatch):
    config = tiny_run(dataset, tmp_path, steps=2, wandb_project="p")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="needs wandb: pip install wandb"):
        run_training(config, echo=quietly)
    logged = []
    run = types.SimpleNamespace(
        log=lambda values, step: logged.append((step, values)), finish=lambda exit_code: logged.append(exit_code)
    )
    begun = []
    fake = types.SimpleNamespace(init=lambda **options: begun.append(options) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run_training(config, echo=quietly)
    assert begun[0]["project"] == "p" and begun[0]["resume"] == "allow"
    assert [step for step, _ in logged[:-1]] == [1, 2, 2] and logged[-1] == 0
    assert "train/loss" in logged[0][1] and "eval/loss" in logged[2][1]
