"""The dataset's tokenizer: a byte-level BPE trained here, or one that exists."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

END_OF_TEXT, IM_START, IM_END, MASK = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|MASK|>"

# Qwen's split, which is GPT-4's with single digits. A run of spaces stays whole but for the last one, which
# joins the word that follows it: an indent of any depth can cost one token.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str], *, vocab_size: int, show_progress: bool = False) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE; every byte string round-trips, and equal texts give an equal tokenizer.

    Args:
        texts: of the train side only.
        vocab_size: upper bound of the ids, the four special tokens included; a small corpus may yield fewer.
        show_progress: print the trainer's own bar.

    Returns:
        A tokenizer whose folder `AutoTokenizer` loads: eos and pad `<|endoftext|>`, mask `<|MASK|>`, ChatML.
    """
    special = [END_OF_TEXT, IM_START, IM_END, MASK]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=show_progress,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        mask_token=MASK,
        additional_special_tokens=[IM_START, IM_END],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """Loads a tokenizer folder; nothing is downloaded.

    Raises:
        ValueError: no such folder, or it holds no tokenizer, or one that is not fast.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"tokenizer folder {folder} does not exist; give a local folder with a tokenizer.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (ValueError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{folder} holds no tokenizer that transformers can load: {reason}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"{folder} holds a {type(tokenizer).__name__}; only fast tokenizers are supported")
    return tokenizer


def folder_sha256(folder: str | Path) -> str:
    """Hash of the files that decide what a tokenizer folder does.

    Raises:
        ValueError: no such folder.
    """
    digest = hashlib.sha256()
    if not Path(folder).is_dir():
        raise ValueError(f"tokenizer folder {folder} does not exist; give a local folder with a tokenizer.json")
    for path in sorted(Path(folder).iterdir()):
        if path.suffix in (".json", ".jinja", ".txt", ".model") and path.is_file():
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def end_of_document_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """Id that ends a file.

    `<|endoftext|>` where the vocabulary holds it (the eos of Qwen3's chat models is `<|im_end|>`, which ends
    a turn, not a text), else the tokenizer's eos.

    Raises:
        ValueError: the tokenizer has neither.
    """
    token_id = tokenizer.get_vocab().get(END_OF_TEXT, tokenizer.eos_token_id)
    if not isinstance(token_id, int):
        raise ValueError(f"the tokenizer has neither {END_OF_TEXT} nor an eos token to end a document with")
    return token_id


def special_texts(tokenizer: PreTrainedTokenizerFast) -> tuple[str, ...]:
    """How the special tokens are spelled; text that contains one would be read as the token itself."""
    return tuple(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
