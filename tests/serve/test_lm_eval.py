"""EleutherAI's lm-evaluation-harness asks the server, as users who measure models do. It has an environment of its own.

`make eval` makes that; LM_EVAL names the program elsewhere.
"""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from idlm_jax.decoding import AR, SamplingParams, generate
from tests.serve.http_server import CONFIG, KEY, MODEL, Running, serving

ROOT = Path(__file__).parents[2]
LM_EVAL = Path(os.environ.get("LM_EVAL", ROOT / ".venv-eval" / "bin" / "lm_eval"))
PROMPTS = ["def main():\n    ", "import os\nimport ", "for name in ", "class Parser:\n    def "]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: {output_type}
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
"""
GREEDY = """
generation_kwargs: {until: ["\\n"], max_gen_toks: 24, do_sample: false, temperature: 0}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


class Ended(NamedTuple):
    code: int
    said: str
    results: dict[str, float]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving(CONFIG) as running:
        yield running


def evaluate(server: Running, folder: Path, name: str, output_type: str, how: str, docs: list[dict[str, str]]) -> Ended:
    """Runs the harness on a task of one's own, without a network."""
    assert LM_EVAL.exists(), f"no {LM_EVAL}: run `make eval`"
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=data, output_type=output_type) + how)
    model = f"model=tiny,base_url={server.url}/v1/completions,num_concurrent=3,max_retries=1,tokenizer={MODEL}"
    command = [str(LM_EVAL), "--model", "local-completions", "--model_args", f"{model},tokenized_requests=False"]
    command += ["--tasks", name, "--include_path", str(folder), "--output_path", str(folder / "out")]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    environment = os.environ | offline | {"OPENAI_API_KEY": KEY}
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=240)
    results = {}
    for file in (folder / "out").rglob("results_*.json"):
        results = json.loads(file.read_text())["results"][name]
    return Ended(done.returncode, done.stdout + done.stderr, results)


@pytest.mark.proof
def test_its_generations_are_those_of_generate(server, tmp_path):
    """Exact match with greedy text up to a newline; the last answer is wrong on purpose."""
    params = SamplingParams(max_tokens=24)
    answers = [each.text.partition("\n")[0] for each in generate(server.lm, PROMPTS, AR(), params)]
    assert all(answers)
    docs = [{"prompt": prompt, "answer": answer} for prompt, answer in zip(PROMPTS, answers, strict=True)]
    docs[-1]["answer"] += "!"
    ended = evaluate(server, tmp_path, "tiny_lines", "generate_until", GREEDY, docs)
    assert ended.code == 0, ended.said
    assert ended.results["exact_match,none"] == 0.75, ended.said
    assert server.engine.stats().finished["abort"] >= 1  # a stop string ended some


@pytest.mark.proof
def test_tasks_that_need_the_prompts_log_probabilities_are_refused_by_name(server, tmp_path):
    """They ask for echo with logprobs, which the server does not offer: it says so, and nothing is scored."""
    docs = [{"prompt": "import ", "answer": "os"}]
    how = "metric_list: [{metric: perplexity, aggregation: perplexity, higher_is_better: false}]\n"
    ended = evaluate(server, tmp_path, "tiny_loglikelihood", "loglikelihood", how, docs)
    assert ended.code != 0
    assert "echo with logprobs would need those of the prompt, which are not offered" in ended.said
    assert ended.results == {}
