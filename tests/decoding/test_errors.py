"""Bad requests: one clear error each, before anything is compiled."""

import pytest

from idlm_jax.decoding import AR, ISD, SamplingParams, generate, generate_stream
from tests.support.tiny_model import tiny_lm
from tests.support.tiny_tokenizer import MASK_TEXT, byte_tokenizer, lm_with_tokenizer


@pytest.fixture(scope="module")
def lm():
    return tiny_lm()


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[]], "prompt 0 is empty"),
        ([[1], []], "prompt 1 is empty"),
        ([[1, 97]], r"ids \[97\] outside the vocabulary of 97"),
        ([[-1]], "outside the vocabulary"),
        ([[1, 96, 2]], "MASK id 96"),
        (["text"], "no tokenizer"),
        ([[1] * 500], "500 tokens and max_tokens=32: together they exceed the model's 512 positions"),
    ],
)
def test_bad_prompts_are_refused(lm, prompts, message):
    with pytest.raises(ValueError, match=message):
        generate(lm, prompts, ISD(stride=4), SamplingParams(max_tokens=32))


@pytest.mark.parametrize("stride", [0, -1, 17])
def test_strides_outside_1_to_16_are_refused(stride):
    with pytest.raises(ValueError, match="stride"):
        ISD(stride=stride)


@pytest.mark.parametrize("branches", [4, 5, 16])
def test_more_rows_than_attention_takes_are_refused(branches):
    with pytest.raises(ValueError, match=f"branches={branches} has {16 + 15 * branches} rows a forward.*64.*rows="):
        ISD(stride=16, branches=branches)
    with pytest.raises(ValueError, match=r"rows=65 must lie in 17\.\.64 at stride 16"):
        ISD(stride=16, rows=65)


def test_auto_leaves_out_what_has_more_rows_than_attention_takes():
    rows = [method.window_len for method in ISD(16, branches="auto").menu]
    assert rows == [31, 46] and ISD(16, branches="auto").window_len == 46
    assert ISD(16, rows=64).window_len == 64


def test_isd_without_a_mask_id_is_refused_and_ar_is_not():
    lm = tiny_lm(mask_token_id=None)
    with pytest.raises(ValueError, match=r"mask_token_id=\.\.\.\) or use AR"):
        generate(lm, [[1]], ISD(stride=2), SamplingParams(max_tokens=2))
    assert len(generate(lm, [[1]], AR(), SamplingParams(max_tokens=2))[0].token_ids) == 2


def test_a_list_of_params_must_match_the_prompts(lm):
    with pytest.raises(ValueError, match="2 sampling parameters for 1 prompts"):
        generate(lm, [[1]], AR(), [SamplingParams()] * 2)


def test_a_bare_string_is_not_a_list_of_prompts(lm):
    with pytest.raises(TypeError, match=r"\[text\]"):
        generate(lm, "def", AR())


def test_no_prompts_give_no_completions(lm):
    assert generate(lm, [], ISD(stride=4)) == []


def test_text_that_spells_the_mask_stays_text():
    lm = lm_with_tokenizer()
    assert byte_tokenizer().encode(MASK_TEXT) == [lm.config.mask_token_id]  # what a naive encoder would feed
    completion = generate(lm, [f"a{MASK_TEXT}b{MASK_TEXT}"], ISD(stride=4), SamplingParams(max_tokens=4))[0]
    spelled = [token for c in f"a{MASK_TEXT}b{MASK_TEXT}" for token in byte_tokenizer().encode(c)]
    assert completion.token_ids == generate(lm, [spelled], ISD(stride=4), SamplingParams(max_tokens=4))[0].token_ids


def test_a_tokenizer_that_exceeds_the_vocabulary_is_named():
    lm = lm_with_tokenizer(vocab_size=100, mask_token_id=99)
    with pytest.raises(ValueError, match="the tokenizer and the model disagree"):
        generate(lm, ["zebra ~~~"], AR(), SamplingParams(max_tokens=2))


def test_streamed_text_equals_the_text_of_generate():
    lm = lm_with_tokenizer()
    params = SamplingParams(max_tokens=40, temperature=1.5, seed=4)
    whole = generate(lm, ["naïve"], ISD(stride=4), params)[0]
    streamed = "".join(generate_stream(lm, "naïve", ISD(stride=4), params))
    # random bytes may end inside a character, which a stream holds back
    assert whole.text.startswith(streamed.rstrip("�")) and len(whole.text) - len(streamed) <= 3
