"""Every mistake in a config is named, and what is right reaches the run unchanged."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tiny_run import TINY_MODEL
from train.__main__ import main
from train.config import (
    ALIASES,
    ConfigError,
    config_from_mapping,
    describe_keys,
    load_config,
    to_yaml,
)
from train.data import DatasetSettings
from train.dataset_config import DatasetBuild

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
VALID = {
    "run_name": "a",
    "objective": "introspective",
    "model": TINY_MODEL,
    "dataset": {"path": "data"},
    "steps": 10,
    "batch_size": 4,
}


def stages(lengths, shares=None, **changes):
    """A change that gives the run a curriculum."""
    shares = shares or [None] * len(lengths)
    pairs = zip(lengths, shares, strict=True)
    return {"curriculum": [{"block_length": length, "share": share} for length, share in pairs]} | changes


def write_yaml(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    model = ", ".join(f"{key}: {value}" for key, value in TINY_MODEL.items())
    path.write_text(f"run_name: a\nmodel: {{{model}}}\n{text}")
    return path


REST = "dataset: {path: data}\nsteps: 10\nbatch_size: 4\n"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_committed_config_is_valid_and_survives_the_snapshot(path, tmp_path):
    config = load_config(path)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"learning_rat": 1e-3}, "'learning_rat'; did you mean 'learning_rate'?"),
        ({"dataset": {"path": "x", "pth": 1}}, "'dataset.pth'; did you mean 'dataset.path'?"),
        ({"loss_auto_balanc": True}, "did you mean 'loss_auto_balance'?"),
        ({"zzzzzzzz": 1}, "'zzzzzzzz'; see --help"),
        ({"steps": "many"}, "steps='many': input should be a valid integer"),
        ({"steps": 0}, "steps=0: input should be greater than or equal to 1"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"objective": "mlm"}, "objective='mlm': input should be 'ar', 'introspective' or 'block_diffusion'"),
        ({"block_length": 16}, "block_length=16: input should be less than or equal to 15"),
        ({"run_name": "../x"}, "run_name='../x'"),
        ({"model": None}, "exactly one of init_from"),
        ({"init_from": "x"}, "exactly one of init_from"),
        ({"batch_size": 6, "gradient_accumulation_steps": 4}, "batch_size=6 is not a multiple"),
        (
            {"objective": "ar", "lora": {}, "model": None, "init_from": "x"},
            "lora needs objective=introspective",
        ),
        ({"lora": {}}, "lora needs init_from"),
        ({"param_dtype": "bfloat16"}, "round away small updates"),
        ({"dataset": {"path": "x", "build": {}}}, "exactly one of vocab_size"),
        ({"ce_alpha": 0.1, "clean_loss_weight": 0.1}, "only one of them"),
        ({"kl_weight": -1}, "kl_weight=-1: input should be greater than or equal to 0"),
        ({"tv_weight": float("inf")}, "tv_weight=inf"),
        ({"objective": "ar", "tv_weight": 0.5}, "tv_weight and depth_weights need objective=introspective"),
        ({"depth_weights": [1, 0.5]}, "depth_weights=[1.0, 0.5] needs one weight per MASK of a block: block_length=3"),
        ({"depth_weights": [1, -1, 1]}, "depth_weights=[1.0, -1.0, 1.0] must not be negative"),
        ({"depth_weights": [0, 0, 0]}, "leaves a whole block without weight"),
        (stages([1, 3], depth_weights=[0, 1, 1]), "leaves a whole block without weight"),
        (stages([1, 2]), "block lengths [1, 2]: none may exceed the run's block_length=3, and the last must equal it"),
        (stages([4, 3]), "block lengths [4, 3]: none may exceed"),
        (stages([1, 3], [0.5, None]), "share in every stage, or in none"),
        (stages([1, 3], [0.5, 0.4]), "shares [0.5, 0.4] sum to 0.9, not 1"),
        (stages([1, 3], [0.5, 1.5]), "share=1.5: input should be less than or equal to 1"),
        (stages([1, 2, 3], steps=2), "stage 2 has no step: steps=2 are too few"),
        (stages([1, 3], objective="ar"), "curriculum needs objective=introspective"),
        ({"curriculum": [{"block_lenght": 3}]}, "did you mean 'curriculum.block_length'?"),
    ],
)
def test_a_wrong_key_or_value_is_named_with_what_is_allowed(change, named):
    with pytest.raises(ConfigError) as error:
        config_from_mapping(VALID | change)
    assert named in str(error.value)


def test_all_mistakes_are_reported_at_once():
    with pytest.raises(ConfigError) as error:
        config_from_mapping({"run_name": "a", "step": 1})
    message = str(error.value)
    assert "dataset: required" in message and "batch_size: required" in message and "'step'" in message


def test_scientific_notation_without_a_dot_is_a_number(tmp_path):
    path = write_yaml(tmp_path, REST + "learning_rate: 1e-5\n")
    assert load_config(path).learning_rate == 1e-5
    assert load_config(path, ["learning_rate=3e-4"]).learning_rate == 3e-4


def test_overrides_reach_nested_keys_and_the_last_one_wins(tmp_path):
    path = write_yaml(tmp_path, REST + "lora: null\n")
    config = load_config(path, ["model.num_layers=3", "steps=5", "steps=7", "model.tie_embeddings=false"])
    assert (config.model.num_layers, config.steps, config.model.tie_embeddings) == (3, 7, False)


def test_official_names_are_accepted_as_aliases():
    config = config_from_mapping(VALID | {"ce_alpha": 0.5, "loss_auto_balance": True})
    assert (config.clean_loss_weight, config.auto_balance) == (0.5, True)


@pytest.mark.parametrize("text", ["steps: [1\n", "- a\n", "steps: ${missing}\n", "steps: ???\n"])
def test_an_unreadable_file_is_a_config_error(text, tmp_path):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ConfigError):
        load_config(tmp_path / "bad.yaml")


def test_an_override_without_a_value_and_an_absent_file_are_config_errors(tmp_path):
    with pytest.raises(ConfigError, match="'steps' is not of the form key=value"):
        load_config(write_yaml(tmp_path, REST), ["steps"])
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "absent.yaml")


def test_every_key_has_help_and_there_are_fewer_than_80():
    keys = list(describe_keys())
    assert len(keys) < 80
    assert all(help_text for *_, help_text in keys)
    assert set(ALIASES.values()) <= {name for name, *_ in keys}


def test_the_dataset_section_has_the_fields_and_defaults_of_the_builder():
    def fields(cls):
        return {field.name: field.default for field in dataclasses.fields(cls)}

    assert fields(DatasetBuild) == fields(DatasetSettings)


def test_a_wrong_config_exits_with_2_and_help_lists_every_key(tmp_path, capsys):
    assert main([str(write_yaml(tmp_path, REST)), "stepz=3"]) == 2
    assert "did you mean 'steps'?" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit_info:
        main(["--help"])
    assert exit_info.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"  {name}  " in shown for name, *_ in describe_keys())


def test_print_config_shows_the_resolved_run_without_loading_jax(tmp_path):
    program = (
        "import sys; from train.__main__ import main; code = main(sys.argv[1:]); "
        "assert 'jax' not in sys.modules; sys.exit(code)"
    )
    path = write_yaml(tmp_path, REST)
    done = subprocess.run(
        [sys.executable, "-c", program, str(path), "steps=77", "--print-config"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    assert "steps: 77\n" in done.stdout
