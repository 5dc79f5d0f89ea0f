"""Twenty kills at random moments, during saves too: nothing that was saved is lost, and the end is the same."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tiny_run import TINY_MODEL, tiny_dataset, tiny_run
from tests.train.test_resume import ROOT, everything, write

NUM_KILLS = 20

# Every process is a fork taken before JAX has a backend: importing costs seconds, and would be most of the test. A
# timer kills it some steps on, up to 1.2 s later: anything from one step to several saves. The last one may finish.
KILLED = """
import json, os, random, signal, sys, threading
from pathlib import Path
from train.config import load_config
from train.loop import run_training

def train(config, rng, is_killed):
    steps_left = rng.randrange(1, 6)
    def count(step, metrics):
        nonlocal steps_left
        steps_left -= 1
        if is_killed and steps_left == 0:
            threading.Timer(rng.uniform(0, 1.2), os.kill, (os.getpid(), signal.SIGKILL)).start()
    run_training(config, on_step=count, echo=lambda line: None)

whole, killed, seed, num_kills = *map(load_config, sys.argv[1:3]), int(sys.argv[3]), int(sys.argv[4])
for config, kills in ((whole, 0), (killed, num_kills)):
    for number in range(kills + 1):
        child = os.fork()
        if child == 0:
            train(config, random.Random(seed + number), number < kills)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        folders = (config.run_dir / "checkpoints").glob("*")
        print(json.dumps([status, sorted(int(each.name) for each in folders if each.name.isdigit())]), flush=True)
"""


@pytest.mark.slow
@pytest.mark.proof
def test_twenty_kills_lose_no_checkpoint_and_change_no_bit(tmp_path: Path):
    data = tiny_dataset(tmp_path)
    changes = {"model": TINY_MODEL | {"num_layers": 1}, "steps": 700, "save_every": 3, "eval_batches": 0}
    whole, killed = (tiny_run(data, tmp_path / name, log_every=7, **changes) for name in ("whole", "killed"))
    seed = random.SystemRandom().randrange(10**6)
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    paths = [str(write(config, Path(config.output_dir).with_suffix(".yaml"))) for config in (whole, killed)]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLED, *paths, str(seed), str(NUM_KILLS)],
        cwd=ROOT,
        env=os.environ | cache,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    alone, *lives = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    statuses = [status for status, _ in lives]
    assert alone[0] == 0 and statuses == [9] * NUM_KILLS + [0], f"{seed=}: {done.stderr[-2000:]}"
    newest = [max(steps, default=0) for _, steps in lives]
    assert newest == sorted(newest), f"{seed=}: a checkpoint was lost: {newest}"
    assert len(set(newest)) > NUM_KILLS // 4, f"{seed=}: the kills came before anything was saved: {newest}"
    for one, other in zip(everything(killed), everything(whole), strict=True):
        assert one == other, f"{seed=}"
