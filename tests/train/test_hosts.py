"""Several processes on this machine, over loopback: one run, whoever computes it and however often that changes."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from safetensors import safe_open

from idlm_jax.weights import load
from tests.support.tiny_run import TIMINGS, TINY_MODEL, tiny_dataset, tiny_run
from train import launch_local
from train.config import TrainConfig, to_yaml
from train.loop import run_training
from train.mesh import arrange
from train.metrics import read_metrics

ROOT = Path(__file__).parents[2]
STEPS = 16
RUN = {
    "objective": "introspective",
    "mask_token_id": 299,
    "random_block_phase": True,
    "gradient_accumulation_steps": 2,
    "model": TINY_MODEL | {"num_layers": 1},
    "batch_size": 8,
    "mesh": {"data": 2, "fsdp": 2},
    "steps": STEPS,
    "save_every": 1000,
    "eval_every": 4,
    "learning_rate": 1e-3,
}


class Chain(NamedTuple):
    """A run over two processes, stopped by SIGTERM to the second; gone on with over four; and the same in one."""

    config: TrainConfig
    stopped_output: str
    stopped_code: int
    resumed_output: str
    resumed_code: int
    alone: TrainConfig


def launch(config: TrainConfig, num_processes: int, num_devices: int, *arguments: str) -> subprocess.Popen[str]:
    path = config.run_dir.with_suffix(".yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_yaml(config))
    command = [sys.executable, "-m", "train.launch_local", "--processes", str(num_processes)]
    command += ["--devices-per-process", str(num_devices), "--", str(path), *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_metrics(run: subprocess.Popen[str], config: TrainConfig) -> None:
    deadline = time.monotonic() + 300
    while not read_metrics(config.run_dir):
        assert run.poll() is None and time.monotonic() < deadline, run.communicate()[0]
        time.sleep(0.02)


def process(run: subprocess.Popen[str], number: int) -> int:
    """Process id of one of a launch's processes, which are started in order."""
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(run.pid)], capture_output=True, text=True, check=True)
    return sorted(map(int, listed.stdout.split()))[number]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_dataset(tmp_path_factory.mktemp("hosts"))


