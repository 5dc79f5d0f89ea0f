import numpy as np
import pytest

from tests.train.data.conftest import python_text
from train.data.corpus import Conversation, TextFile
from train.data.encode import encode_conversation, encode_documents
from train.data.tokenizer import CHAT_TEMPLATE, train_tokenizer

# The same text as CHAT_TEMPLATE with transformers' own markers of what the assistant says: an oracle.
MARKED_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>' + '\n' }}{% endif %}{% endfor %}"
)
# Qwen3's habit: thinking is shown in the last turn only, so the past is rewritten when a turn is added.
FORGETFUL_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and loop.last %}{{ 'thought\n' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def chat(*turns: str) -> Conversation:
    roles = ("user", "assistant")
    return Conversation("c:1", tuple({"role": roles[index % 2], "content": text} for index, text in enumerate(turns)))


@pytest.fixture
def tokenizer():
    return train_tokenizer([python_text(seed) for seed in range(20)], vocab_size=320)


def test_a_file_is_cut_into_consecutive_chunks_that_end_with_the_end_token(tokenizer):
    text = python_text(3)
    ids = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
    encoded = encode_documents([TextFile("a.py", text)], tokenizer, max_seq_len=20)
    assert [len(chunk.tokens) for chunk in encoded.chunks[:-1]] == [20] * (len(encoded.chunks) - 1)
    assert np.concatenate([chunk.tokens for chunk in encoded.chunks]).tolist() == ids
    assert all(chunk.is_response.all() for chunk in encoded.chunks)


def test_a_last_chunk_of_one_token_is_left_out(tokenizer):
    text = "alpha beta gamma"
    ids = tokenizer.encode(text, add_special_tokens=False)
    (chunk,) = encode_documents([TextFile("a.py", text)], tokenizer, max_seq_len=len(ids)).chunks
    assert chunk.tokens.tolist() == ids


def test_special_tokens_spelled_in_a_file_stay_text(tokenizer):
    text = "MASK = '<|MASK|>'  # <|endoftext|><|im_end|>"
    (chunk,) = encode_documents([TextFile("a.py", text)], tokenizer, max_seq_len=200).chunks
    assert chunk.tokens[-1] == 0 and not np.isin(chunk.tokens[:-1], [0, 1, 2, 3]).any()
    assert tokenizer.decode(chunk.tokens[:-1].tolist()) == text
    # The tokenizer itself, which serves the chats, still knows them.
    assert tokenizer.encode("<|MASK|>", add_special_tokens=False) == [3]


def test_responses_are_the_assistants_words_and_end_tokens_as_transformers_marks_them(tokenizer):
    conversation = chat("alpha?", "beta\n", "and gamma?", "def delta(): pass", "thanks")
    chunk = encode_conversation(conversation, tokenizer)
    oracle = tokenizer.apply_chat_template(
        list(conversation.messages),
        chat_template=MARKED_TEMPLATE,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    size = len(chunk.tokens)
    assert chunk.tokens.tolist() == oracle["input_ids"][:size]
    assert chunk.is_response.tolist() == [bool(mask) for mask in oracle["assistant_masks"][:size]]
    assert not any(oracle["assistant_masks"][size:])
    assert tokenizer.decode(chunk.tokens[chunk.is_response].tolist()) == "beta\n<|im_end|>def delta(): pass<|im_end|>"


def test_the_prompt_part_is_what_decoding_would_feed(tokenizer):
    conversation = chat("alpha?", "\n\nbeta")
    chunk = encode_conversation(conversation, tokenizer)
    prompt = tokenizer.apply_chat_template(
        list(conversation.messages[:1]), add_generation_prompt=True, return_dict=False
    )
    assert chunk.tokens[~chunk.is_response].tolist() == prompt


def test_a_template_that_rewrites_the_past_marks_the_shown_answers(tokenizer):
    tokenizer.chat_template = FORGETFUL_TEMPLATE
    chunk = encode_conversation(chat("alpha?", "beta", "gamma?", "delta"), tokenizer)
    answers = tokenizer.decode(chunk.tokens[chunk.is_response].tolist())
    assert answers == "beta<|im_end|>thought\ndelta<|im_end|>"


def test_a_template_whose_past_cannot_be_found_is_refused(tokenizer):
    tokenizer.chat_template = "{{ messages | length }}" + CHAT_TEMPLATE
    with pytest.raises(ValueError, match="c:1: the chat template renders the first 1 messages differently"):
        encode_conversation(chat("alpha?", "beta"), tokenizer)


def test_a_tokenizer_without_a_chat_template_is_refused(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        encode_conversation(chat("alpha?", "beta"), tokenizer)


def test_a_turn_that_no_special_token_closes_is_refused(tokenizer):
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match="no special token closes message 1"):
        encode_conversation(chat("alpha?", "beta"), tokenizer)


def test_long_conversations_are_truncated_with_their_prompt_and_counted(tokenizer):
    long = chat("alpha?", "beta " * 50)
    encoded = encode_documents([long, chat("alpha?", "beta")], tokenizer, max_seq_len=40)
    whole = encode_conversation(long, tokenizer)
    assert encoded.truncated == 1 and len(encoded.chunks) == 2
    assert encoded.chunks[0].tokens.tolist() == whole.tokens[:40].tolist()
    assert encoded.chunks[0].is_response.tolist() == whole.is_response[:40].tolist()


def test_conversations_with_nothing_to_supervise_are_dropped_and_counted(tokenizer):
    prompt_too_long = chat("alpha " * 50, "beta")
    no_answer = chat("alpha?")
    spoof = chat("alpha?<|im_end|>", "beta")
    encoded = encode_documents([prompt_too_long, no_answer, spoof, chat("a", "b")], tokenizer, max_seq_len=40)
    assert len(encoded.chunks) == 1
    assert encoded.dropped == {"no answer": 2, "special token in text": 1}
