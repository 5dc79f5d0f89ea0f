"""The device kit's command on a CPU: dry runs of every part, and what it refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.device.__main__ import main
from benchmarks.device.cases import OPS
from benchmarks.device.checks import PASS

ROOT = Path(__file__).parents[2]


def run_sh(*arguments: str, out: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(ROOT / "benchmarks/device/run.sh"), *arguments],
        env=os.environ | {"PYTHON": sys.executable, "OUT": str(out), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.proof
def test_dry_run_checks_kernels_and_publishes_no_figure(tmp_path: Path):
    done = run_sh("kernels", "--dry", "--only", "quantized_matmul,gated_lora,linear_cross_entropy", out=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "kernels.json").read_text())
    assert result["is_dry"]
    assert {line["status"] for line in result["checks"]} == {PASS}
    assert {line["program"] for line in result["checks"]} >= {"reference", "triton"}
    assert {line["note"] for line in result["speeds"]} == {"dry"}
    assert not any(line[figure] for line in result["speeds"] for figure in ("timing", "gb_s", "tflop_s", "of_floor"))
    environment = result["environment"]
    assert environment.keys() >= {"device", "driver", "jax", "jaxlib", "torch", "triton", "date", "revision", "command"}
    assert environment["command"].startswith("benchmarks/device/run.sh kernels --dry")
    text = (tmp_path / "kernels.md").read_text()
    assert "dry: nothing timed" in text
    assert "GB/s (read plus written)" not in text
    assert sorted(file.name for file in tmp_path.iterdir()) == ["kernels.json", "kernels.md"]


@pytest.mark.slow
@pytest.mark.proof
@pytest.mark.parametrize(("platform", "ops"), [("gpu", OPS), ("tpu", ("quantized_matmul",))])
def test_dry_run_of_every_op_passes(tmp_path: Path, platform: str, ops: tuple[str, ...]):
    done = run_sh("kernels", f"--dry={platform}", "--only", ",".join(ops), out=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "kernels.json").read_text())
    assert {line["case"].split("/")[0].split(".")[0] for line in result["checks"]} == set(ops)
    assert {line["status"] for line in result["checks"]} == {PASS}


def test_dry_tuning_runs_every_candidate_and_names_no_winner(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["tune", "quantized_matmul", "--dry", "--out", str(tmp_path)]) == 0
    assert "No winner: nothing was timed." in capsys.readouterr().out
    candidates = json.loads((tmp_path / "tune_quantized_matmul.json").read_text())["candidates"]
    assert len(candidates) > 1
    assert {(line["note"], line["timing"]) for line in candidates} == {("dry", None)}


@pytest.mark.proof
def test_dry_training_steps_run_and_publish_no_figure(tmp_path: Path):
    assert main(["train", "--dry", "--out", str(tmp_path)]) == 0
    steps = json.loads((tmp_path / "train.json").read_text())["steps"]
    assert [step["case"] for step in steps] == ["tiny", "tiny_ar"]
    # Random weights: the loss of each stream is about log(vocabulary).
    assert 0.9 * 4.85 < steps[1]["loss"] < 1.1 * 4.85 < steps[0]["loss"] < 1.4 * 4.85
    assert all(step["median_ms"] is step["tokens_per_s"] is step["mfu"] is None for step in steps)


@pytest.mark.proof
def test_dry_conversion_trains_a_parent_and_converts_it_and_publishes_no_time(tmp_path: Path):
    done = run_sh("convert", "--dry", out=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    parent, adapter = json.loads((tmp_path / "convert.json").read_text())["conversions"]
    assert (parent["note"], adapter["note"]) == ("", "")
    assert parent["ms_per_step"] is None
    assert adapter["heldout"]["acceptance/depth_2"] > 0
    assert adapter["tokens_per_forward"]["ISD N=2, T=0"] >= 1
    assert (tmp_path / "convert_adapter_ours.jsonl").is_file()


@pytest.mark.proof
def test_dry_serving_steps_run_and_publish_no_figure(tmp_path: Path):
    assert main(["serve", "--dry", "--out", str(tmp_path)]) == 0
    speeds = json.loads((tmp_path / "serve.json").read_text())["serving"]
    assert [(speed["case"], speed["note"]) for speed in speeds] == [
        ("tiny_n1_b2_128", "dry"),
        ("tiny_n2_b2_128", "dry"),
    ]
    assert all(
        speed[figure] is None for speed in speeds for figure in ("median_ms", "break_even", "trace_tokens_per_s")
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["wrong"], "choose from"),
        (["kernels", "--only", "verify,wrong"], "wrong: unknown; choose from paged_attention"),
        (["tune", "wrong"], "quantized_matmul"),
        ([], "part"),
    ],
)
def test_wrong_command_line_lists_what_there_is(arguments, message, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_an_op_without_tiles_is_not_tuned(capsys: pytest.CaptureFixture[str]):
    assert main(["tune", "gated_lora", "--dry"]) == 2
    assert "gated_lora has no tiles to tune" in capsys.readouterr().err


def test_without_an_accelerator_the_kit_asks_for_a_dry_run(capsys: pytest.CaptureFixture[str]):
    assert main(["kernels"]) == 2
    assert "add --dry" in capsys.readouterr().err


@pytest.mark.proof
def test_dry_load_starts_servers_and_leaves_their_report(tmp_path: Path):
    done = run_sh("load", "--dry", out=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert json.loads((tmp_path / "load.json").read_text())["notes"] == ["tiny: exit status 0, `load_tiny/report.md`"]
    text = (tmp_path / "load_tiny" / "report.md").read_text()
    assert "stride-2" in text and "stride-1" in text
    assert not (tmp_path / "load_tiny" / "prompts.jsonl").exists()


def test_kernels_need_no_package_of_the_model_the_server_or_training():
    absent = (
        "transformers",
        "safetensors",
        "pydantic",
        "omegaconf",
        "grain",
        "orbax",
        "tensorboardX",
        "httpx2",
        "typer",
    )
    program = f"import sys; sys.modules |= dict.fromkeys({absent}); from benchmarks.device.__main__ import main; "
    program += "main(['kernels', '--dry', '--only', 'gated_lora', '--shapes', 'no such case'])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "no case of gated_lora holds 'no such case' in its name" in done.stderr, done.stderr[-2000:]
