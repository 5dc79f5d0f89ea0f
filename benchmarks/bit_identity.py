"""Are two lists of completions the same, bit for bit? Prompts cut from texts, and where completions of them differ."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from idlm_jax.decoding.generate import Completion

LENGTHS = (4, 32)  # shortest and longest prompt
Mode = Literal["bitwise"] | None


def cuts(texts: Sequence[str], tokenizer: Any, num_prompts: int, seed: int = 0) -> list[list[int]]:
    """Stretches of mixed length from texts, at random places."""
    encoded = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    encoded = [tokens for tokens in encoded if len(tokens) > LENGTHS[1]]
    rng = np.random.default_rng(seed)
    prompts = []
    for _ in range(num_prompts):
        tokens = encoded[rng.integers(len(encoded))]
        length = int(rng.integers(LENGTHS[0], LENGTHS[1] + 1))
        first = int(rng.integers(0, len(tokens) - length))
        prompts.append(tokens[first : first + length])
    return prompts


def differences(found: Sequence[Completion], wanted: Sequence[Completion]) -> dict[str, int | None]:
    """Places at which tokens and checksums differ, and prompts with a differing token."""
    tokens = np.array([each.token_ids for each in found]) != np.array([each.token_ids for each in wanted])
    sums = [(each.logit_checksums, other.logit_checksums) for each, other in zip(found, wanted, strict=True)]
    has_sums = all(mine is not None and other is not None for mine, other in sums)
    return {
        "tokens": tokens.size,
        "differing_tokens": int(tokens.sum()),
        "differing_prompts": int(tokens.any(1).sum()),
        "differing_checksums": int(sum((np.array(a) != np.array(b)).sum() for a, b in sums)) if has_sums else None,
    }
