"""`idlm pack`, `show`, `regenerate` and `continue` from the terminal."""

import inspect
import json
import sys

import pytest

import idlm_jax
from idlm_jax import cli
from idlm_jax.cli.pack import pack
from idlm_jax.model.language_model import from_module
from tests.support.tiny_model import tiny_module
from tests.train.data.conftest import python_text, write_corpus
from train.data import DatasetSettings, read_report
from train.data.tokenizer import load_tokenizer, train_tokenizer


def run(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["idlm", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
        sys.exit(0)
    return stopped.value.code or 0


def error_line(capsys) -> str:
    """The last line on stderr that is no progress bar."""
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("idlm: ")]
    return line


def test_pack_writes_a_dataset_says_what_is_in_it_and_finds_it_again(monkeypatch, capsys, tmp_path):
    corpus, out = write_corpus(tmp_path / "corpus"), tmp_path / "set"
    options = ["--root", corpus, "--vocab-size", 300, "--max-seq-len", 64, "--heldout-fraction", 0.2]
    assert run(monkeypatch, "pack", "--out", out, *options) == 0
    printed = capsys.readouterr().out
    report = read_report(out)
    assert "built in" in printed and "documents left out: nothing" in printed
    for count in (report.train.tokens_read, report.train.tokens, report.train.response_tokens):
        assert f"{count:,}" in printed
    assert run(monkeypatch, "pack", "--out", out, *options) == 0
    assert "already built" in capsys.readouterr().out
    assert run(monkeypatch, "show", out, "--row", 1) == 0
    shown = capsys.readouterr().out
    assert run(monkeypatch, "show", out, "--row", 10**6) == 2
    assert "row=1000000 must lie in [0, " in error_line(capsys)
    assert "--- row 1, document 1:" in shown and f"{report.train.tokens:,}" in shown


def test_the_options_of_pack_default_to_those_of_the_dataset():
    defaults = DatasetSettings(vocab_size=4096)
    for name, parameter in inspect.signature(pack).parameters.items():
        if name not in ("out", "root", "vocab_size", "include_tests"):
            assert parameter.default == getattr(defaults, name), name


@pytest.mark.parametrize(
    ("file", "content", "options", "message"),
    [
        ("a.jsonl", b'{"messages": []}\n{', ["--vocab-size", 300], "a.jsonl:1: no list of messages"),
        ("a.jsonl", b'\n{"tokens": [1', ["--vocab-size", 300], "a.jsonl:2: Expecting"),
        ("a.jsonl", b'{"tokens": "\xff"}', ["--vocab-size", 300], "a.jsonl:1: not UTF-8"),
        ("a.txt", b"\xff", ["--vocab-size", 300], "a.txt is not UTF-8"),
        ("a.arrayrecord", b"no", ["--vocab-size", 300], "a.arrayrecord: no readable ArrayRecord"),
        ("a.csv", b"a,b", ["--vocab-size", 300], "ends in '.csv'"),
        ("a.txt", b"text", ["--tokenizer", "nowhere"], "nowhere does not exist"),
        ("a.txt", b"text", ["--vocab-size", 300, "--tokenizer", "x"], "exactly one of vocab_size"),
        ("a.txt", b"text", ["--vocab-size", 300, "--max-seq-len", 1], "at least 2"),
        ("a.txt", b"text", ["--vocab-size", 300], "each side needs one"),
    ],
)
def test_bad_data_is_one_line_and_exit_code_2(monkeypatch, capsys, tmp_path, file, content, options, message):
    (tmp_path / file).write_bytes(content)
    assert run(monkeypatch, "pack", "--out", tmp_path / "set", "--root", tmp_path / file, *options) == 2
    assert message in error_line(capsys)
    assert not (tmp_path / "set").exists()


def test_a_folder_without_a_tokenizer_is_one_line(monkeypatch, capsys, tmp_path):
    corpus = write_corpus(tmp_path / "corpus", files=20, chats=0)
    (tmp_path / "empty").mkdir()
    arguments = ["--out", tmp_path / "set", "--root", corpus, "--heldout-fraction", 0.3]
    assert run(monkeypatch, "pack", *arguments, "--tokenizer", tmp_path / "empty") == 2
    error = capsys.readouterr().err
    assert "holds no tokenizer that transformers can load" in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("command", ["pack", "show", "regenerate", "continue"])
def test_the_data_commands_explain_themselves(command, monkeypatch, capsys):
    assert run(monkeypatch, command, "--help") == 0
    assert len(capsys.readouterr().out) > 400


def test_folders_without_data_are_refused(monkeypatch, capsys, tmp_path):
    assert run(monkeypatch, "show", tmp_path) == 2
    assert "is no dataset folder" in error_line(capsys)


def test_a_regenerated_file_packs(monkeypatch, capsys, tmp_path):
    tokenizer = train_tokenizer([python_text(seed) for seed in range(20)], vocab_size=300)
    idlm_jax.export_hf(from_module(tiny_module(vocab_size=300, mask_token_id=3), tokenizer=tokenizer), tmp_path / "lm")
    lines = [{"messages": [{"role": "user", "content": f"question {index}"}]} for index in range(12)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = [tmp_path / "in.jsonl", tmp_path / "out.jsonl", "--model", tmp_path / "lm", "--dtype", "float32"]
    options = ["--max-tokens", 12, "--temperature", 1.0, "--on-length", "keep"]
    assert run(monkeypatch, "regenerate", *arguments, *options) == 0
    assert "12 of 12 chats answered" in capsys.readouterr().out
    options = ["--root", tmp_path / "out.jsonl", "--tokenizer", tmp_path / "lm", "--heldout-fraction", 0.3]
    assert run(monkeypatch, "pack", "--out", tmp_path / "set", *options) == 0
    report = read_report(tmp_path / "set")
    assert report.train.documents + report.heldout.documents == 12
    assert report.train.response_tokens > report.train.documents


def test_a_continued_dataset_packs(monkeypatch, capsys, tmp_path):
    corpus, own = write_corpus(tmp_path / "corpus"), tmp_path / "own.jsonl"
    options = ["--root", corpus, "--vocab-size", 300, "--max-seq-len", 64, "--heldout-fraction", 0.2]
    assert run(monkeypatch, "pack", "--out", tmp_path / "set", *options) == 0
    tokenizer = load_tokenizer(tmp_path / "set" / "tokenizer")
    module = tiny_module(vocab_size=len(tokenizer), mask_token_id=tokenizer.mask_token_id)
    idlm_jax.export_hf(from_module(module, tokenizer=tokenizer), tmp_path / "lm")
    options = ["--model", tmp_path / "lm", "--prompt-tokens", 9, "--max-tokens", 6, "--limit", 12, "--dtype", "float32"]
    assert run(monkeypatch, "continue", tmp_path / "set", own, *options) == 0
    assert "own.jsonl: 12 documents" in capsys.readouterr().out
    options = ["--root", own, "--tokenizer", tmp_path / "lm", "--max-seq-len", 16, "--heldout-fraction", 0.3]
    assert run(monkeypatch, "pack", "--out", tmp_path / "own", *options) == 0
    report = read_report(tmp_path / "own")
    assert report.train.tokens > report.train.response_tokens > 0


def test_regenerate_refuses_what_cannot_work(monkeypatch, capsys, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    files = [tmp_path / "in.jsonl", tmp_path / "out.jsonl", "--model", "m"]
    for options, message in (
        (["--endpoint", "localhost:8000"], "must start with http:// or https://"),
        (["--endpoint", "http:///v1"], "and name a host"),
        (["--endpoint", "http://[::1"], "--endpoint 'http://[::1'"),
        (["--endpoint", "http://localhost", "--stride", 4], "leave them out with --endpoint"),
        (["--max-tokens", 0], "must be positive"),
        (["--temperature", -1], "must not be negative"),
    ):
        assert run(monkeypatch, "regenerate", *files, *options) == 2
        assert message in error_line(capsys)
    assert run(monkeypatch, "regenerate", tmp_path / "nowhere.jsonl", *files[1:]) == 2
    assert "nowhere.jsonl" in error_line(capsys)
