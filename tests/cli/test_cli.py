"""The command line on a random model folder: output, exit codes, messages."""

import json
import subprocess
import sys

import pytest

import idlm_jax
from idlm_jax import cli
from tests.support.tiny_tokenizer import lm_with_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "model"
    idlm_jax.export_hf(lm_with_tokenizer(), path)
    return path


def run(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["idlm", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
        sys.exit(0)
    return stopped.value.code or 0


def test_generate_prints_one_json_object_per_prompt(folder, monkeypatch, capsys):
    assert run(monkeypatch, "generate", folder, "abc", "de", "--max-tokens", 5, "--dtype", "float32", "--json") == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["prompt"] for record in records] == ["abc", "de"]
    assert all(len(record["token_ids"]) == 5 for record in records)


def test_generate_holds_weights_in_8_bits_where_asked(folder, monkeypatch, capsys):
    arguments = ("abc", "--max-tokens", 5, "--dtype", "float32", "--quantize", "int8", "--json")
    assert run(monkeypatch, "generate", folder, *arguments) == 0
    lm = idlm_jax.load(folder, dtype="float32", quantize="int8")
    wanted = idlm_jax.generate(lm, ["abc"], idlm_jax.AR(), idlm_jax.SamplingParams(max_tokens=5))
    assert json.loads(capsys.readouterr().out)["token_ids"] == wanted[0].token_ids


def test_streaming_prints_the_same_text_as_json(folder, monkeypatch, capsys):
    options = ["abc", "--max-tokens", 8, "--dtype", "float32"]
    run(monkeypatch, "generate", folder, *options, "--json")
    text = json.loads(capsys.readouterr().out)["text"]
    run(monkeypatch, "generate", folder, *options, "--stream")
    assert capsys.readouterr().out.removesuffix("\n") == text.rstrip("�")


@pytest.mark.proof
def test_the_bit_for_bit_mode_prints_and_streams_what_ar_says_in_that_mode(folder, monkeypatch, capsys):
    options = ["abc", "--max-tokens", 8, "--deterministic", "bitwise"]
    run(monkeypatch, "generate", folder, *options, "--json")
    record = json.loads(capsys.readouterr().out)
    run(monkeypatch, "generate", folder, *options, "--stream")
    assert capsys.readouterr().out.removesuffix("\n") == record["text"].rstrip("\ufffd")
    lm, params = idlm_jax.load(folder), idlm_jax.SamplingParams(max_tokens=8)
    wanted = idlm_jax.generate(lm, ["abc"], idlm_jax.AR(), params, deterministic="bitwise")
    assert record["token_ids"] == wanted[0].token_ids
    assert run(monkeypatch, "generate", folder, *options, "--stride", 9) == 2
    assert "16 rows a request" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["abc", "--stride", 0], "stride=0 must lie in 1..16"),
        (["abc", "--temperature", -1], "temperature=-1.0 must be finite and not negative"),
        ([""], "prompt 0 is empty"),
        (["a", "b", "--stream"], "--stream prints one completion"),
        (["abc", "--chat"], "--chat needs a chat template"),
        (["abc", "--max-tokens", 10_000], "together they exceed the model's 512 positions"),
    ],
    ids=str,
)
def test_bad_input_is_one_line_and_exit_code_2(folder, monkeypatch, capsys, arguments, message):
    assert run(monkeypatch, "generate", folder, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_a_missing_folder_is_named(monkeypatch, capsys, tmp_path):
    assert run(monkeypatch, "generate", tmp_path / "nowhere", "abc") == 2
    assert "nowhere" in capsys.readouterr().err


def test_export_writes_a_folder_that_loads_and_refuses_to_overwrite(folder, monkeypatch, capsys, tmp_path):
    target = tmp_path / "copy"
    assert run(monkeypatch, "export", folder, target, "--dtype", "float32") == 0
    assert idlm_jax.load(target, dtype="float32").config == idlm_jax.load(folder, dtype="float32").config
    assert run(monkeypatch, "export", folder, target) == 2
    assert "copy" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["generate", "trace", "export", "eval", "measure", "demo"])
def test_every_command_explains_itself(command, monkeypatch, capsys):
    assert run(monkeypatch, command, "--help") == 0
    assert len(capsys.readouterr().out) > 400


@pytest.mark.slow
@pytest.mark.proof
def test_the_demo_runs_to_its_end_and_leaves_its_files(tmp_path):
    """In a process of its own, as a user runs it; two steps instead of a hundred."""
    out = tmp_path / "demo"
    command = [sys.executable, "-c", "from idlm_jax.cli import main; main()", "demo", "--steps", "2", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "completions identical" in " ".join(done.stdout.split())
    assert (out / "demo.png").stat().st_size > 10_000
    assert (out / "hf" / "model.safetensors").is_file()
