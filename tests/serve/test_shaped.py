"""Penalties, biases and grammars in the engine: exact, whatever else it does, and for whoever shares the batch."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from llguidance import LLMatcher
from scipy.stats import chi2
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from idlm_jax.decoding import AR, ISD, SamplingParams, generate
from idlm_jax.model.language_model import LanguageModel
from serve.config import EngineConfig
from serve.device import Device
from serve.engine import Engine
from serve.grammar import Grammars, Matcher
from serve.handle import EngineError
from tests.serve.conftest import CONFIG
from tests.support.tiny_model import random_prompts

SHAPED = dataclasses.replace(CONFIG, shapes=True, decode_batches=(4,), prefill_shapes=((1, 16),))
TIGHT = dataclasses.replace(SHAPED, num_pages=13)
LETTERS, END = "abcdefghij", 10
GREEDY = SamplingParams(max_tokens=20)
PENALISED = SamplingParams(max_tokens=20, presence_penalty=0.8, frequency_penalty=0.6, repetition_penalty=1.4)
BIASED = SamplingParams(max_tokens=20, logit_bias=((3, 2.0), (5, -3.0)), min_p=0.05)
SPELLING = r"(ab|c[d-f]+|g{3,9}h)+i(jj)*"


@pytest.fixture(scope="module")
def device(lm: LanguageModel) -> Device:
    return Device(lm, SHAPED)


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    """Ten ids are letters, one ends a text."""
    tokenizer = Tokenizer(models.BPE(vocab={each: index for index, each in enumerate([*LETTERS, "<end>"])}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    return Grammars(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>"), 12, [END])


@pytest.fixture
def spell(grammars: Grammars) -> Callable[[str], Matcher]:
    return lambda regex: grammars.matcher(LLMatcher.grammar_from_regex(regex))


def masked(lm: LanguageModel, tokens: list[int], matcher: Matcher) -> np.ndarray:
    """Logits behind `tokens`, of the ids that the grammar permits there."""
    padded = np.zeros((1, 64), np.int32)  # one program for all lengths
    padded[0, : len(tokens)] = tokens
    logits = np.asarray(lm.logits(padded))[0, len(tokens) - 1].astype(np.float64)
    (mask,), _ = matcher.look_ahead([], 0)
    permitted = mask[np.arange(12) // 32] >> (np.arange(12) % 32).astype(np.uint32) & 1
    return np.where((permitted == 1) & (np.arange(12) != 11), logits, -np.inf)


def greedy_text(lm: LanguageModel, prompt: list[int], matcher: Matcher, max_tokens: int) -> list[int]:
    """One token after the other, without a cache or drafts."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_tokens and tokens[len(prompt) :][-1:] != [END]:
        tokens.append(int(np.argmax(masked(lm, tokens, matcher))))
        matcher.advance(tokens[-1:])
    return tokens[len(prompt) :]


def tokens_of(completions) -> list[list[int]]:
    return [completion.token_ids for completion in completions]


@pytest.mark.parametrize("config", [SHAPED, TIGHT], ids=["roomy", "preempting"])
def test_penalties_and_biases_are_those_of_generate(lm, start, config):
    """Also in a slot that another request has had, behind cached prefixes, and read again after a preemption."""
    engine = start(config)
    prompts = [[*range(11), *prompt] for prompt in random_prompts(24, 25, 11, seed=2)]
    kinds = [PENALISED, BIASED, SamplingParams(max_tokens=20)]
    params = [
        dataclasses.replace(kinds[index % 3], temperature=float(index % 2), seed=index) for index in range(len(prompts))
    ]
    handles = [engine.submit(*each) for each in zip(prompts, params, strict=True)]
    got = [handle.result()[0] for handle in handles]
    assert got == tokens_of(generate(lm, prompts, ISD(stride=4), params))
    assert (engine.stats().num_preemptions > 0) == (config is TIGHT)
    assert engine.stats().num_cached_tokens > 0


@pytest.mark.parametrize("config", [SHAPED, TIGHT], ids=["roomy", "preempting"])
def test_greedy_text_under_a_grammar_is_what_one_token_at_a_time_gives(lm, start, spell, config):
    engine = start(config)
    prompts = random_prompts(10, 30, 11, seed=3)
    greedy = SamplingParams(max_tokens=18, stop_token_ids=(END,))
    free = [engine.submit(prompt, SamplingParams(max_tokens=18)) for prompt in prompts]
    bound = [engine.submit(prompt, greedy, matcher=spell(SPELLING)) for prompt in prompts]
    assert [h.result()[0] for h in bound] == [greedy_text(lm, prompt, spell(SPELLING), 18) for prompt in prompts]
    ar = generate(lm, prompts, AR(), SamplingParams(max_tokens=18))
    assert [h.result()[0] for h in free] == tokens_of(ar)
    assert (engine.stats().num_preemptions > 0) == (config is TIGHT)


def test_a_seed_reproduces_a_constrained_text_under_any_load(start, spell):
    prompts = random_prompts(8, 20, 11, seed=4)
    params = [
        SamplingParams(max_tokens=18, temperature=1.0, seed=seed, stop_token_ids=(END,)) for seed in range(len(prompts))
    ]

    def run(config: EngineConfig, *, at_once: bool) -> list[list[int]]:
        engine, results = start(config), []
        for prompt, wanted in zip(prompts, params, strict=True):
            results.append(engine.submit(prompt, wanted, matcher=spell(SPELLING)))
            if not at_once:
                results[-1] = results[-1].result()
        done = [each.result() if at_once else each for each in results]
        engine.close()
        return [tokens for tokens, _ in done]

    alone = run(SHAPED, at_once=False)
    assert run(SHAPED, at_once=True) == alone
    assert run(TIGHT, at_once=True) == alone


