"""What one request asks of sampling; the arithmetic is that of the `verify` op."""

import dataclasses
import math

MAX_BIASES = 300  # as OpenAI


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
            temperature, filters and everything below, and those of the n likeliest alternatives (at most 20).
        min_tokens: no stop id before that many tokens.
        min_p: keep tokens that are at least this share as likely as the likeliest; 0 keeps all. Before top_k and top_p.
        presence_penalty: taken off the logit of every token generated before.
        frequency_penalty: taken off once for each time that it was.
        repetition_penalty: divides positive logits of tokens in prompt or completion, multiplies others; 1 is none.
        logit_bias: (id, bias) added to logits; at most 300.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    min_tokens: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()

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
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise ValueError(f"{self.min_tokens=} must lie in 0..max_tokens={self.max_tokens}")
        if not 0.0 <= self.min_p <= 1.0:
            raise ValueError(f"{self.min_p=} must lie in [0, 1]")
        for name in ("presence_penalty", "frequency_penalty"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"self.{name}={getattr(self, name)} must be finite")
        if not 0.0 < self.repetition_penalty < float("inf"):
            raise ValueError(f"{self.repetition_penalty=} must be finite and above 0")
        if len(self.logit_bias) > MAX_BIASES:
            raise ValueError(f"logit_bias has {len(self.logit_bias)} entries, at most {MAX_BIASES} are allowed")
        if any(token < 0 or not math.isfinite(bias) for token, bias in self.logit_bias):
            raise ValueError("logit_bias must hold ids that are not negative, and finite values")

    @property
    def counts_tokens(self) -> bool:
        """Whether there are penalties for what was said before."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1

    @property
    def is_shaped(self) -> bool:
        """Whether logits are changed before temperature and filters (`shaping.py`)."""
        return self.counts_tokens or self.min_tokens > 0 or self.min_p > 0 or bool(self.logit_bias)
