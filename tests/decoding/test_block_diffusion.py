"""Block diffusion against its definition; blocks of one against AR; what it refuses."""

import dataclasses

import numpy as np
import pytest

from idlm_jax.decoding import AR, BlockDiffusion, SamplingParams, generate, stream_tokens
from idlm_jax.model.language_model import LanguageModel, from_module
from tests.decoding.block_twin import run_block_twin
from tests.support.tiny_model import random_prompts, sharpen, tiny_module


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return from_module(sharpen(tiny_module(3, vocab_size=24, mask_token_id=23), 6.0))


# Prompts that end before, at and behind the edge of a block, or are shorter than one.
PROMPTS = [*random_prompts(4, 12, 23), [5, 9], [1, 2, 3, 4], [4, 3, 2, 1, 4, 3, 2, 1]]
PARAMS = [
    SamplingParams(max_tokens=7 + seed, temperature=0.6 * (seed % 3), top_k=(seed % 2) * 5, seed=seed * 977)
    for seed in range(len(PROMPTS))
]
METHODS = [
    BlockDiffusion(4, threshold=0.3),
    BlockDiffusion(4, threshold=1.0, steps=3),
    BlockDiffusion(8, threshold=0.5, steps=2, predicts_next=True),
    BlockDiffusion(4, threshold=0.2, edit_threshold=0.15, max_edits=2),
    BlockDiffusion(4, threshold=0.2, edit_threshold=0.15, predicts_next=True),
    BlockDiffusion(1, threshold=1.0),
]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_tokens_and_forwards_are_those_of_the_definition(lm, method):
    found = generate(lm, PROMPTS, method, PARAMS)
    wanted = [run_block_twin(lm, *each) for each in zip(PROMPTS, [method] * len(PROMPTS), PARAMS, strict=True)]
    assert [each.token_ids for each in found] == [each.token_ids for each in wanted]
    assert [each.num_forwards for each in found] == [each.num_forwards for each in wanted]


def test_edits_change_the_text_and_a_budget_ends_them(lm):
    params = SamplingParams(max_tokens=24)
    plain, edited, never = (
        [each.token_ids for each in generate(lm, PROMPTS, method, params)]
        for method in (
            BlockDiffusion(4, threshold=0.2),
            BlockDiffusion(4, threshold=0.2, edit_threshold=0.15),
            BlockDiffusion(4, threshold=0.2, edit_threshold=1.0),
        )
    )
    assert plain == never != edited
    # Everything is edited that can be: without a budget, two tokens could take turns for ever.
    [restless] = generate(lm, PROMPTS[:1], BlockDiffusion(4, edit_threshold=0.0, max_edits=5), params)
    assert restless.num_forwards <= 1 + 7 * (4 + 6)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_blocks_of_one_that_predict_the_next_token_are_ar(lm, temperature):
    params = [SamplingParams(max_tokens=20, temperature=temperature, seed=seed) for seed in range(len(PROMPTS))]
    ar = generate(lm, PROMPTS, AR(), params)
    block = generate(lm, PROMPTS, BlockDiffusion(1, predicts_next=True), params)
    assert [each.token_ids for each in block] == [each.token_ids for each in ar]
    # One forward a token, behind the prompt's.
    assert [each.num_forwards for each in block] == [each.num_forwards + 1 for each in ar]


def test_a_threshold_trades_forwards_for_agreement_with_one_token_at_a_time(lm):
    params = SamplingParams(max_tokens=32)
    forwards = [
        sum(each.num_forwards for each in generate(lm, PROMPTS, BlockDiffusion(4, threshold=threshold), params))
        for threshold in (0.0, 0.3, 1.0)
    ]
    assert forwards[0] < forwards[1] <= forwards[2]


def test_a_request_is_the_same_alone_and_in_any_batch_and_stops_where_it_must(lm):
    method = BlockDiffusion(4, threshold=0.3)
    together = generate(lm, PROMPTS, method, PARAMS)
    alone = [generate(lm, [prompt], method, params)[0] for prompt, params in zip(PROMPTS, PARAMS, strict=True)]
    assert [(each.token_ids, each.num_forwards) for each in together] == [
        (each.token_ids, each.num_forwards) for each in alone
    ]
    longest = max(together, key=lambda each: len(each.token_ids))
    at = together.index(longest)
    stop = longest.token_ids[5]
    stopped = generate(lm, [PROMPTS[at]], method, dataclasses.replace(PARAMS[at], stop_token_ids=(stop,)))[0]
    assert stopped.token_ids == longest.token_ids[: longest.token_ids.index(stop) + 1]
    assert stopped.finish_reason == "stop" and np.isnan(stopped.acceptance_rate)
    pieces = list(stream_tokens(lm, PROMPTS[at], method, PARAMS[at]))
    assert [token for piece in pieces for token in piece] == longest.token_ids


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"block_length": 0}, "block_length"),
        ({"block_length": 65}, "block_length"),
        ({"steps": 5}, "steps"),
        ({"steps": 0}, "steps"),
        ({"threshold": 1.5}, "threshold"),
        ({"edit_threshold": -0.1}, "edit_threshold"),
        ({"max_edits": -1}, "max_edits"),
    ],
)
def test_settings_out_of_bounds_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        BlockDiffusion(**wrong)


def test_what_it_cannot_serve_is_refused(lm):
    method = BlockDiffusion(4)
    for params in (SamplingParams(logprobs=1), SamplingParams(repetition_penalty=1.2)):
        with pytest.raises(ValueError, match="BlockDiffusion"):
            generate(lm, PROMPTS[:1], method, params)
    with pytest.raises(ValueError, match="bitwise"):
        generate(lm, PROMPTS[:1], method, SamplingParams(max_tokens=2), deterministic="bitwise")
    without = from_module(tiny_module(mask_token_id=None))
    with pytest.raises(ValueError, match="MASK"):
        generate(without, [[1, 2]], method, SamplingParams(max_tokens=2))