def test_constrained_samples_follow_the_permitted_part_of_the_distribution(lm, start, spell):
    """Chi-square over all texts of a small language; a right engine fails once in 100,000 choices of seeds."""
    prompt, regex, num = [1, 3, 0, 2], "(a|b)(c|d|e)(a|f|g)(h|b)", 1024
    expected: dict[tuple[int, ...], float] = {}
    for text in itertools.product("ab", "cde", "afg", "hb"):
        ids, probability, matcher = [LETTERS.index(each) for each in text], 1.0, spell(regex)
        for place, token in enumerate(ids):
            logits = masked(lm, prompt + ids[:place], matcher)
            weights = np.exp(logits - logits.max())
            probability *= weights[token] / weights.sum()
            matcher.advance([token])
        expected[tuple(ids)] = probability
    assert sum(expected.values()) == pytest.approx(1.0)
    engine = start(dataclasses.replace(SHAPED, max_queued=num))
    handles = [
        engine.submit(
            prompt,
            SamplingParams(max_tokens=8, temperature=1.0, seed=seed, stop_token_ids=(END,)),
            matcher=spell(regex),
        )
        for seed in range(num)
    ]
    observed = Counter(tuple(handle.result()[0][:-1]) for handle in handles)
    assert set(observed) <= set(expected)
    cells = [(observed[ids], mass * num) for ids, mass in expected.items() if mass * num >= 5]
    assert len(cells) >= 15
    rest = num - sum(mass for _, mass in cells)
    if rest > 1:
        cells.append((num - sum(count for count, _ in cells), rest))
    statistic = sum((count - mass) ** 2 / mass for count, mass in cells)
    assert chi2.sf(statistic, len(cells) - 1) >= 1e-5


def test_what_a_grammar_leaves_no_choice_of_is_committed_a_stride_at_a_time(start, spell):
    handle = start(SHAPED).submit(
        [1, 2], SamplingParams(max_tokens=20, stop_token_ids=(END,)), matcher=spell("abcdefghij")
    )
    tokens, reason = handle.result()
    assert (tokens, reason) == ([*range(11)], "stop")
    assert handle.num_forwards == 1 + 3  # the first token, then 4 + 4 + 2


def test_a_grammar_goes_with_neither_ignore_eos_nor_min_tokens(start, spell):
    engine = start(SHAPED)
    for params in (SamplingParams(ignore_eos=True), SamplingParams(min_tokens=3)):
        with pytest.raises(ValueError, match="neither ignore_eos nor min_tokens"):
            engine.submit([1], params, matcher=spell("a"))


def test_an_engine_without_these_programs_says_so(lm, start, spell):
    engine = start(dataclasses.replace(SHAPED, shapes=False))
    with pytest.raises(ValueError, match="serves no grammars"):
        engine.submit([1], matcher=spell("a"))
    with pytest.raises(ValueError, match="serves no biases, penalties"):
        engine.submit([1], PENALISED)


def test_a_grammar_that_fails_under_a_request_fails_it_alone(start, spell, monkeypatch):
    engine = start(SHAPED)
    matcher = spell("[a-f]+")
    monkeypatch.setattr(matcher, "advance", lambda tokens: (_ for _ in ()).throw(RuntimeError("too large")))
    handle = engine.submit([1, 2], SamplingParams(max_tokens=8), matcher=matcher)
    neighbour = engine.submit([1, 2], SamplingParams(max_tokens=30), matcher=spell("a{30,}"))
    with pytest.raises(EngineError, match="too large"):
        handle.result()
    assert neighbour.result()[0] == [0] * 30


@pytest.mark.parametrize("bad", ["start: missing", "(a", '{"a'])
def test_a_malformed_grammar_is_refused_in_one_line(grammars, bad):
    with pytest.raises(ValueError, match=r"^the grammar cannot be used: .+$"):
        grammars.matcher(bad)


def test_a_draft_that_may_not_stand_is_left_to_be_refused(spell):
    matcher = spell("[ab][ab]c")
    masks, drafts = matcher.look_ahead([0, 9, 1], 3)
    assert drafts == [0, 9, 1]
    assert [int(mask[0]) & 0xFFF for mask in masks] == [0b11, 0b11, 0xFFF, 0xFFF]
    matcher.advance([0, 1])
    assert matcher.look_ahead([5, 5, 5], 3)[1] == [2, END, 5]


def test_a_slot_keeps_nothing_of_what_an_earlier_request_wanted(lm):
    """A greedy request takes the slot of one with penalties, then shares a step with another that has some."""
    config = dataclasses.replace(SHAPED, max_running=2, decode_batches=(2,), specialised=True)
    prompts = random_prompts(3, 12, 11, seed=8)
    with Engine(lm, config) as engine:
        engine.submit(prompts[0], PENALISED).result()
        last = [engine.submit(prompt, params) for prompt, params in zip(prompts[1:], [GREEDY, PENALISED], strict=True)]
        results = [handle.result()[0] for handle in last]
    assert results == tokens_of(generate(lm, prompts[1:], ISD(stride=4), [GREEDY, PENALISED]))
