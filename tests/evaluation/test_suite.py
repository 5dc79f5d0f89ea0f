"""The committed files: the suite and the published figures; and what a malformed one is told."""

from pathlib import Path

import pytest

from idlm_jax.evaluation.suite import load_suite
from idlm_jax.evaluation.summary import read_published

# Of the columns of the project page, added up from its own text: a typo in the copy shows.
SUMS = {
    **{"I-DLM-8B": 1089.0, "I-DLM-32B": 1168.2, "Qwen3-8B": 1115.6},
    **{"Qwen3-32B": 1173.1, "SDAR-8B": 763.5, "LLaDA-2.1-mini": 955.3},
}


def write(folder: Path, benchmark: str) -> str:
    file = folder / "mine.yaml"
    file.write_text(f"name: mine\nsampling: {{temperature: 0, max_tokens: 9}}\nbenchmarks:\n  - {{{benchmark}}}\n")
    return str(file)


def test_idlm15_has_the_papers_benchmarks_and_settings():
    suite = load_suite("idlm15")
    assert [each.title for each in suite.benchmarks] == [
        *("ARC-C", "MMLU", "MMLU-Pro", "GPQA-D", "GPQA", "GSM8K", "MATH-500", "MathBench", "AIME-24", "AIME-25"),
        *("HumanEval", "MBPP", "LiveCodeBench-v6", "IFEval"),
    ]
    assert suite.sampling.model_dump() == {"temperature": 1.0, "top_k": 50, "top_p": 0.95, "max_tokens": 32768}
    assert {each.name for each in suite.benchmarks if each.runs_code} == {"humaneval", "mbpp", "livecodebench_v6"}
    assert [each.name for each in suite.benchmarks if each.harness is None] == ["mathbench"]


def test_published_figures_belong_to_the_suite_and_add_up_to_the_sources():
    published = read_published()
    names = {each.name for each in load_suite("idlm15").benchmarks}
    figures = {model.name: model.scores for model in published.models}
    assert list(figures) == ["I-DLM-8B", "I-DLM-32B", "Qwen3-8B", "Qwen3-32B", "SDAR-8B", "LLaDA-2.1-mini"]
    assert names - set(figures["SDAR-8B"]) == {"gpqa"}  # not published
    assert all(set(scores) == names for model, scores in figures.items() if model != "SDAR-8B")
    assert {model: round(sum(scores.values()), 1) for model, scores in figures.items()} == SUMS
    assert all(source.url.startswith("https://") and source.seen for source in published.sources.values())
    assert all(model.sources for model in published.models)


def test_tasks_are_chosen_by_name_and_an_unknown_one_is_told_the_known():
    suite = load_suite("idlm15")
    assert [each.name for each in suite.choose(["math500", "gsm8k"])] == ["gsm8k", "math500"]
    with pytest.raises(ValueError, match=r"suite idlm15 has no gsm9k; it has arc_challenge, mmlu, "):
        suite.choose(["gsm9k", "mmlu"])


def test_a_suite_of_ones_own_names_its_tasks_beside_itself(tmp_path):
    file = write(tmp_path, "name: a, title: A, harness: lm_eval, task: t, metric: m")
    Path(file).write_text(Path(file).read_text() + "include: tasks\n")
    assert load_suite(file).include == tmp_path / "tasks"


@pytest.mark.parametrize(
    ("benchmark", "message"),
    [
        (
            "name: a, title: A, harness: other, task: t",
            "benchmarks.0.harness: Input should be 'lm_eval' or",
        ),
        ("name: a, title: A, harness: lm_eval, task: t", "lm-eval reports several metrics, name one"),
        ("name: a, title: A, harness: evalscope", "a harness needs its name for the task"),
        ("name: ../a, title: A, harness: evalscope, task: t", "benchmarks.0.name: String should match pattern"),
        ("name: a, title: A, harness: evalscope, task: t, shots: 3", "benchmarks.0.shots: Extra inputs are not"),
        (
            "name: a, title: A, harness: lm_eval, task: t, metric: m, runs_code: true",
            "programs that a model writes run under evalscope only",
        ),
    ],
)
def test_a_malformed_suite_is_named_with_the_key(tmp_path, benchmark, message):
    with pytest.raises(ValueError, match=message) as error:
        load_suite(write(tmp_path, benchmark))
    assert "mine.yaml" in str(error.value)


def test_neither_a_name_nor_a_file_is_told_the_names():
    with pytest.raises(ValueError, match="--suite 'idlm16' is neither a YAML file nor one of idlm15"):
        load_suite("idlm16")
