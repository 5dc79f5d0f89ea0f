"""`idlm trace`: what it says of each forward is what `generate` counted, and its picture and refusals."""

import json

import pytest

import idlm_jax
from idlm_jax.decoding.method import method_name
from idlm_jax.decoding.trace import Source, token_texts
from idlm_jax.model.language_model import from_module
from tests.cli.test_cli import run
from tests.support.tiny_model import sharpen, tiny_module
from tests.support.tiny_tokenizer import byte_tokenizer

METHODS = [idlm_jax.AR(), idlm_jax.ISD(stride=3), idlm_jax.ISD(stride=3, branches=3)]


@pytest.fixture(scope="module")
def lm():
    # Sharp, so that some drafts are accepted and some refused.
    module = sharpen(tiny_module(vocab_size=258, mask_token_id=257), 12.0)
    return from_module(module, tokenizer=byte_tokenizer())


@pytest.fixture(scope="module")
def folder(lm, tmp_path_factory):
    path = tmp_path_factory.mktemp("trace") / "model"
    idlm_jax.export_hf(lm, path)
    return path


@pytest.mark.parametrize("method", METHODS, ids=method_name)
def test_a_trace_says_what_generate_counted(lm, method):
    params = idlm_jax.SamplingParams(max_tokens=30, temperature=0.7, seed=2, ignore_eos=True)
    forwards = list(idlm_jax.trace(lm, "abc", method, params))
    whole = idlm_jax.generate(lm, ["abc"], method, params)[0]
    assert [token for forward in forwards for token in forward.token_ids] == whole.token_ids
    assert len(forwards) == whole.num_forwards
    assert sum(forward.is_cold_start for forward in forwards) == whole.num_cold_starts
    assert sum(forward.num_verified for forward in forwards) == sum(whole.verified_by_depth)
    assert sum(forward.num_accepted for forward in forwards) == sum(whole.accepted_by_depth)
    for forward in forwards:
        assert len(forward.token_ids) == len(forward.sources)
        assert forward.token_ids[: forward.num_accepted] == forward.drafts[: forward.num_accepted]
    last = {forward.sources[-1] for forward in forwards[1:-1]}
    if method == idlm_jax.AR():
        assert last == {Source.PLAIN}
    else:
        assert last >= {Source.BONUS, Source.CORRECTION}
        assert (Source.COLD_START in last) == (method.branches == 1)


def test_a_completion_may_end_inside_its_drafts(lm):
    method = idlm_jax.ISD(stride=3)
    cut = [
        list(idlm_jax.trace(lm, "abc", method, idlm_jax.SamplingParams(max_tokens=most, temperature=0.7, seed=2)))[-1]
        for most in range(2, 20)
    ]
    assert any(set(forward.sources) == {Source.DRAFT} for forward in cut)


def test_json_is_a_record_per_forward_whose_texts_make_the_text(lm, folder, monkeypatch, capsys):
    options = ("abc", "--model", folder, "--stride", 3, "--max-tokens", 12, "--dtype", "float32")
    assert run(monkeypatch, "trace", *options, "--json") == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    whole = idlm_jax.generate(lm, ["abc"], idlm_jax.ISD(stride=3), idlm_jax.SamplingParams(max_tokens=12))[0]
    assert [record["forward"] for record in records] == list(range(whole.num_forwards))
    assert records[0]["sources"] == ["prefill"]
    text = "".join(text for record in records for text in record["texts"])
    assert whole.text.startswith(text)
    assert text == "".join(token_texts(lm, whole.token_ids))


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_terminal_and_picture_show_every_token(folder, monkeypatch, capsys, tmp_path, suffix):
    path = tmp_path / f"trace.{suffix}"
    options = ("abc", "--model", folder, "--stride", 3, "--max-tokens", 12, "--output", path)
    assert run(monkeypatch, "trace", *options) == 0
    shown = capsys.readouterr().out
    assert "12 tokens in" in " ".join(shown.split())
    assert "one colour, one forward" in shown
    assert path.read_bytes()[:4] in (b"<?xm", b"\x89PNG")
    if suffix == "svg":
        assert path.read_text().count('id="xtick_') == 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output", "trace.pdf"], "--output trace.pdf must end in .svg or .png"),
        (["--stride", "0"], "stride=0 must lie in 1..16"),
        (["--branches", "9"], "branches=9 must lie in 1..4"),
        (["--temperature", "-1"], "temperature=-1.0 must be finite and not negative"),
        (["--max-tokens", "0"], "max_tokens=0 must be at least 1"),
    ],
    ids=str,
)
def test_bad_input_is_one_line_and_exit_code_2(monkeypatch, capsys, options, message):
    assert run(monkeypatch, "trace", "abc", *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
