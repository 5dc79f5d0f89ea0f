"""A training run of a few seconds: its dataset and its config."""

import json
import random
from pathlib import Path
from typing import Any

from train.config import TrainConfig, config_from_mapping
from train.data import DatasetSettings, build_dataset

# Of a line of metrics: what differs from run to run.
TIMINGS = {"ms_per_step", "tokens_per_s", "supervised_tokens_per_s", "tflops_per_device", "eta_s"}
TINY_MODEL = {
    "vocab_size": 300,
    "hidden_size": 16,
    "num_layers": 2,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 8,
    "mlp_size": 24,
    "max_position": 64,
}


def tiny_dataset(folder: Path, word: str = "return") -> Path:
    """Rows of 32 tokens from made-up chats and code: prompts, several documents a row, and some padding."""
    rng = random.Random(0)
    text = folder / "text"
    text.mkdir(parents=True)
    for index in range(40):
        lines = [f"def f{rng.randrange(99)}(x):\n    {word} x + {rng.randrange(99)}\n" for _ in range(6)]
        (text / f"file{index:02}.py").write_text("".join(lines))
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"{rng.randrange(9)}?"},
                {"role": "assistant", "content": str(rng.randrange(10**3))},
            ]
        }
        for _ in range(40)
    ]
    (text / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)) + "\n")
    settings = DatasetSettings(roots=(str(text),), max_seq_len=32, vocab_size=300, heldout_fraction=0.2)
    build_dataset(settings, folder / "data")
    return folder / "data"


def tiny_run(data: Path, output_dir: Path, **changes: Any) -> TrainConfig:
    """An AR run of 6 steps; `changes` replaces top-level keys."""
    values = {
        "run_name": "tiny",
        "output_dir": str(output_dir),
        "objective": "ar",
        "model": TINY_MODEL,
        "dataset": {"path": str(data)},
        "steps": 6,
        "batch_size": 4,
        "learning_rate": 1e-2,
        "save_every": 2,
        "eval_batches": 2,
        "eval_every": 0,
        "log_every": 1,
    }
    return config_from_mapping(values | changes)
