"""A run that is killed, twice, or asked to stop, ends with the bits of one that was left alone."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors import safe_open

from tests.support.tiny_run import TIMINGS, TINY_MODEL, tiny_dataset, tiny_run
from train.checkpoint import Checkpoints
from train.config import TrainConfig, to_yaml
from train.loop import run_training
from train.metrics import read_metrics

ROOT = Path(__file__).parents[2]

# Kills itself, as `kill -9` would, once the metrics of a step are known. A later step is running by then, and a save
# may be in flight.
KILLED_AT = """
import os, signal, sys
from train.config import load_config
from train.loop import run_training

def kill_at(step, metrics, last=int(sys.argv[2])):
    if step == last:
        os.kill(os.getpid(), signal.SIGKILL)

run_training(load_config(sys.argv[1]), on_step=kill_at)
"""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_dataset(tmp_path_factory.mktemp("resume"))


def write(config: TrainConfig, path: Path) -> Path:
    path.write_text(to_yaml(config))
    return path


def everything(config: TrainConfig):
    """Bytes of the exported tensors, of every checkpointed array, and all metrics that are not times."""
    with safe_open(config.run_dir / "hf" / "model.safetensors", "numpy") as tensors:
        exported = {name: tensors.get_tensor(name).tobytes() for name in tensors.keys()}
    with Checkpoints(config.run_dir, save_every=config.save_every, keep=config.keep) as checkpoints:
        saved = {name: array.tobytes() for name, array in checkpoints.read_arrays().items()}
    records = [
        {name: value for name, value in record.items() if name not in TIMINGS}
        for record in read_metrics(config.run_dir)
    ]
    return exported, saved, records


@pytest.mark.proof
def test_killed_twice_equals_uninterrupted_bit_for_bit(dataset, tmp_path):
    changes = {
        "objective": "introspective",
        "random_block_phase": True,
        "block_length": 2,
        "gradient_accumulation_steps": 2,
        "model": TINY_MODEL | {"num_layers": 1},
        "steps": 12,
        "save_every": 3,
        "eval_every": 4,
        "eval_batches": 1,
    }
    whole = tiny_run(dataset, tmp_path / "whole", **changes)
    killed = tiny_run(dataset, tmp_path / "killed", **changes)
    run_training(whole, echo=lambda line: None)

    seed = random.SystemRandom().randrange(10**6)
    rng = random.Random(seed)
    first, second = rng.randrange(1, 7), rng.randrange(7, 12)
    path = write(killed, tmp_path / "killed.yaml")
    for step in (first, second):
        done = subprocess.run(
            [sys.executable, "-c", KILLED_AT, str(path), str(step)], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == -signal.SIGKILL, done.stderr
    seen = []
    run_training(killed, on_step=lambda step, metrics: seen.append(step), echo=lambda line: None)

    # One save is in flight at most: the one at 3 was complete before the one at 6 began.
    assert seen[0] in (4, 7, 10) and seen[-1] == 12, f"{seed=}: killed at {first} and {second}, {seen=}"
    for one, other in zip(everything(killed), everything(whole), strict=True):
        assert one == other, f"{seed=}: killed at {first} and {second}"
    steps = [record["step"] for record in read_metrics(killed.run_dir) if record["kind"] == "train"]
    assert steps == list(range(1, 13)), f"{seed=}"


# As a full disk: no file may grow beyond some size, which a checkpoint's do.
ON_A_FULL_DISK = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
from train.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.proof
@pytest.mark.slow
def test_a_full_disk_ends_the_run_with_a_line_and_leaves_the_earlier_checkpoints(dataset, tmp_path):
    config = tiny_run(dataset, tmp_path, model=TINY_MODEL | {"hidden_size": 128}, steps=6, eval_batches=0)
    answers = iter([False, True])
    run_training(config, should_stop=lambda: next(answers), echo=lambda line: None)
    command = [sys.executable, "-W", "ignore", "-c", ON_A_FULL_DISK, str(write(config, tmp_path / "run.yaml"))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: a checkpoint could not be written (those of steps [2] are whole)"), done.stderr
    assert run_training(config, echo=lambda line: None).is_finished


@pytest.mark.slow
def test_sigterm_saves_and_exits_and_the_same_command_resumes(dataset, tmp_path):
    config = tiny_run(dataset, tmp_path, steps=10**6, save_every=10**6, eval_batches=0)
    command = [sys.executable, "-m", "train", str(write(config, tmp_path / "run.yaml"))]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
        deadline = time.monotonic() + 300
        while not read_metrics(config.run_dir):
            assert run.poll() is None and time.monotonic() < deadline, run.communicate()[0]
            time.sleep(0.05)
        os.kill(run.pid, signal.SIGTERM)
        output = run.communicate(timeout=300)[0]
    assert run.returncode == 128 + signal.SIGTERM, output
    last = read_metrics(config.run_dir)[-1]["step"]
    assert f"stopped after step {last}, saved" in output
    lines = []
    resumed = run_training(config, should_stop=lambda: True, echo=lines.append)
    assert f"after step {last}" in lines[0] and resumed.step == last + 1
