"""Benchmarks one after the other, with a program that stands for the harnesses."""

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from idlm_jax.evaluation.harness import Options, Target
from idlm_jax.evaluation.run import Run, read_result, run_benchmarks
from idlm_jax.evaluation.sandbox import Limits
from idlm_jax.evaluation.suite import Benchmark, Sampling, Suite


def lm_eval(task: str, metric: str = "exact_match,none", **other: Any) -> Benchmark:
    return Benchmark(name=f"a_{task}", title=task, harness="lm_eval", task=task, metric=metric, **other)


def evalscope(task: str, **other: Any) -> Benchmark:
    return Benchmark(name=f"b_{task}", title=task, harness="evalscope", task=task, **other)


@pytest.fixture
def prepare(server, harness, tmp_path):
    def make(*benchmarks: Benchmark, limit: int | None = None, api: str = "chat", **run: Any) -> Run:
        sampling = Sampling(temperature=1.0, top_k=50, top_p=0.95, max_tokens=64)
        return Run(
            suite=Suite.model_validate({"name": "s", "api": api, "sampling": sampling, "benchmarks": benchmarks}),
            target=Target(url=server.url, model="fake", api_key="a key"),
            options=Options(limit=limit, concurrency=3),
            programs={"lm_eval": harness, "evalscope": harness},
            folder=tmp_path / "out",
            limits=Limits(),
            **({"is_isolated": True} | run),
        )

    return make


def go(run: Run) -> dict[str, str]:
    return run_benchmarks(run, run.suite.benchmarks)


def calls(run: Run, benchmark: Benchmark) -> list[dict[str, Any]]:
    """Of the harness, outside the sandbox and then inside it."""
    files = [run.folder / benchmark.name / part / "calls.jsonl" for part in (".", "inside")]
    return [json.loads(line) for file in files if file.exists() for line in file.read_text().splitlines()]


def value_of(call: dict[str, Any], option: str) -> str:
    return call["argv"][call["argv"].index(option) + 1]


def test_scores_and_what_the_server_counted_meanwhile_are_kept(prepare):
    plain, grouped, report = lm_eval("plain"), lm_eval("group", "exact_match,other"), evalscope("report")
    run = prepare(plain, grouped, report)
    assert go(run) == {}
    result = read_result(run.folder, plain)
    assert (result.percent, result.stderr_percent, result.num_samples) == (25.0, 12.5, 2)
    assert (result.tokens_per_forward, result.acceptance_rate, result.num_tokens) == (2.5, None, 25)
    assert (result.harness, result.sandbox) == ("lm-eval 0.4.13", None)
    grouped_result = read_result(run.folder, grouped)
    assert (grouped_result.percent, grouped_result.stderr_percent, grouped_result.num_samples) == (50.0, None, 6)
    primary = read_result(run.folder, report)  # the report's other metric says 50
    assert (primary.percent, primary.num_samples) == (0.0, 7)


def test_a_server_that_does_not_count_like_ours_leaves_them_open(prepare, server):
    server.counts = False
    run = prepare(lm_eval("plain"))
    assert go(run) == {}
    result = read_result(run.folder, run.suite.benchmarks[0])
    assert (result.percent, result.tokens_per_forward, result.num_tokens) == (25.0, None, None)


def test_harnesses_are_told_the_suites_sampling_and_where_to_ask(prepare, server):
    ours, theirs = lm_eval("plain", num_fewshot=0), evalscope("report", dataset_args={"subset_list": ["v6"]})
    run = prepare(ours, theirs, limit=5)
    go(run)
    (call,) = calls(run, ours)
    model = json.loads(value_of(call, "--model_args"))
    assert (model["base_url"], model["model"]) == (server.url + "/chat/completions", "fake")
    assert (model["num_concurrent"], model["timeout"], model["think_end_token"]) == (3, 7200, "</think>")
    sampling = json.loads(value_of(call, "--gen_kwargs"))
    assert sampling == {"until": [], "temperature": 1.0, "top_k": 50, "top_p": 0.95, "max_gen_toks": 64}
    assert (value_of(call, "--limit"), value_of(call, "--num_fewshot")) == ("5", "0")
    assert "--apply_chat_template" in call["argv"] and "a key" not in call["argv"]
    assert call["environment"]["OPENAI_API_KEY"] == "a key"
    (call,) = calls(run, theirs)
    sampling = json.loads(value_of(call, "--generation-config"))
    assert {name: sampling[name] for name in ("temperature", "top_p", "max_tokens", "extra_body", "seed")} == {
        "temperature": 1.0,
        "top_p": 0.95,
        "max_tokens": 64,
        "extra_body": {"top_k": 50},
        "seed": 1234,
    }
    assert json.loads(value_of(call, "--dataset-args")) == {"report": {"subset_list": ["v6"]}}
    assert (value_of(call, "--api-url"), value_of(call, "--limit")) == (server.url, "5")


