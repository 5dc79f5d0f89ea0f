"""`trace`: which forward produced which token, and from what: a draft that was accepted, a bonus, a correction."""

import dataclasses
import enum
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax
from tokenizers.decoders import DecodeStream

from idlm_jax.decoding.method import Method
from idlm_jax.decoding.prompts import Prompt, encode_prompt
from idlm_jax.decoding.sampling import SamplingParams
from idlm_jax.decoding.stream import states
from idlm_jax.model.language_model import LanguageModel


class Source(enum.Enum):
    """Where a committed token comes from; the values are for people."""

    PREFILL = "prefill"  # the first token, from the forward that reads the prompt
    DRAFT = "accepted draft"
    BONUS = "bonus"  # behind the last draft, all accepted
    CORRECTION = "correction"  # in place of a refused draft
    COLD_START = "cold start"  # a forward that had no draft to verify
    PLAIN = "plain"  # a forward of a method that drafts nothing: AR, block diffusion


@dataclasses.dataclass(frozen=True)
class Forward:
    """What one forward verified and committed.

    Attributes:
        token_ids: committed ids, 1 to `stride` of them; none in a forward of block diffusion that its block outlasts.
        sources: where each comes from; accepted drafts come first.
        drafts: ids that the forward before had drafted for these places. Under "auto", a forward with a smaller stride
            verifies only the first of them.
        num_verified: drafts whose fate decided a committed token: the accepted ones and the first refused.
    """

    token_ids: tuple[int, ...]
    sources: tuple[Source, ...]
    drafts: tuple[int, ...]
    num_verified: int

    @property
    def num_accepted(self) -> int:
        """Drafts that were committed."""
        return self.sources.count(Source.DRAFT)

    @property
    def is_cold_start(self) -> bool:
        """Whether there was nothing to verify where there might have been."""
        return self.sources == (Source.COLD_START,)


def trace(
    lm: LanguageModel,
    prompt: Prompt,
    method: Method | None = None,
    sampling: SamplingParams | None = None,
    *,
    deterministic: Literal["bitwise"] | None = None,
) -> Iterator[Forward]:
    """Decodes one prompt a forward at a time, the prefill first, and tells what each did.

    The tokens together are those of `generate` for the same arguments, and so are the numbers of forwards, cold starts,
    and drafts verified and accepted.

    Args:
        lm: the model.
        prompt: text or token ids.
        method: as in `generate`.
        sampling: as in `generate`.
        deterministic: as in `generate`.

    Raises:
        ValueError: the prompt, or the method with this model, is refused as by `generate`.
    """
    ids = encode_prompt(lm, prompt, 0)
    committed, num_verified, num_accepted, num_cold = len(ids), 0, 0, 0
    drafts: tuple[int, ...] | None = None
    for state in states(lm, ids, method, sampling, deterministic=deterministic):
        # Read before the state is donated to the next forward.
        tokens, end, proposals, num_proposals, counts = jax.device_get(
            (state.tokens[0], state.context_len[0], state.proposals[0], state.num_proposals[0], state.counts)
        )
        token_ids = tuple(tokens[committed : int(end) + 1].tolist())
        verified = int(counts.verified[0].sum()) - num_verified
        accepted = int(counts.accepted[0].sum()) - num_accepted
        cold = int(counts.cold_starts[0]) - num_cold
        if drafts is None:
            last = Source.PREFILL
        elif cold:
            last = Source.COLD_START
        elif verified:
            last = Source.BONUS if verified == accepted else Source.CORRECTION
        else:
            last = Source.PLAIN
        # Where the completion ends inside the drafts, there is no token behind the accepted ones.
        sources = (Source.DRAFT,) * accepted + (last,) * (len(token_ids) - accepted)
        yield Forward(token_ids, sources, drafts or (), verified)
        committed += len(token_ids)
        num_verified, num_accepted, num_cold = num_verified + verified, num_accepted + accepted, num_cold + cold
        drafts = tuple(proposals[: int(num_proposals)].tolist())


def token_texts(lm: LanguageModel, token_ids: Sequence[int]) -> list[str]:
    """What each token adds to the text; "" for special tokens and for those that end inside a UTF-8 character.

    Without a tokenizer, the ids themselves.
    """
    if lm.tokenizer is None:
        return [f"{token} " for token in token_ids]
    decoder = DecodeStream(skip_special_tokens=True)
    backend: Any = lm.tokenizer.backend_tokenizer
    return [decoder.step(backend, token) or "" for token in token_ids]
