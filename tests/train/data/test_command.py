from typer.testing import CliRunner

from train.data.__main__ import app


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_build_writes_a_dataset_and_says_what_is_in_it(corpus_dir, tmp_path):
    arguments = (
        "build",
        "--out",
        tmp_path / "set",
        "--root",
        corpus_dir,
        "--vocab-size",
        300,
        "--max-seq-len",
        64,
    )
    arguments += ("--heldout-fraction", 0.2)
    first = run(*arguments)
    assert first.exit_code == 0, first.output
    assert (tmp_path / "set" / "meta.json").is_file() and "built in" in first.output
    assert "already built" in run(*arguments).output


def test_show_prints_the_counts_and_a_row_as_text(dataset):
    folder, report = dataset
    result = run("show", folder)
    assert result.exit_code == 0, result.output
    assert f"{report.train.tokens:,}" in result.output
    assert "--- row 0, document 1:" in result.output and "def " in result.output


def test_mistakes_end_with_one_line_and_status_1(dataset, tmp_path):
    for arguments in (
        ("build", "--out", tmp_path / "set", "--root", tmp_path / "nowhere"),
        ("show", tmp_path),
        ("show", dataset[0], "--row", 10**6),
    ):
        result = run(*arguments)
        assert result.exit_code == 1
        assert result.stderr.splitlines()[-1].startswith("error: ")
