"""`idlm measure` on a random model folder: files, names, messages."""

import json
import sys

import pytest

import idlm_jax
from idlm_jax import cli
from tests.support.tiny_tokenizer import lm_with_tokenizer

TEMPLATE = "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }};{% endfor %}{{ 'assistant:' }}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("measure") / "model"
    lm = lm_with_tokenizer()
    lm.tokenizer.chat_template = TEMPLATE
    idlm_jax.export_hf(lm, path)
    return path


@pytest.fixture
def files(tmp_path):
    """Prompts of two domains, and files that are wrong in some way."""
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "no part of the prompt"}]
    lines = {
        "code": [{"prompt": "def f"}, {"prompt": [100, 101]}, {"prompt": "x ="}],
        "chat": [{"messages": chat[:1]}, {"messages": chat}],
        "one": [{"prompt": "a"}],
        "empty": [],
        "answer": [{"messages": chat[1:]}] * 2,
        "foreign": [{"text": "a"}] * 2,
        "long": [{"prompt": "a"}, {"prompt": "a" * 600}],
    }
    for name, records in lines.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    return tmp_path


def run(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["idlm", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
        sys.exit(0)
    return stopped.value.code or 0


def test_it_prints_a_table_and_writes_json_markdown_and_a_picture(folder, files, monkeypatch, capsys):
    out = files / "made" / "by" / "it"
    prompts = ["--prompts", files / "code.jsonl", "--prompts", f"talk={files / 'chat.jsonl'}"]
    written = ["--output", out / "a.json", "--markdown", out / "a.md", "--plot", out / "a.png"]
    options = ["--strides", "2", "--branches", "full", "--temperatures", "1", "--max-tokens", "6", "--ignore-eos"]
    assert run(monkeypatch, "measure", folder, *prompts, *options, *written) == 0
    printed = capsys.readouterr().out
    record = json.loads((out / "a.json").read_text())
    assert record["num_prompts"] == {"code": 3, "talk": 2}
    assert record["command"].startswith("idlm measure ") and record["versions"]
    assert [(row["method"], row["domain"]) for row in record["rows"]] == [
        (method, domain) for method in ("AR", "ISD N=2 x2") for domain in ("code", "talk", None)
    ]
    whole = record["rows"][5]
    assert whole["num_tokens"] == 30
    assert whole["tokens_per_forward"]["value"] == pytest.approx(30 / whole["num_forwards"])
    for figure in ("acceptance", "tokens_per_forward", "predicted"):  # folded nowhere in 80 columns
        value, low, high = (whole[figure][name] for name in ("value", "low", "high"))
        assert f" {value:.3f}±{(high - low) / 2:.3f} " in printed
    shown = (out / "a.md").read_text()
    assert f"| all | 1 | ISD N=2 x2 | {whole['acceptance']['value']:.3f} (" in shown
    assert record["command"] in shown
    assert (out / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_chat_is_asked_without_its_last_answer(folder, files, monkeypatch):
    asked = {}
    monkeypatch.setattr(idlm_jax, "measure", lambda lm, prompts, methods, **_: asked.update(prompts) or [])
    assert run(monkeypatch, "measure", folder, "--prompts", files / "chat.jsonl") == 0
    assert asked == {"chat": ["user:hi;assistant:"] * 2}


def test_many_prompts_are_thinned_evenly(folder, files, monkeypatch):
    asked = {}
    (files / "many.jsonl").write_text("\n".join(json.dumps({"prompt": f"{at}"}) for at in range(10)))
    monkeypatch.setattr(idlm_jax, "measure", lambda lm, prompts, methods, **_: asked.update(prompts) or [])
    run(monkeypatch, "measure", folder, "--prompts", files / "many.jsonl", "--num-prompts", "3")
    assert asked == {"many": ["0", "3", "6"]}


def test_methods_are_every_combination_and_the_official_rule_is_itself(folder, files, monkeypatch):
    asked = []
    monkeypatch.setattr(idlm_jax, "measure", lambda lm, prompts, methods, **_: asked.extend(methods) or [])
    options = ["--strides", "2,4", "--branches", "1,2,full", "--rows", "4,7", "--rules", "exact,official"]
    options.append("--two-pass")
    run(monkeypatch, "measure", folder, "--prompts", files / "code.jsonl", *options)
    isd = idlm_jax.ISD
    official = {"proposals": "argmax", "rule": "official"}
    assert asked == [
        *(isd(2, branches=count) for count in (1, 2)),
        isd(2, rows=4),
        isd(2, **official),
        idlm_jax.TwoPass(2),
        *(isd(4, branches=count) for count in (1, 2, 4)),
        isd(4, rows=7),
        isd(4, **official),
        idlm_jax.TwoPass(4),
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "nothing to measure with"),
        (["--prompts", "nowhere.jsonl"], "there is no nowhere.jsonl"),
        (["--prompts", "="], "expected NAME=PATH"),
        (["--prompts", "empty.jsonl"], "empty.jsonl holds no prompt"),
        (["--prompts", "broken.jsonl"], "broken.jsonl:2: Expecting value"),
        (["--prompts", "foreign.jsonl"], "foreign.jsonl:1: no prompt"),
        (["--prompts", "answer.jsonl"], "answer.jsonl:1: no turn of a user"),
        (["--prompts", "code.jsonl", "--prompts", "code=chat.jsonl"], "the domain 'code' is given twice"),
        (["--prompts", "one.jsonl"], "'one' has 1 prompts"),
        (["--prompts", "long.jsonl"], "'long': prompt 1 has 600 tokens"),
        (["--prompts", "code.jsonl", "--strides", "2,x"], "--strides 2,x: 'x' is no number"),
        (["--prompts", "code.jsonl", "--strides", "auto"], "--strides auto: 'auto' is no number"),
        (["--prompts", "code.jsonl", "--strides", "1"], "1 must lie in 2..16"),
        (["--prompts", "code.jsonl", "--branches", "all"], "--branches all: 'all' is no number, nor 'full'"),
        (["--prompts", "code.jsonl", "--branches", "3"], "branches=3 must lie in 1..2"),
        (["--prompts", "code.jsonl", "--rows", "x"], "--rows x: 'x' is no number"),
        (["--prompts", "code.jsonl", "--rules", "exct"], "'exct' is none of exact, coupled, official"),
        (["--prompts", "code.jsonl", "--proposals", "best"], "'best' is none of sampled, argmax"),
        (["--prompts", "code.jsonl", "--temperatures", "0,-1"], "must be finite and not negative"),
        (["--prompts", "code.jsonl", "--plot", "a.doc"], "--plot a.doc must end in one of"),
        (["--dataset", "."], "is no dataset folder"),
    ],
    ids=str,
)
def test_bad_input_is_one_line_and_exit_code_2(folder, files, monkeypatch, capsys, options, message):
    monkeypatch.chdir(files)
    assert run(monkeypatch, "measure", folder, *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len([line for line in error.splitlines() if line.startswith("idlm: ")]) == 1


def test_a_chat_needs_a_template(files, monkeypatch, capsys, tmp_path):
    idlm_jax.export_hf(lm_with_tokenizer(), tmp_path / "plain")
    assert run(monkeypatch, "measure", tmp_path / "plain", "--prompts", files / "chat.jsonl") == 2
    assert "the model folder has no chat template" in capsys.readouterr().err
