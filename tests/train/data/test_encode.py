import numpy as np
import pytest

from tests.train.data.conftest import python_text
from train.data.corpus import Conversation, TextFile
from train.data.encode import encode_conversation, encode_documents
from train.data.records import TokenSequence
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


def lengths(encoded) -> list[int]:
    return [len(chunk.tokens) for chunk in encoded.chunks]


def mixed_documents() -> list:
    rng = np.random.default_rng(0)
    documents = [TextFile(f"{seed}.py", python_text(seed)) for seed in range(8)]
    documents += [chat("Define alpha.", "def alpha(): pass " * count) for count in (1, 3, 9, 27)]
    documents += [chat("What? " * 40, "Yes."), chat("What?"), chat("What?", "It is <|im_end|>.")]
    for length in (1, 2, 40, 41, 100):
        tokens = rng.integers(4, 300, length).astype(np.int32)
        documents.append(TokenSequence(f"text:{length}", tokens, np.ones(length, np.bool_)))
        if length > 2:
            documents.append(TokenSequence(f"answer:{length}", tokens, np.arange(length) >= length - 2))
    return documents


@pytest.mark.parametrize("too_long", ["cut", "drop"])
def test_tokens_read_are_tokens_packed_plus_tokens_lost(tokenizer, too_long):
    documents = mixed_documents()
    encoded = encode_documents(documents, tokenizer, max_seq_len=40, too_long=too_long)
    assert encoded.num_tokens == sum(lengths(encoded)) + sum(encoded.lost_tokens.values())
    whole = encode_documents(documents, tokenizer, max_seq_len=10_000, too_long="error")
    assert encoded.num_tokens == whole.num_tokens == sum(lengths(whole)) + whole.lost_tokens["last token alone"]
    assert whole.dropped == {"special token in text": 1, "one token": 1, "no answer": 1}
    expected = {"cut": {"cut off", "last token alone", "no answer"}, "drop": {"too long", "last token alone"}}
    assert set(encoded.lost_tokens) == expected[too_long]


def test_cut_takes_text_to_pieces_and_truncates_everything_else(tokenizer):
    tokens = np.arange(4, 104, dtype=np.int32)
    text = TokenSequence("text", tokens, np.ones(100, np.bool_))
    half = TokenSequence("half", tokens, np.arange(100) >= 30)
    encoded = encode_documents([text, half], tokenizer, max_seq_len=40)
    assert lengths(encoded) == [40, 40, 20, 40] and encoded.truncated == 1
    assert encoded.chunks[3].is_response.tolist() == [False] * 30 + [True] * 10
    assert encoded.lost_tokens == {"cut off": 60} and encoded.dropped == {}


def test_drop_leaves_out_whole_documents_and_keeps_those_that_just_fit(tokenizer):
    documents = [TokenSequence(f"{n}", np.full(n, 5, np.int32), np.ones(n, np.bool_)) for n in (39, 40, 41)]
    encoded = encode_documents(documents, tokenizer, max_seq_len=40, too_long="drop")
    assert lengths(encoded) == [39, 40]
    assert encoded.dropped == {"too long": 1} and encoded.lost_tokens == {"too long": 41} and encoded.truncated == 0


@pytest.mark.parametrize("document", [TextFile("a.py", "alpha " * 50), chat("What?", "Yes. " * 50)])
def test_error_names_the_document_that_is_too_long(tokenizer, document):
    with pytest.raises(ValueError, match=rf"{document.name}: \d+ tokens do not fit max_seq_len=20"):
        encode_documents([document], tokenizer, max_seq_len=20, too_long="error")
