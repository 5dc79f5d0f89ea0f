"""EleutherAI's lm-evaluation-harness 0.4.13: its command, and the score in what it writes."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from idlm_jax.evaluation.harness import HarnessFailed, Options, Score, Target, sampling_arguments
from idlm_jax.evaluation.suite import Benchmark, Suite

VERSION = "0.4.13"
INSTALL = (
    "run `make harnesses` in a checkout, or install lm_eval[api,math,ifeval]=="
    f"{VERSION} into an environment of its own and name its program with --lm-eval"
)
# What tasks would cut answers at, `until`, also cuts thoughts: "Question:", a blank line. The model ends by itself.
NO_STOP = {"until": []}


def command(
    program: Path, suite: Suite, benchmark: Benchmark, target: Target, options: Options, folder: Path
) -> list[str]:
    """Asks the server all questions of a benchmark; a second call finds the answers in `folder/answers`."""
    path = {"chat": "chat/completions", "completions": "completions"}[suite.api]
    model = {
        "model": target.model,
        "base_url": f"{target.url}/{path}",
        "num_concurrent": options.concurrency,
        "timeout": options.timeout_s,
        "seed": options.seed,
        "max_retries": 3,
        "tokenized_requests": False,
        "tokenizer_backend": None,
    }
    if suite.api == "chat":
        # From servers that leave thoughts in the answer; ours sends them apart.
        model["think_end_token"] = "</think>"
    arguments = [str(program), "run", "--model", f"local-{suite.api.replace('chat', 'chat-completions')}"]
    arguments += ["--model_args", json.dumps(model), "--tasks", benchmark.task]
    # Not do_sample: the server samples by temperature, and with it the harness would keep no answers.
    arguments += ["--gen_kwargs", json.dumps(NO_STOP | sampling_arguments(suite, max_tokens="max_gen_toks"))]
    arguments += ["--use_cache", str(folder / "answers"), "--output_path", str(folder / "raw"), "--log_samples"]
    if suite.api == "chat":
        arguments += ["--apply_chat_template"]
    if benchmark.num_fewshot is not None:
        arguments += ["--num_fewshot", str(benchmark.num_fewshot)]
    if options.limit is not None:
        arguments += ["--limit", str(options.limit)]
    if suite.include is not None:
        arguments += ["--include_path", str(suite.include)]
    return arguments


def environment(target: Target) -> Mapping[str, str]:
    """Variables for the program."""
    return {"OPENAI_API_KEY": target.api_key or "none"}


def read_score(benchmark: Benchmark, folder: Path) -> Score:
    """The score in the newest results file.

    Raises:
        HarnessFailed: there is no such file, or not this metric in it.
    """
    files = sorted((folder / "raw").rglob("results_*.json"), key=lambda file: file.stat().st_mtime_ns)
    if not files:
        raise HarnessFailed("it wrote no results")
    content: dict[str, Any] = json.loads(files[-1].read_text())
    found: dict[str, Any] = content["results"].get(benchmark.task, {})
    if not isinstance(value := found.get(benchmark.metric), int | float) or math.isnan(value):
        raise HarnessFailed(f"its results have no {benchmark.metric!r} for {benchmark.task}, only {sorted(found)}")
    name, _, rule = benchmark.metric.partition(",")
    stderr = found.get(f"{name}_stderr,{rule}")
    # A group's subjects are listed one by one.
    subtasks = content.get("group_subtasks", {}).get(benchmark.task) or [benchmark.task]
    return Score(
        percent=100 * value,
        stderr_percent=100 * stderr if isinstance(stderr, int | float) and not math.isnan(stderr) else None,
        num_samples=_num_samples(content, subtasks),
        version=f"lm-eval {content.get('lm_eval_version', '?')}",
    )


def _num_samples(content: dict[str, Any], tasks: list[str]) -> int | None:
    """Questions of tasks and groups of tasks, groups inside groups included."""
    total = 0
    for task in tasks:
        if inside := content.get("group_subtasks", {}).get(task):
            total += _num_samples(content, inside) or 0
        else:
            total += content.get("n-samples", {}).get(task, {}).get("effective", 0)
    return total or None
