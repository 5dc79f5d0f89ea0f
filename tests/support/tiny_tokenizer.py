"""A byte tokenizer with a MASK token, built in memory."""

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from idlm_jax.model.language_model import LanguageModel, from_module
from tests.support.tiny_model import tiny_module

MASK_TEXT = "<|MASK|>"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """256 bytes, then end of text (256) and MASK (257)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": [MASK_TEXT]})
    return tokenizer


def lm_with_tokenizer(**changes: Any) -> LanguageModel:
    """A random model over that vocabulary."""
    module = tiny_module(**{"vocab_size": 258, "mask_token_id": 257, **changes})
    return from_module(module, tokenizer=byte_tokenizer())
