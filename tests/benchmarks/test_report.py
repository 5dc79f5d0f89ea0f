"""docs/results.md is what the committed results say, and nothing else."""

from pathlib import Path

from benchmarks import report

ROOT = Path(__file__).parents[2]


def test_the_committed_page_is_what_the_committed_results_give():
    assert report.page(ROOT / "benchmarks" / "results") == (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
