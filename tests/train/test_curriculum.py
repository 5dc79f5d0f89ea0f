"""Stages of one run: which steps they take, what they train, and that a resumed run goes on in the right one."""

from pathlib import Path

import pytest

from tests.support.tiny_run import TINY_MODEL, tiny_dataset, tiny_run
from tests.train.test_resume import everything
from train import loop
from train.curriculum import Stage, cut_steps
from train.loop import run_training
from train.metrics import read_metrics

CURRICULUM = [{"block_length": 1}, {"block_length": 2, "auto_balance": True, "tv_weight": 0.5}]


def curriculum_run(folder: Path, name: str, dataset: Path, **changes):
    values = {
        "objective": "introspective",
        "model": TINY_MODEL | {"num_layers": 1},
        "block_length": 2,
        "depth_weights": [1.0, 0.5],
        "curriculum": CURRICULUM,
        "steps": 4,
        "eval_batches": 0,
        "save_every": 100,
    }
    return tiny_run(dataset, folder / name, **(values | changes))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_dataset(tmp_path_factory.mktemp("curriculum"))


@pytest.mark.parametrize(
    ("shares", "steps", "stops"),
    [
        ([None] * 3, 34332, (11444, 22888, 34332)),
        ([None] * 3, 10, (3, 7, 10)),
        ([0.1, 0.2, 0.7], 100, (10, 30, 100)),
        # These sum to a little less than 1: no step may be lost to that.
        ([0.7, 0.1, 0.1, 0.1], 10, (7, 8, 9, 10)),
        ([0.3333333] * 3, 10**7, (3333333, 6666666, 10**7)),
        ([1.0], 5, (5,)),
    ],
)
def test_stages_cover_all_steps_without_a_gap(shares, steps, stops):
    assert cut_steps([Stage(block_length=1, share=share) for share in shares], steps) == stops


def test_the_stage_is_a_function_of_the_step(tmp_path):
    config = curriculum_run(tmp_path, "a", tmp_path, steps=5)
    assert [config.span_of(step).number for step in range(5)] == [1, 1, 2, 2, 2]
    first, last = config.spans
    assert (first.start, first.stop, last.start, last.stop) == (0, 2, 2, 5)
    assert (first.block_length, first.auto_balance, first.tv_weight, first.depth_weights) == (1, False, 0.0, (1.0,))
    assert (last.block_length, last.auto_balance, last.tv_weight, last.depth_weights) == (2, True, 0.5, (1.0, 0.5))


def test_a_run_without_a_curriculum_is_one_stage(tmp_path):
    config = curriculum_run(tmp_path, "a", tmp_path, curriculum=[], auto_balance=True)
    (only,) = config.spans
    assert (only.start, only.stop, only.block_length, only.auto_balance) == (0, 4, 2, True)


@pytest.mark.proof
@pytest.mark.slow
def test_each_stage_compiles_once_logs_its_number_and_resumes_at_its_border_with_the_same_bits(
    dataset, tmp_path, monkeypatch
):
    compiled = []
    compile_step = loop._compile_step

    def counted(config, span, *rest):
        compiled.append(span.number)
        return compile_step(config, span, *rest)

    monkeypatch.setattr(loop, "_compile_step", counted)
    whole, cut = curriculum_run(tmp_path, "whole", dataset), curriculum_run(tmp_path, "cut", dataset)
    lines = []
    run_training(whole, echo=lines.append)
    assert compiled == [1, 2]
    assert "stage 2    steps 3 to 4, MASK blocks 2 long, automatic alpha, TV x 0.5, depths x 1 0.5" in lines

    compiled.clear()
    seen = []
    run_training(
        cut,
        on_step=lambda step, _: seen.append(step),
        should_stop=lambda: len(seen) == 1,  # the first is reported while the second, the stage's last, runs
        echo=lambda line: None,
    )
    assert seen == [1, 2] and compiled == [1]
    run_training(cut, on_step=lambda step, _: seen.append(step), echo=lambda line: None)
    assert seen == [1, 2, 3, 4] and compiled == [1, 2]
    for one, other in zip(everything(cut), everything(whole), strict=True):
        assert one == other

    records = [record for record in read_metrics(whole.run_dir) if record["kind"] == "train"]
    assert [record["stage"] for record in records] == [1, 1, 2, 2]
    assert ["ce_noisy/depth_1" in record for record in records] == [False, False, True, True]
    assert ["tv" in record for record in records] == [False, False, True, True]
    assert [record["alpha"] == pytest.approx(0.2) for record in records] == [True, True, False, False]