def test_prompts_of_base_models_go_to_completions_and_not_through_evalscope(prepare, server):
    run = prepare(lm_eval("plain"), api="completions")
    go(run)
    (call,) = calls(run, run.suite.benchmarks[0])
    assert json.loads(value_of(call, "--model_args"))["base_url"] == server.url + "/completions"
    assert value_of(call, "--model") == "local-completions" and "--apply_chat_template" not in call["argv"]
    with pytest.raises(ValueError, match="evalscope asks /v1/chat/completions only"):
        go(prepare(evalscope("report"), api="completions"))


def test_one_failure_leaves_the_others_and_a_second_call_runs_only_what_is_missing(prepare):
    breaks, silent, partial, plain = lm_eval("breaks"), lm_eval("silent"), evalscope("partial"), lm_eval("plain")
    run = prepare(breaks, silent, partial, plain)
    failures = go(run)
    assert set(failures) == {"a_breaks", "a_silent", "b_partial"}
    assert "ended with 3: the server said 500" in failures["a_breaks"]
    assert failures["a_silent"] == "it wrote no results"
    assert "some questions have no answer" in failures["b_partial"]
    assert read_result(run.folder, plain) is not None and read_result(run.folder, breaks) is None
    (run.folder / "a_breaks" / "mended").touch()
    assert set(go(run)) == {"a_silent", "b_partial"}
    assert [len(calls(run, each)) for each in (breaks, silent, partial, plain)] == [2, 2, 2, 1]


def test_a_metric_that_the_harness_does_not_report_is_named_with_those_it_does(prepare):
    failures = go(prepare(lm_eval("plain", "exact_match,flexible")))
    assert "no 'exact_match,flexible' for plain, only ['exact_match,none'" in failures["a_plain"]


@pytest.mark.parametrize(
    "change",
    [{"temperature": 0.0}, {"max_tokens": 65}, {"limit": 3}, {"model": "other"}, {"seed": 1}, {"server_flags": ["x"]}],
    ids=str,
)
def test_a_folder_does_not_mix_runs_that_asked_for_different_things(prepare, change):
    run = prepare(lm_eval("plain"))
    go(run)
    file = run.folder / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=f"holds a run with {next(iter(change))} .*give another --output"):
        go(run)


def test_ctrl_c_stops_the_harness_and_keeps_what_is_finished(prepare):
    plain, hangs = lm_eval("plain"), lm_eval("hangs")
    run = prepare(plain, hangs)
    pid_file = run.folder / hangs.name / "pid"

    def interrupt() -> None:
        while not pid_file.exists() or not pid_file.read_text():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    # Tests that a shell runs in the background have the signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            go(run)
    finally:
        signal.signal(signal.SIGINT, before)
    thread.join()
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)
    assert read_result(run.folder, plain) is not None and read_result(run.folder, hangs) is None


def test_programs_of_the_model_run_in_the_sandbox_which_reaches_the_server_alone(prepare, server):
    asks = evalscope("asks", runs_code=True)
    run = prepare(asks)
    assert go(run) == {}
    result = read_result(run.folder, asks)
    assert (result.percent, result.sandbox) == (100.0, "isolated")  # 100: it got the server's answer
    prefetch, call = calls(run, asks)
    assert value_of(prefetch, "--eval-type") == "mock_llm"  # no program of the model's outside
    assert value_of(call, "--api-url") == "http://127.0.0.1:30000/v1" != server.url
    assert call["environment"]["HF_HUB_OFFLINE"] == "1" and "OPENAI_API_KEY" not in call["environment"]
    inside = (run.folder / asks.name / "inside").resolve()
    assert Path(call["environment"]["HOME"]).is_relative_to(inside)
    # Nothing that this program writes lies where programs of the model could lay a link.
    assert {file.name for file in (run.folder / asks.name).iterdir() if file.is_file()} == {
        *("calls.jsonl", "fetched", "harness.log", "result.json")
    }
    (run.folder / asks.name / "result.json").unlink()
    assert go(run) == {} and len(calls(run, asks)) == 3  # fetched once


def test_a_result_file_of_something_else_is_an_error_with_its_name(prepare):
    run = prepare(lm_eval("plain"))
    go(run)
    file = run.folder / "a_plain" / "result.json"
    file.write_text('{"percent": 3}')
    with pytest.raises(ValueError, match=r"a_plain/result\.json is no result"):
        go(run)
