"""The real harnesses, from `make harnesses`: they know the suite's tasks, and the whole way through works offline.

The questions are this repository's own; no benchmark's data is in it.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import idlm_jax
from idlm_jax.evaluation.suite import load_suite

ROOT = Path(__file__).parents[2]
LM_EVAL = Path(os.environ.get("LM_EVAL", ROOT / ".venv-eval" / "bin" / "lm_eval"))
EVALSCOPE = Path(os.environ.get("EVALSCOPE", ROOT / ".venv-evalscope" / "bin" / "evalscope"))
MODEL, ADAPTER = ROOT / "assets" / "tiny-qwen3-py", ROOT / "assets" / "tiny-qwen3-py-isd"
PROMPTS = ["def main():\n    ", "import os\nimport ", "for name in ", "class Parser:\n    def "]
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
MAX_TOKENS = 24

pytestmark = pytest.mark.proof

LINES = """
name: lines
api: completions
include: .
sampling: {temperature: 0, max_tokens: 24}
benchmarks:
  - {name: lines, title: First lines, harness: lm_eval, task: lines, metric: "exact_match,first-line"}
"""
LINES_TASK = """
task: lines
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
target_delimiter: ""
generation_kwargs: {until: ["\\n"], do_sample: false}
filter_list:
  - name: first-line
    filter: [{function: regex, regex_pattern: "^([^\\n]*)"}, {function: take_first}]
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
PROGRAMS = """
name: programs
sampling: {temperature: 1.0, top_k: 50, top_p: 0.95, max_tokens: 64}
benchmarks:
  - name: programs
    title: Programs
    harness: evalscope
    task: humaneval
    runs_code: true
    dataset_args: {dataset_id: DATA, subset_list: [default], filters: {remove_until: </think>}}
"""
PROBLEMS = [
    {"entry_point": "add", "prompt": 'def add(a, b):\n    """Sum."""\n', "test": "assert candidate(2, 3) == 5"},
    {"entry_point": "sub", "prompt": 'def sub(a, b):\n    """Difference."""\n', "test": "assert candidate(2, 3) == -1"},
]


def idlm_eval(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from idlm_jax.cli import main; main()", "eval", *map(str, arguments)]
    command += ["--lm-eval", str(LM_EVAL), "--evalscope", str(EVALSCOPE)]
    return subprocess.run(command, env=os.environ | OFFLINE, cwd=ROOT, capture_output=True, text=True, timeout=400)


@pytest.mark.parametrize(
    ("program", "harness", "ask"),
    [
        (LM_EVAL, "lm_eval", "from lm_eval.tasks import TaskManager; print(*TaskManager().all_tasks)"),
        (
            EVALSCOPE,
            "evalscope",
            "import evalscope.benchmarks; from evalscope.api.registry import BENCHMARK_REGISTRY as all; print(*all)",
        ),
    ],
)
def test_the_harness_knows_the_suites_tasks_by_these_names(program, harness, ask):
    assert program.exists(), f"no {program}: run `make harnesses`"
    python = program.with_name("python")
    done = subprocess.run([python, "-c", ask], env=os.environ | OFFLINE, capture_output=True, text=True, timeout=240)
    known = set(done.stdout.split())
    asked = {each.task for each in load_suite("idlm15").benchmarks if each.harness == harness}
    assert asked and asked <= known, (asked - known, done.stderr)
    assert not any(re.search("mathbench", name, re.IGNORECASE) for name in known)  # why the suite leaves it open


def test_a_model_folder_becomes_a_table(tmp_path):
    """Server, harness, summary; the last answer is wrong on purpose."""
    lm = idlm_jax.load(MODEL, dtype="float32")
    params = idlm_jax.SamplingParams(max_tokens=MAX_TOKENS)
    # The harness's regex filter strips what it finds.
    answers = [each.text.partition("\n")[0].strip() for each in idlm_jax.generate(lm, PROMPTS, idlm_jax.AR(), params)]
    assert all(answers)
    answers[-1] += "!"
    data = tmp_path / "lines.jsonl"
    docs = [{"prompt": prompt, "answer": answer} for prompt, answer in zip(PROMPTS, answers, strict=True)]
    data.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    (tmp_path / "suite.yaml").write_text(LINES)
    (tmp_path / "lines.yaml").write_text(LINES_TASK.replace("DATA", str(data)))
    out = tmp_path / "out"
    small = "--dtype float32 --max-running-requests 2 --no-extras --max-logprobs -1 --max-total-tokens 2048"
    done = idlm_eval(
        *("--suite", tmp_path / "suite.yaml", MODEL, "--adapter", ADAPTER, "--serve-args", small, "--output", out)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((out / "lines" / "result.json").read_text())
    assert (result["percent"], result["num_samples"], result["harness"]) == (75.0, 4, "lm-eval 0.4.13")
    assert result["num_tokens"] == len(PROMPTS) * MAX_TOKENS
    assert 1.0 < result["tokens_per_forward"] < 4.0 and 0.0 < result["acceptance_rate"] < 1.0
    flags = json.loads((out / "run.json").read_text())["server_flags"]
    assert flags[-2:] == ["--stride", "4"] and str(ADAPTER) in flags
    assert "75.0" in done.stdout and "75.0" in (out / "summary.md").read_text()


def test_programs_are_executed_in_the_sandbox_and_answers_are_asked_for_once(tmp_path, server):
    folder = tmp_path / "problems"
    folder.mkdir()
    lines = []
    for number, each in enumerate(PROBLEMS):
        test = f"def check(candidate):\n    {each['test']}\n"
        lines.append(json.dumps(each | {"test": test, "task_id": f"own/{number}", "canonical_solution": "pass"}) + "\n")
    (folder / "test.jsonl").write_text("".join(lines))
    (tmp_path / "suite.yaml").write_text(PROGRAMS.replace("DATA", str(folder)))
    outside = tmp_path / "outside.txt"
    # The first program is right only where it cannot write; the second is wrong.
    tries = f"    try:\n        open({str(outside)!r}, 'w')\n    except OSError:\n        return a + b\n"
    server.answer = lambda prompt: (
        f"<think>```python\nno\n```</think>\n```python\ndef add(a, b):\n{tries}```\n"
        if "add" in prompt
        else "```python\ndef sub(a, b):\n    return b\n```"
    )
    arguments = ("--suite", tmp_path / "suite.yaml", "--url", server.url, "--output", tmp_path / "out")
    done = idlm_eval(*arguments, "--allow-code-execution")
    assert done.returncode == 0, done.stdout + done.stderr
    file = tmp_path / "out" / "programs" / "result.json"
    result = json.loads(file.read_text())
    assert (result["percent"], result["num_samples"], result["sandbox"]) == (50.0, 2, "isolated")
    assert result["harness"] == "evalscope 1.14.1" and not outside.exists()
    assert [body["top_k"] for body in server.asked] == [50, 50]
    file.unlink()  # as if it had been stopped just before
    assert idlm_eval(*arguments, "--allow-code-execution").returncode == 0
    assert json.loads(file.read_text())["percent"] == 50.0 and len(server.asked) == 2
