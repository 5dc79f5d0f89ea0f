"""What one request asks of sampling; the arithmetic is that of the `verify` op."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """What one request wants.

    Attributes:
        max_tokens: most tokens to generate.
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_k: keep the k most likely tokens, ties included; 0 keeps all.
        top_p: keep the smallest set of likeliest tokens whose mass reaches top_p; 1.0 keeps all. Applied after top_k.
        seed: 0 to 2**32 - 1. All randomness of the request is keyed by (seed, position, purpose).
        stop_token_ids: ids that end the completion, besides the model's own end-of-sequence ids.
        ignore_eos: do not stop at the model's end-of-sequence ids.
        logprobs: None for none; n >= 0 reports each token's log-probability under the causal distribution before
            temperature and filters, and those of the n likeliest alternatives (at most 20).
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"{self.max_tokens=} must be at least 1")
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"{self.temperature=} must be finite and not negative")
        if self.top_k < 0:
            raise ValueError(f"{self.top_k=} must not be negative (0 keeps every token)")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"{self.top_p=} must lie in (0, 1]")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"{self.seed=} must lie in [0, 2**32)")
        if any(token < 0 for token in self.stop_token_ids):
            raise ValueError(f"{self.stop_token_ids=} must not be negative")
        if self.logprobs is not None and not 0 <= self.logprobs <= 20:
            raise ValueError(f"{self.logprobs=} must be None or lie in 0..20")
