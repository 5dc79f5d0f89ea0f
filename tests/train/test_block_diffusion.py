"""Block diffusion's objective against one block at a time, and its noise against what it promises."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from idlm_jax.model.attention import causal_attend
from tests.support.tiny_model import tiny_module
from tests.train.dense_definition import MASK, packed_batch
from train.block_diffusion import block_diffusion_loss, count_rows, cut_blocks, measure_agreement, noise
from train.config import ConfigError, config_from_mapping
from train.objective import ar_loss

ROWS = 32
HOW = pytest.mark.parametrize("predicts_next", [False, True], ids=["own", "next"])


def documents(batch):
    """Row and places of each packed document."""
    for row, segments in enumerate(batch.segment_ids):
        for segment in sorted(set(np.asarray(segments)) - {0}):
            yield row, np.flatnonzero(np.asarray(segments) == segment)


@functools.cache
def forward(length: int):
    """Log-probabilities of every row of one document under the mask of decoding."""
    number = np.arange(ROWS) // length
    visible = jnp.asarray(number[:, None] >= number[None])
    positions = jnp.arange(ROWS, dtype=jnp.int32)[None]

    @nnx.jit
    def run(module, tokens, is_there):
        hidden, _ = module.hidden_states(tokens, positions, causal_attend((visible & is_there[None])[None]))
        return jax.nn.log_softmax(module.logits(hidden)[0])

    return run


def log_probs(module, tokens: np.ndarray, length: int) -> np.ndarray:
    """Of a document alone."""
    padded = np.zeros((1, ROWS), np.int32)
    padded[0, : len(tokens)] = tokens
    return np.asarray(forward(length)(module, jnp.asarray(padded), jnp.arange(ROWS) < len(tokens)))


def defined_loss(module, batch, length: int, predicts_next: bool) -> tuple[float, int]:
    """Sum of weighted cross-entropies, and tokens predicted: a forward for each block and one for each document."""
    blocks = cut_blocks(batch, length, predicts_next=predicts_next)
    is_masked, weights = map(np.asarray, noise(blocks, jnp.asarray(batch.block_phase), length))
    total, count = 0.0, 0
    for row, places in documents(batch):
        tokens = np.asarray(batch.tokens)[row, places]
        is_response = np.asarray(batch.is_response)[row, places]
        clean = log_probs(module, tokens, length)
        for start in range(0, len(tokens), length):
            stop = min(start + length, len(tokens))
            masked = np.flatnonzero(is_masked[row, places[start:stop]]) + start
            fed = tokens[:stop].copy()
            fed[masked] = MASK
            found = log_probs(module, fed, length)
            for place in masked:
                total -= weights[row, places[place]] * found[place - predicts_next, tokens[place]]
            hidden = is_response[start:stop].copy()
            if predicts_next:
                hidden[0] = False
                if is_response[start] and start > 0:
                    total -= clean[start - 1, tokens[start]]
                    count += 1
            count += hidden.sum()
            assert is_masked[row, places[start:stop]].sum() in (range(1, hidden.sum() + 1) if hidden.any() else (0,))
            assert not np.any(is_masked[row, places[start:stop]] & ~hidden)
    return total, count


def noisy_batch():
    batch = packed_batch()
    # A seed of noise for each document, as the pipeline draws them.
    return batch._replace(
        block_phase=np.where(np.asarray(batch.segment_ids) != 0, np.asarray(batch.segment_ids) * 7919, 0)
    )


@HOW
@pytest.mark.parametrize("length", [1, 3])
def test_the_loss_is_that_of_one_block_at_a_time(length, predicts_next):
    module = tiny_module(1)
    batch = noisy_batch()
    loss, terms = jax.jit(lambda batch: block_diffusion_loss(module, batch, length, predicts_next=predicts_next))(batch)
    total, count = defined_loss(module, batch, length, predicts_next)
    np.testing.assert_allclose(loss, total / count, rtol=2e-5)
    np.testing.assert_allclose(terms["loss"].mean, loss, rtol=1e-6)
    counts = count_rows(batch, length, predicts_next=predicts_next)
    assert float(counts.noisy + counts.clean) == count
    # Micro-batches add up, each with the denominators of all.
    parts = [jax.tree.map(lambda x, row=row: x[row : row + 1], batch) for row in range(len(batch.tokens))]
    losses = [block_diffusion_loss(module, part, length, counts, predicts_next=predicts_next)[0] for part in parts]
    np.testing.assert_allclose(sum(losses), loss, rtol=2e-5)


def test_blocks_of_one_that_predict_the_next_token_are_the_ar_loss():
    module, batch = tiny_module(1), noisy_batch()
    loss, _ = block_diffusion_loss(module, batch, 1, predicts_next=True)
    np.testing.assert_allclose(loss, ar_loss(module, batch)[0], rtol=1e-6)


def test_every_number_of_masks_is_as_likely_and_weights_average_to_one():
    length, documents = 4, 4000
    tokens = np.ones((1, length * documents), np.int32)
    segment_ids = np.repeat(np.arange(1, documents + 1, dtype=np.int32), length)[None]
    positions = np.tile(np.arange(length, dtype=np.int32), documents)[None]
    batch = packed_batch()._replace(
        tokens=tokens, segment_ids=segment_ids, positions=positions, is_response=np.ones_like(tokens, bool),
        block_phase=segment_ids * 31,
    )  # fmt: skip
    is_masked, weights = noise(cut_blocks(batch, length, predicts_next=False), jnp.asarray(batch.block_phase), length)
    masked = np.asarray(is_masked).reshape(documents, length)
    counts = np.bincount(masked.sum(1), minlength=length + 1)
    # 1,000 each; five standard deviations are 137.
    assert counts[0] == 0 and np.all(np.abs(counts[1:] - documents / length) < 137), counts
    assert np.all(np.abs(masked.mean(0) - 5 / 8) < 0.04), masked.mean(0)
    np.testing.assert_allclose(np.asarray(weights).reshape(documents, length).sum(1), length, rtol=1e-6)


@HOW
def test_agreement_is_the_overlap_of_two_ways_to_hide_a_block(predicts_next):
    module, batch, length = tiny_module(1), noisy_batch(), 3
    found = jax.jit(lambda batch: measure_agreement(module, batch, length, predicts_next=predicts_next))(batch)
    overlaps: dict[int, list[float]] = {0: [], 1: []}
    for row, places in documents(batch):
        tokens, is_response = (np.asarray(each)[row, places] for each in (batch.tokens, batch.is_response))
        for place in range(len(tokens)):
            start = place // length * length
            if place == start or not is_response[place]:
                continue
            stop = min(start + length, len(tokens))
            pair = []
            for first in (start + predicts_next, place):
                fed = tokens[:stop].copy()
                fed[first:stop] = np.where(is_response[first:stop], MASK, fed[first:stop])
                row_log_probs = log_probs(module, fed, length)[place - predicts_next].copy()
                row_log_probs[MASK] = -np.inf
                pair.append(np.exp(row_log_probs) / np.exp(row_log_probs).sum())
            overlaps[place - start - 1].append(np.minimum(*pair).sum())
    for depth, values in overlaps.items():
        term = found[f"acceptance/depth_{depth}"]
        assert float(term.num_rows) == len(values)
        np.testing.assert_allclose(term.mean, np.mean(values), rtol=1e-4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"random_block_phase": False}, "seeds its noise"),
        ({"lora": {}, "init_from": "x", "model": None}, "every parameter"),
        ({"tv_weight": 1.0}, "introspective"),
        ({"objective": "ar", "predicts_next": True}, "block_diffusion"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(wrong, message):
    values = {
        "run_name": "x",
        "objective": "block_diffusion",
        "random_block_phase": True,
        "steps": 1,
        "batch_size": 1,
        "dataset": {"path": "x"},
        "init_from": "x",
    }
    with pytest.raises(ConfigError, match=message):
        config_from_mapping({key: value for key, value in (values | wrong).items() if value is not None})
