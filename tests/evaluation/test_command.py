"""`idlm eval --suite` as a command: what it prints and writes, its exit codes, and what it refuses."""

import json
import sys
from pathlib import Path

import pytest

from idlm_jax import cli
from idlm_jax.evaluation import evalscope, lm_eval
from idlm_jax.evaluation.harness import find_program

SUITE = """
name: mine
sampling: {temperature: 1.0, top_k: 50, top_p: 0.95, max_tokens: 64}
benchmarks:
  - {name: gsm8k, title: GSM8K, harness: lm_eval, task: plain, metric: "exact_match,none", note: Last number.}
  - {name: humaneval, title: HumanEval, harness: evalscope, task: report, runs_code: true}
  - {name: mathbench, title: MathBench, harness: null, note: OpenCompass has it.}
  - {name: other, title: Other, harness: lm_eval, task: breaks, metric: "exact_match,none"}
"""


@pytest.fixture
def run(monkeypatch, tmp_path, server, harness):
    suite = tmp_path / "mine.yaml"
    suite.write_text(SUITE)

    def call(*arguments: object, url: str | None = server.url) -> int:
        programs = ["--lm-eval", harness, "--evalscope", harness, "--output", tmp_path / "out"]
        where = [] if url is None else ["--url", url]
        command = ["idlm", "eval", "--suite", suite, *where, *programs, *arguments]
        monkeypatch.setattr(sys, "argv", [str(each) for each in command])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
            sys.exit(0)
        return stopped.value.code or 0

    return call


