"""What docs/results.md says of accelerators: read from the kit's own files, dry runs and cases not reached left out."""

import json
from pathlib import Path

import pytest

from benchmarks.device.convert import Conversion
from benchmarks.device.report import Report
from benchmarks.device.serve_steps import ServeSpeed
from benchmarks.device_results import section
from idlm_jax.qwen3_sizes import QWEN3_SIZES

ENVIRONMENT = {
    "device": "Some GPU",
    "platform": "gpu",
    "driver": "1",
    "jax": "2",
    "jaxlib": "3",
    "triton": "4",
    "date": "2026-01-02 03:04 UTC",
    "command": "benchmarks/device/run.sh serve",
}
STEPS = [
    ServeSpeed(case="Qwen3-8B_n1_b2_1000", median_ms=10.0, iqr_ms=0.2, break_even=1.0),
    ServeSpeed(case="Qwen3-8B_n4_b2_1000", median_ms=12.0, iqr_ms=0.4, break_even=1.2),
    ServeSpeed(case="Qwen3-8B_n4r7_b2_1000", median_ms=12.5, iqr_ms=0.4, break_even=1.25),
    ServeSpeed(case="Qwen3-8B_n8_b2_1000", note="skipped (time)"),
]


def wrote(folder: Path, *, is_dry: bool = False) -> None:
    Report(environment=ENVIRONMENT, is_dry=is_dry, serving=STEPS).write(folder, "serve")


def test_a_run_is_told_with_device_versions_and_command(tmp_path: Path):
    wrote(tmp_path / "2026-01-02-some-gpu")
    text = section(tmp_path)
    assert "### Some GPU, 2026-01-02\n" in text
    assert "driver 1, jax 2, jaxlib 3, triton 4: `benchmarks/device/run.sh serve`." in text
    assert "| Qwen3-8B | 2 | 1000 | ISD, N = 4 | 12.00 ± 0.20 |  | 1.200 |" in text
    assert "| Qwen3-8B | 2 | 1000 | ISD, N = 4, 7 rows | 12.50 ± 0.20 |  | 1.250 |" in text
    assert "N = 8" not in text
    assert "Not reached in the time of this run: 1 cases." in text


def test_what_a_step_reads_is_held_against_the_copy_of_the_same_run(tmp_path: Path):
    wrote(tmp_path / "run")
    floors = {"copy_gb_s": 2000.0}
    (tmp_path / "run" / "kernels.json").write_text(
        json.dumps({**vars(Report(environment=ENVIRONMENT, is_dry=False)), "floors": floors})
    )
    weights = 36 * (2 * 4096 + 2 * 128 + 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 12_288) + 4096 + 151_936 * 4096
    cache = 2 * 36 * 8 * 128 * 2 * 1000
    assert QWEN3_SIZES["Qwen3-8B"].num_params == weights + 151_936 * 4096
    least_ms = 2 * (weights + cache) / 2e9
    assert f"| 10.00 ± 0.10 | {least_ms:.2f} ms, {least_ms / 10:.0%} | 1.000 |" in section(tmp_path)


@pytest.mark.parametrize("has_dry", [True, False])
def test_without_a_run_on_an_accelerator_there_is_no_section(tmp_path: Path, has_dry: bool):
    if has_dry:
        wrote(tmp_path / "dry", is_dry=True)
    (tmp_path / "branches").mkdir()
    (tmp_path / "branches" / "tiny-cpu.json").write_text('{"device": "cpu"}')
    assert section(tmp_path) == ""


def test_conversions_and_the_lines_of_parts_that_write_their_own_report_are_told(tmp_path: Path):
    heldout = {"ce_clean": 2.5, "loss": 3.0, "acceptance": 0.625, "acceptance/depth_0": 0.75, "acceptance/depth_1": 0.5}
    rates = {"ISD N=4, T=0": 2.25, "ISD N=4, T=0: prompts unlike AR": 3.0, "ISD N=4, T=1": 2.0}
    conversions = [
        Conversion(case="parent", steps=1200, tokens=78_600_000, heldout={"ce_clean": 2.4, "loss": 2.4}),
        Conversion(case="adapter_ours", steps=40, tokens=2_600_000, heldout=heldout, tokens_per_forward=rates),
        Conversion(case="full_paper", note="skipped (time)"),
    ]
    report = Report(environment=ENVIRONMENT, is_dry=False, conversions=conversions, notes=["greedy: exit status 0"])
    report.write(tmp_path / "run", "convert")
    text = section(tmp_path)
    assert "| parent | 1,200 | 78.6 | 2.400 |  |  |  |" in text
    assert "| adapter_ours | 40 | 2.6 | 2.500 | 0.625 | 0.750 0.500 |  |" in text
    assert "| adapter_ours | ISD N=4, T=0 | 2.250 | 3 |" in text
    assert "| adapter_ours | ISD N=4, T=1 | 2.000 |  |" in text
    assert "full_paper" not in text and "Not reached in the time of this run: 1 cases." in text
    assert "greedy: exit status 0" in text
