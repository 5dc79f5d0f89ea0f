"""A corpus of a few dozen short files and chats, generated, and the dataset built from it."""

import json
import random
from pathlib import Path

import pytest

from train.data import DatasetReport, DatasetSettings, build_dataset

WORDS = "alpha beta gamma delta value index total count node tree left right".split()


def python_text(seed: int) -> str:
    rng = random.Random(seed)
    lines = []
    for number in range(rng.randint(3, 25)):
        name, other = rng.choice(WORDS), rng.choice(WORDS)
        lines += [
            f"def {name}_{number}({other}):",
            f"    if {other} > {rng.randint(0, 999)}:",
            f"        return {name}",
        ]
    return "\n".join(lines) + "\n"


def write_corpus(root: Path, *, files: int = 40, chats: int = 30) -> Path:
    for index in range(files):
        path = root / f"package_{index % 3}" / f"module_{index}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(python_text(index), encoding="utf-8")
    lines = [
        json.dumps(
            {
                "messages": [
                    {"role": "user", "content": f"Define {WORDS[index % 12]} number {index}."},
                    {"role": "assistant", "content": f"def {WORDS[index % 12]}_{index}(): pass"},
                ]
            }
        )
        for index in range(chats)
    ]
    if lines:
        (root / "chats.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


@pytest.fixture(scope="session")
def corpus_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def settings(corpus_dir: Path) -> DatasetSettings:
    return DatasetSettings(roots=(str(corpus_dir),), vocab_size=320, max_seq_len=64, heldout_fraction=0.2)


@pytest.fixture(scope="session")
def dataset(settings: DatasetSettings, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DatasetReport]:
    folder = tmp_path_factory.mktemp("datasets") / "tiny"
    return folder, build_dataset(settings, folder)
