"""A model's own continuations of a dataset's documents: what is kept, what is supervised, and where it goes on."""

import dataclasses
import json

import numpy as np
import pytest

from idlm_jax.decoding import generate
from idlm_jax.decoding.method import AR, ISD
from idlm_jax.decoding.sampling import SamplingParams
from idlm_jax.model.language_model import from_module
from tests.support.tiny_model import sharpen, tiny_module
from tests.support.tiny_run import tiny_dataset
from train.data import DatasetSettings, build_dataset
from train.data.continuations import ContinueSettings, continue_documents
from train.data.packing import load_rows
from train.data.tokenizer import load_tokenizer

SETTINGS = ContinueSettings(model="m", prompt_tokens=5, max_tokens=7)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return tiny_dataset(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def lm(dataset):
    tokenizer = load_tokenizer(dataset / "tokenizer")
    module = tiny_module(vocab_size=len(tokenizer), mask_token_id=tokenizer.mask_token_id)
    return from_module(sharpen(module, 20.0))


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def train_documents(dataset):
    rows = load_rows(dataset / "train")
    for tokens, segments in zip(rows.tokens, rows.segment_ids, strict=True):
        for segment in range(1, segments.max() + 1):
            yield tokens[segments == segment].tolist()


@pytest.mark.proof
def test_every_long_enough_train_document_is_continued_as_the_model_would(dataset, lm, tmp_path):
    out = tmp_path / "own.jsonl"
    prompts = [document[:5] for document in train_documents(dataset) if len(document) > 5]
    assert continue_documents(dataset, out, SETTINGS, lm=lm, method=ISD(3), limit=6, batch_size=4) == 6 < len(prompts)
    written = records(out)
    assert [record["tokens"][:5] for record in written] == prompts[:6]
    for record in written:
        assert record["is_response"] == [False] * 5 + [True] * (len(record["tokens"]) - 5)
        assert len(record["tokens"]) == 12
    # Greedily, the stride changes no token.
    greedy = dataclasses.replace(SETTINGS, temperature=0.0)
    continue_documents(dataset, tmp_path / "greedy.jsonl", greedy, lm=lm, method=ISD(3), limit=2)
    completions = generate(lm, prompts[:2], AR(), SamplingParams(max_tokens=7))
    assert [record["tokens"][5:] for record in records(tmp_path / "greedy.jsonl")] == [
        completion.token_ids for completion in completions
    ]


def test_a_torn_file_is_continued_to_the_same_end_and_other_settings_are_refused(dataset, lm, tmp_path):
    whole, torn = tmp_path / "whole.jsonl", tmp_path / "torn.jsonl"
    continue_documents(dataset, whole, SETTINGS, lm=lm, method=AR(), limit=6, batch_size=4)
    continue_documents(dataset, torn, SETTINGS, lm=lm, method=AR(), limit=3, batch_size=4)
    torn.write_bytes(torn.read_bytes()[:-9])
    continue_documents(dataset, torn, SETTINGS, lm=lm, method=AR(), limit=6, batch_size=4)
    assert torn.read_bytes() == whole.read_bytes()
    with pytest.raises(ValueError, match=r"begun with .*'seed': 0.* now .*'seed': 1"):
        continue_documents(dataset, torn, dataclasses.replace(SETTINGS, seed=1), lm=lm, method=AR())


def test_packed_only_what_the_model_said_is_supervised(dataset, lm, tmp_path):
    out = tmp_path / "own.jsonl"
    continue_documents(dataset, out, SETTINGS, lm=lm, method=AR(), limit=16, batch_size=16)
    settings = DatasetSettings(
        roots=(str(out),), tokenizer=str(dataset / "tokenizer"), max_seq_len=32, heldout_fraction=0.3
    )
    report = build_dataset(settings, tmp_path / "own")
    assert report.train.response_tokens == 7 * report.train.chunks
    rows = load_rows(tmp_path / "own" / "train")
    np.testing.assert_array_equal(rows.is_response, (rows.segment_ids > 0) & (rows.positions >= 5))


def test_documents_without_a_rest_are_an_error_that_says_so(dataset, lm, tmp_path):
    with pytest.raises(ValueError, match="no document has more than 32 tokens; keep fewer"):
        settings = dataclasses.replace(SETTINGS, prompt_tokens=32)
        continue_documents(dataset, tmp_path / "own.jsonl", settings, lm=lm, method=AR())