def rows(text: str) -> dict[str, list[str]]:
    """Cells of a Markdown table by the first."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {cells[0]: cells[1:] for cells in lines}


def test_a_subset_ends_in_one_table_beside_the_published_figures(run, tmp_path, capsys):
    assert run("--tasks", "gsm8k,humaneval", "--allow-code-execution") == 0
    table = rows((tmp_path / "out" / "summary.md").read_text())
    assert table["benchmark"][:6] == ["here", "questions", "TPF", "acceptance", "I-DLM-8B", "I-DLM-32B"]
    # Tokens of the benchmark alone: 25 for ten forwards; the server checked no new draft meanwhile.
    assert table["GSM8K"] == ["25.0 ± 12.5", "2", "2.50", "-", "95.0", "94.9", "96.0", "94.7", "91.7", "89.0"]
    assert table["HumanEval"][:2] == ["0.0", "7"]
    assert table["MathBench"] == ["not run", "-", "-", "-", "89.1", "95.6", "93.1", "95.5", "76.9", "84.2"]
    assert table["Other"][0] == "not run" and table["Other"][4:] == ["-"] * 6
    said = capsys.readouterr().out
    assert "GSM8K" in said and "25.0 ± 12.5" in said and "summary.md" in said
    content = json.loads((tmp_path / "out" / "summary.json").read_text())
    by_name = {each["name"]: each for each in content["benchmarks"]}
    assert by_name["gsm8k"]["result"]["percent"] == 25.0 and by_name["gsm8k"]["published"]["Qwen3-8B"] == 96.0
    assert by_name["humaneval"]["result"]["sandbox"] == "isolated"
    assert by_name["other"]["result"] is None and by_name["other"]["why_no_result"] == "not asked for"
    assert content["asked"]["temperature"] == 1.0
    assert content["sources"]["I-DLM-32B"][0]["url"] == "https://introspective-diffusion.github.io/"


def test_a_failure_exits_with_1_and_still_writes_the_table(run, tmp_path, capsys):
    assert run() == 1
    text = (tmp_path / "out" / "summary.md").read_text()
    table = rows(text)
    assert (table["GSM8K"][0], table["Other"][0], table["HumanEval"][0]) == ("25.0 ± 12.5", "not run", "not run")
    said = capsys.readouterr().out
    assert "Other: its harness ended with 3: the server said 500" in said
    assert "HumanEval: it executes programs that the model writes: --allow-code-execution" in said
    assert "MathBench: OpenCompass has it." in said
    assert "**MathBench** (OpenCompass has it.)" in text and "Last number." in text


def test_a_part_of_the_questions_is_said_in_the_title(run, tmp_path):
    assert run("--tasks", "gsm8k", "--limit", "5") == 0
    title = (tmp_path / "out" / "summary.md").read_text().splitlines()[0]
    assert title == "# mine: fake, the first 5 questions of each part only"


def test_options_replace_the_suites_sampling_and_a_folder_keeps_to_one(run, tmp_path, capsys):
    assert run("--tasks", "gsm8k", "--temperature", "0", "--max-tokens", "7") == 0
    assert json.loads((tmp_path / "out" / "run.json").read_text())["max_tokens"] == 7
    assert run("--tasks", "gsm8k") == 2
    assert "temperature 0.0 (now 1.0)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "url", "message"),
    [
        ([], None, "give either MODEL, to start a server with it, or --url of one that runs"),
        (["assets/tiny-qwen3-py"], "http://127.0.0.1:1/v1", "give either MODEL"),
        (["--tasks", "gsm8k"], "127.0.0.1:30000", "--url '127.0.0.1:30000' must be as in http://127.0.0.1:30000/v1"),
        (["--tasks", "gsm8k"], "http://127.0.0.1:1/v1", "cannot reach the server at http://127.0.0.1:1/v1/models"),
        (
            ["--tasks", "humaneval"],
            "http://h/v1",
            "humaneval: it executes programs that the model writes: --allow",
        ),
        (["--tasks", "mathbench"], "http://h/v1", "mathbench: OpenCompass has it."),
        (["--tasks", "nothing"], "http://h/v1", "suite mine has no nothing; it has gsm8k, humaneval"),
        (["--serve-args", "--tp-size 2"], "http://h/v1", "--adapter and --serve-args belong to MODEL"),
        (["--temperature", "-1"], "http://h/v1", "--temperature: Input should be greater than or equal to 0"),
        (["--tasks", "humaneval", "--allow-code-execution"], "https://h/v1", "reach http:// servers only"),
        (["--lm-eval", "/nowhere/lm_eval"], "http://h/v1", "/nowhere/lm_eval does not exist"),
    ],
)
def test_what_it_cannot_do_is_one_line_and_exit_code_2(run, capsys, arguments, url, message):
    assert run(*arguments, url=url) == 2
    said = capsys.readouterr().err
    assert said.startswith("idlm: ") and message in said and said.count("\n") == 1


def test_programs_are_not_run_where_they_cannot_be_isolated_unless_told(run, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("idlm_jax.evaluation.sandbox.UNSHARE", ("false",))
    assert run("--tasks", "humaneval", "--allow-code-execution") == 2
    assert "cannot be isolated here (unshare ended with 1)" in capsys.readouterr().err
    assert run("--tasks", "humaneval", "--allow-code-execution", "--without-isolation") == 0
    content = json.loads((tmp_path / "out" / "humaneval" / "result.json").read_text())
    assert content["sandbox"] == "limits only"


@pytest.mark.parametrize(("name", "install"), [("lm_eval", lm_eval.INSTALL), ("evalscope", evalscope.INSTALL)])
def test_a_missing_harness_is_told_how_to_get_it(monkeypatch, tmp_path, name, install):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=f"{name} is not installed, .*make harnesses") as error:
        find_program(name, None, tmp_path / ".venv", install)
    assert f"--{name.replace('_', '-')}" in str(error.value) and "==" in str(error.value)
    program = tmp_path / name
    program.touch(mode=0o755)
    assert find_program(name, None, tmp_path / ".venv", install) == program


def test_both_ways_of_eval_explain_themselves(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")  # else long options are cut
    for arguments, shown, hidden in (
        (["--help"], "idlm pack", "--allow-code-execution"),
        (["--suite", "idlm15", "--help"], "--allow-code-execution", "idlm pack"),
        (["--suite=idlm15", "--help"], "--allow-code-execution", "idlm pack"),
    ):
        monkeypatch.setattr(sys, "argv", ["idlm", "eval", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert not stopped.value.code
        said = capsys.readouterr().out
        assert shown in said and hidden not in said and "--suite idlm15" in said


def test_the_programs_of_a_checkout_are_found_first(monkeypatch, tmp_path: Path):
    ours = tmp_path / ".venv-eval" / "bin" / "lm_eval"
    ours.parent.mkdir(parents=True)
    ours.touch()
    assert find_program("lm_eval", None, tmp_path / ".venv-eval", "") == ours
