"""evalscope 1.14.1, for what lm-eval cannot ask a model that thinks: its commands, and the score in its report."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from idlm_jax.evaluation.harness import HarnessFailed, Options, Score, Target, installed_version, sampling_arguments
from idlm_jax.evaluation.suite import Benchmark, Suite

VERSION = "1.14.1"
INSTALL = (
    f"run `make harnesses` in a checkout, or install evalscope=={VERSION} into an environment of its own and name its "
    "program with --evalscope"
)


def command(
    program: Path, suite: Suite, benchmark: Benchmark, target: Target, options: Options, folder: Path
) -> list[str]:
    """Asks the server all questions of a benchmark; a second call goes on with the answers in `folder/raw`.

    Raises:
        ValueError: the suite is one for raw prompts, which evalscope does not send.
    """
    if suite.api != "chat":
        raise ValueError(f"{benchmark.name}: evalscope asks /v1/chat/completions only, the suite says api: {suite.api}")
    sampling: dict[str, Any] = sampling_arguments(suite)
    sampling |= {"seed": options.seed, "timeout": options.timeout_s, "retries": 3}
    if "top_k" in sampling:  # no parameter of the openai client that evalscope asks with
        sampling["extra_body"] = {"top_k": sampling.pop("top_k")}
    raw = folder / "raw"
    arguments = [str(program), "eval", "--eval-type", "openai_api", "--model", target.model, "--api-url", target.url]
    arguments += ["--api-key", target.api_key or "none", "--generation-config", json.dumps(sampling)]
    arguments += ["--eval-batch-size", str(options.concurrency), *_data(benchmark), *_output(raw)]
    if (raw / "predictions").is_dir():
        arguments += ["--use-cache", str(raw)]
    if options.limit is not None:
        arguments += ["--limit", str(options.limit)]
    return arguments


def prefetch_command(program: Path, benchmark: Benchmark, folder: Path) -> list[str]:
    """Brings the data set into the cache, by letting evalscope's own dummy model answer.

    It says one fixed sentence, so the program that is executed outside the sandbox is evalscope's.
    """
    arguments = [str(program), "eval", "--eval-type", "mock_llm", "--model", "dummy", "--limit", "1"]
    return [*arguments, *_data(benchmark), *_output(folder / "prefetch")]


def environment(folder: Path) -> Mapping[str, str]:
    """Variables for the program: its caches are in the run's folder."""
    caches = {"HF_HOME": "huggingface", "MODELSCOPE_CACHE": "modelscope", "EVALSCOPE_CACHE": "evalscope"}
    return {name: str(folder / "cache" / value) for name, value in caches.items()}


def offline_environment() -> Mapping[str, str]:
    """Variables that keep it from asking hubs it cannot reach."""
    return {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


def read_score(program: Path, benchmark: Benchmark, folder: Path) -> Score:
    """The primary metric of the report.

    Raises:
        HarnessFailed: there is no report, it names no such metric, or some questions have no answer.
    """
    files = list((folder / "raw" / "reports").rglob(f"{benchmark.task}.json"))
    if not files:
        raise HarnessFailed("it wrote no report")
    report: dict[str, Any] = json.loads(max(files, key=lambda file: file.stat().st_mtime_ns).read_text())
    if (report.get("execution_summary") or {}).get("incomplete"):
        raise HarnessFailed(f"some questions have no answer: {report['execution_summary']}")
    primary = report.get("primary_metric_identity")
    scores = [
        each["score"] for each in report.get("metrics", []) if primary is not None and each["identity"] == primary
    ]
    if len(scores) != 1 or not isinstance(scores[0], int | float) or math.isnan(scores[0]):
        raise HarnessFailed(f"its report names no primary metric: {report.get('primary_metric_unavailable_reason')}")
    return Score(
        percent=100 * scores[0],
        stderr_percent=None,
        num_samples=report.get("num"),
        version=f"evalscope {installed_version(program, 'evalscope')}",
    )


def _data(benchmark: Benchmark) -> list[str]:
    arguments = ["--datasets", benchmark.task, "--dataset-hub", "huggingface"]
    settings = dict(benchmark.dataset_args)
    if benchmark.num_fewshot is not None:
        settings["few_shot_num"] = benchmark.num_fewshot
    return [*arguments, "--dataset-args", json.dumps({benchmark.task: settings})] if settings else arguments


def _output(folder: Path) -> list[str]:
    return ["--work-dir", str(folder), "--no-timestamp"]
