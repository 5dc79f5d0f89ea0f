import pytest
from transformers import AutoTokenizer

from tests.train.data.conftest import python_text
from train.data.tokenizer import load_tokenizer, train_tokenizer

TEXTS = [python_text(seed) for seed in range(30)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, vocab_size=330)


def test_every_text_round_trips(tokenizer):
    for text in (
        TEXTS[0],
        "tab\tand  two spaces \n\n",
        "naïve 猫 \U0001f600",
        "\x00\x7f\r\n",
        "don't re-join",
    ):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_the_vocabulary_holds_the_special_tokens_and_no_more_ids_than_asked(tokenizer):
    assert len(tokenizer) == 330
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|MASK|>"]) == [
        0,
        1,
        2,
        3,
    ]
    assert (tokenizer.eos_token, tokenizer.mask_token) == ("<|endoftext|>", "<|MASK|>")


def test_training_twice_gives_the_same_tokenizer(tokenizer):
    assert train_tokenizer(TEXTS, vocab_size=330).backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_an_indent_is_one_token_and_a_digit_is_one_token(tokenizer):
    pieces = tokenizer.tokenize("def f():\n        return 907\n")
    assert "Ġ" * 7 in pieces
    assert pieces[-4:-1] == ["9", "0", "7"]


def test_auto_tokenizer_reads_the_saved_folder(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    chat = [{"role": "user", "content": "alpha"}, {"role": "assistant", "content": "beta"}]
    expected = "<|im_start|>user\nalpha<|im_end|>\n<|im_start|>assistant\nbeta<|im_end|>\n"
    assert loaded.apply_chat_template(chat, tokenize=False) == expected
    assert loaded.encode(expected) == tokenizer.encode(expected)
    assert loaded.encode("<|im_end|><|MASK|>") == [2, 3]
    assert (loaded.eos_token_id, loaded.mask_token_id) == (0, 3)
    assert load_tokenizer(tmp_path).get_vocab() == tokenizer.get_vocab()


def test_a_missing_tokenizer_folder_is_refused_without_asking_the_network(tmp_path):
    with pytest.raises(ValueError, match="does not exist; give a local folder"):
        load_tokenizer(tmp_path / "Qwen3-8B")
