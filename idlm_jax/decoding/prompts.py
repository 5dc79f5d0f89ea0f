"""From what a caller passes to checked token ids."""

from collections.abc import Sequence

from idlm_jax.model.language_model import LanguageModel

Prompt = str | Sequence[int]


def encode_prompt(lm: LanguageModel, prompt: Prompt, index: int) -> list[int]:
    """Token ids of one prompt.

    Text is tokenized as the tokenizer does, special tokens included (so a rendered chat template works), except
    for the MASK token: text that spells it stays text, for a MASK in the prompt would be read as a draft position.

    Args:
        lm: the model.
        prompt: text, or token ids.
        index: place in the batch, for messages.

    Raises:
        ValueError: text without a tokenizer, an empty prompt, an id outside the vocabulary, a MASK id.
    """
    if isinstance(prompt, str):
        ids = _encode_text(lm, prompt, index)
    else:
        ids = [int(token) for token in prompt]
    config = lm.config
    if not ids:
        raise ValueError(f"prompt {index} is empty: a prompt needs at least one token")
    outside = [token for token in ids if not 0 <= token < config.vocab_size]
    if outside:
        source = "the tokenizer and the model disagree" if isinstance(prompt, str) else "they were passed in"
        raise ValueError(
            f"prompt {index} holds ids {outside[:5]} outside the vocabulary of {config.vocab_size} ({source})"
        )
    if config.mask_token_id in ids:
        raise ValueError(f"prompt {index} holds the MASK id {config.mask_token_id}, which only decoding may feed")
    return ids


def _encode_text(lm: LanguageModel, text: str, index: int) -> list[int]:
    tokenizer = lm.tokenizer
    if tokenizer is None:
        raise ValueError(f"prompt {index} is text, but the model folder has no tokenizer: pass token ids")
    pieces = [text]
    mask_id = lm.config.mask_token_id
    mask_text = tokenizer.convert_ids_to_tokens(mask_id) if mask_id is not None and mask_id < len(tokenizer) else None
    if isinstance(mask_text, str) and len(mask_text) > 1 and mask_text in text:
        # Cutting every spelled-out MASK in the middle leaves no place where the tokenizer could see it whole.
        half = len(mask_text) // 2
        pieces = text.replace(mask_text, mask_text[:half] + "\0" + mask_text[half:]).split("\0")
    return [token for piece in pieces for token in tokenizer.encode(piece, add_special_tokens=False)]