@pytest.fixture(scope="module")
def chain(dataset, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    folder = tmp_path_factory.mktemp("runs")
    several, alone = (tiny_run(dataset, folder, run_name=name, **RUN) for name in ("several", "alone"))
    with launch(several, 2, 2) as run:
        wait_for_metrics(run, several)
        os.kill(process(run, 1), signal.SIGTERM)
        stopped_output = run.communicate(timeout=300)[0]
    with launch(several, 4, 1) as resumed:
        resumed_output = resumed.communicate(timeout=300)[0]
    run_training(alone, echo=lambda line: None)
    return Chain(several, stopped_output, run.returncode, resumed_output, resumed.returncode, alone)


@pytest.mark.slow
@pytest.mark.proof
def test_sigterm_to_one_process_stops_and_saves_in_all_after_the_same_step(chain):
    assert chain.stopped_code == 128 + signal.SIGTERM, chain.stopped_output
    last = stopped_at(chain)
    assert 2 <= last < STEPS
    assert f"after step {last}\n" in chain.resumed_output and chain.resumed_code == 0, chain.resumed_output


def stopped_at(chain: Chain) -> int:
    (line,) = (line for line in chain.stopped_output.splitlines() if "stopped after step" in line)
    return int(line.split("stopped after step ")[1].split(",")[0])


@pytest.mark.slow
@pytest.mark.proof
def test_two_processes_then_four_give_the_losses_and_the_model_of_one(chain):
    ours, wanted = read_metrics(chain.config.run_dir), read_metrics(chain.alone.run_dir)
    assert len(ours) == len(wanted) > STEPS
    for one, other in zip(ours, wanted, strict=True):
        assert one.keys() == other.keys() and one["kind"] == other["kind"]
        for name in one.keys() - TIMINGS - {"kind"}:
            # Sums over devices are taken in another order: float32 rounding, grown over the steps.
            np.testing.assert_allclose(one[name], other[name], rtol=1e-5, atol=1e-6, err_msg=f"{name}, {one['step']}")
    files = [run.run_dir / "hf" / "model.safetensors" for run in (chain.config, chain.alone)]
    with safe_open(files[0], "numpy") as exported, safe_open(files[1], "numpy") as expected:
        assert set(exported.keys()) == set(expected.keys())
        for name in expected.keys():
            np.testing.assert_allclose(exported.get_tensor(name), expected.get_tensor(name), rtol=1e-2, atol=1e-5)


@pytest.mark.slow
@pytest.mark.proof
def test_process_0_alone_speaks(chain):
    for output in (chain.stopped_output, chain.resumed_output):
        lines = output.splitlines()
        assert sum(line.startswith("[0] step ") for line in lines) > 1
        assert not [line for line in lines if line.startswith(("[1] step", "[1] run", "[1] plan", "[1] exported"))]
    assert "over 4 processes; mesh data 2 x fsdp 2" in chain.resumed_output


@pytest.mark.slow
@pytest.mark.proof
def test_a_dead_process_ends_the_others_and_the_adapter_it_saved_is_exported_by_two(chain, dataset, tmp_path):
    lora = {"init_from": str(chain.alone.run_dir / "hf"), "model": None, "lora": {"rank": 2, "alpha": 4}}
    config = tiny_run(dataset, tmp_path, **RUN | lora | {"steps": 10**6, "save_every": 1, "eval_batches": 0})
    with launch(config, 2, 2) as run:
        wait_for_metrics(run, config)
        time.sleep(2)  # a checkpoint
        os.kill(process(run, 1), signal.SIGKILL)
        killed = time.monotonic()
        output = run.communicate(timeout=300)[0]
    assert run.returncode == 128 + signal.SIGKILL and "process 1 ended with exit code -9" in output
    assert time.monotonic() - killed < 30
    with launch(config, 2, 2, "--export-only") as export:
        output = export.communicate(timeout=300)[0]
    assert export.returncode == 0, output
    lm = load(lora["init_from"], adapter=config.run_dir / "adapter")
    assert np.abs(np.asarray(lm.module.blocks.attention.q.lora_b[...])).max() > 0


@pytest.mark.parametrize("count", ["0", "-1"])
def test_a_launch_of_no_process_is_refused(count, capsys):
    with pytest.raises(SystemExit) as ended:
        launch_local.main(["--processes", count, "--", "config.yaml"])
    assert ended.value.code == 2 and "must be at least 1" in capsys.readouterr().err


@dataclasses.dataclass(frozen=True)
class FakeDevice:
    id: int
    process_index: int
    slice_index: int = 0
    platform: str = "gpu"
    device_kind: str = "fake"


@pytest.mark.parametrize("slices", [False, True], ids=["hosts", "slices"])
@pytest.mark.parametrize(
    ("sizes", "islands_of_each_axis"),
    [
        ((4, 1, 1, 2), (4, 1, 1, 1)),  # data across, tensor inside
        ((2, 2, 1, 2), (2, 2, 1, 1)),
        ((1, 4, 2, 1), (1, 4, 1, 1)),
        ((2, 1, 1, 4), (2, 1, 1, 2)),  # too wide a tensor axis takes the least it can
    ],
    ids=str,
)
def test_the_last_mesh_axes_stay_inside_a_host_or_slice(sizes, islands_of_each_axis, slices):
    # Four islands of two devices, numbered in an order that mixes them.
    devices = [
        FakeDevice(id=4 * local + island, process_index=0 if slices else island, slice_index=island if slices else 0)
        for local in range(2)
        for island in range(4)
    ]
    grid = arrange(devices, sizes)
    assert grid.shape == sizes and set(grid.flat) == set(devices)
    island = np.vectorize(lambda device: device.id % 4, otypes=[int])(grid)
    for axis, count in enumerate(islands_of_each_axis):
        lines = np.moveaxis(island, axis, -1).reshape(-1, sizes[axis])
        assert {len(set(line)) for line in lines.tolist()} == {count}
