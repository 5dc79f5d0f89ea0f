"""Block diffusion again, for one request, in plain Python and without a KV cache, after SDAR's and SGLang's loops.

Every forward runs the whole sequence up to the end of the block from position 0 under a dense mask.
"""

import jax.numpy as jnp
import numpy as np

from idlm_jax.decoding.baselines import BlockDiffusion
from idlm_jax.decoding.sampling import SamplingParams
from idlm_jax.model.language_model import LanguageModel
from pallas_kernels.verify import Purpose
from tests.decoding.twin import TwinResult, dense_probs, draw, outputs, padded


def run_block_twin(lm: LanguageModel, prompt: list[int], how: BlockDiffusion, params: SamplingParams) -> TwinResult:
    """Decodes one prompt by definition; forwards include the prompt's."""
    mask_id, length = lm.config.mask_token_id, how.block_length
    assert mask_id is not None
    end, stops = len(prompt) + params.max_tokens, {*params.stop_token_ids, *lm.config.eos_token_ids}
    width = padded(-(-end // length) * length)
    number = np.arange(width) // length
    visible = jnp.asarray(number[:, None] >= number[None])[None]

    def rows(sequence: list[int]) -> np.ndarray:
        tokens = jnp.asarray([sequence + [0] * (width - len(sequence))], jnp.int32)
        return np.asarray(outputs(lm.graph, lm.params, tokens, jnp.zeros((1, width), bool), visible)[1])

    def draw_at(row: np.ndarray, place: int, step: int) -> tuple[int, float]:
        """A token for a place, and how sure the model is of it."""
        probs = dense_probs(row, params, mask_id)
        seeded = SamplingParams(seed=(params.seed + step * 2654435769) % 2**32)
        token = draw(probs, seeded, place, Purpose.COMMIT)
        sure = probs if params.temperature > 0 else dense_probs(row, SamplingParams(temperature=1.0), mask_id)
        return token, float(sure[token])

    steps = length if how.steps is None else how.steps
    shares = [len(part) for part in np.array_split(np.arange(length), steps)]
    committed, forwards = list(prompt), 0
    ahead: int | None = None  # drawn for the first place of the next block
    forwards += 1
    if how.predicts_next and len(prompt) % length == 0:
        ahead, _ = draw_at(rows(committed)[len(prompt) - 1], len(prompt), 0)
    while True:
        first = len(committed) // length * length
        given = len(committed) - first
        block = committed[first:] + [mask_id] * (length - given)
        fixed = given
        if ahead is not None:
            block[0], fixed = ahead, max(given, 1)
        step = num_edits = 0
        while True:
            logits = rows(committed[:first] + block)
            forwards += 1
            source = {place: first + place - how.predicts_next for place in range(length)}
            masked = [place for place in range(length) if block[place] == mask_id]
            drawn = {place: draw_at(logits[source[place]], first + place, step) for place in masked}
            share = shares[step] if step < steps else 0
            by_sureness = sorted(masked, key=lambda place: (-drawn[place][1], place))
            sure = [place for place in masked if drawn[place][1] > how.threshold]
            new = {place: drawn[place][0] for place in (sure if len(sure) >= share and sure else by_sureness[:share])}
            if how.edit_threshold is not None:
                for place in range(fixed, length):
                    if place in masked:
                        continue
                    soft = dense_probs(logits[source[place]], SamplingParams(temperature=1.0), mask_id)
                    likeliest = int(np.argmax(soft))
                    if likeliest != block[place] and soft[likeliest] > how.edit_threshold:
                        new[place] = likeliest
            num_edits += not masked
            if not masked and (not new or num_edits > how.max_edits):
                break
            for place, token in new.items():
                block[place] = token
            step += 1
        for token in block[given:]:
            committed.append(token)
            if token in stops or len(committed) == end:
                return TwinResult(committed[len(prompt) :], forwards)
        ahead = draw_at(logits[first + length - 1], len(committed), 0)[0] if how.predicts_next else None
