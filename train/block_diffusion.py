"""What block diffusion is trained with: some tokens of a block from the rest of it and the blocks before.

Owns its noising, its mask, its loss and its measure of agreement. The grid of blocks starts with each document, as the
one of decoding does with each prompt.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from idlm_jax.array_types import Keys, Queries
from idlm_jax.model.attention import masked_attention
from idlm_jax.model.transformer import Qwen3
from train.batch import Batch
from train.layout import RowCounts, next_row
from train.mesh import along_stream
from train.objective import agreement, cross_entropy, mask_token_id
from train.row_means import Metrics, RowMean, count_true, mean_over


class Blocks(NamedTuple):
    """Which token stands where in which block; every array [B, L].

    Attributes:
        tokens: of the clean stream.
        positions: inside the document.
        segment_ids: document of each row; 0 is padding.
        start: position at which the row's block starts.
        is_hidden: the token may be replaced by MASK: one of a response, and if rows predict the next token, not the
            first of its block, which the block before predicts.
        is_first: the token is predicted by the clean row before it.
    """

    tokens: Int[Array, "B L"]
    positions: Int[Array, "B L"]
    segment_ids: Int[Array, "B L"]
    start: Int[Array, "B L"]
    is_hidden: Bool[Array, "B L"]
    is_first: Bool[Array, "B L"]

    @property
    def place(self) -> Int[Array, "B L"]:
        """Of each token in its block, from 0."""
        return self.positions - self.start


def cut_blocks(batch: Batch, block_length: int, *, predicts_next: bool) -> Blocks:
    """Cuts documents into blocks; `block_phase` is no phase here but the source of noise (`block_diffusion_loss`)."""
    tokens, segment_ids, positions, is_response, _ = (jnp.asarray(array) for array in batch)
    start = positions // block_length * block_length
    is_response &= segment_ids != 0
    starts_block = jnp.full_like(is_response, predicts_next) & (positions == start)
    return Blocks(
        tokens, positions, segment_ids, start, is_response & ~starts_block, is_response & starts_block & (positions > 0)
    )


def count_rows(batch: Batch, block_length: int, *, predicts_next: bool) -> RowCounts:
    """Tokens that are predicted, by noisy and by clean rows: the loss is a mean over both."""
    blocks = cut_blocks(batch, block_length, predicts_next=predicts_next)
    return RowCounts(count_true(blocks.is_hidden), count_true(blocks.is_first))


def block_diffusion_loss(
    module: Qwen3, batch: Batch, block_length: int, row_counts: RowCounts | None = None, *, predicts_next: bool = False
) -> tuple[Float[Array, ""], Metrics]:
    """A bound on the negative log-likelihood per token, over all orders in which a block may be filled.

    In each block of n hidden tokens, m of 1..n (all equally likely) are replaced by MASK, any m alike; the loss is
    n / m times their cross-entropies, given the rest of the block and the blocks before it. `[x_t | x_0]` runs as one
    forward: noisy rows see all of their noisy block and the clean blocks before it, clean rows all of their block and
    those before.

    Args:
        module: the model; every parameter is trained.
        batch: packed documents, arrays [B, L]. `block_phase` seeds the noise of each document.
        block_length: tokens of a block.
        row_counts: of `count_rows`, to use instead of this batch's own, as in `introspective_loss`.
        predicts_next: row i predicts token i + 1; the first token of a block is predicted by the clean row before it.

    Returns:
        The loss, float32, and its terms: `loss`, `ce_noisy` (weighted as above), `ce_clean` (0 rows unless
        `predicts_next`) and `masked`, the share of hidden tokens that were replaced.

    Raises:
        ValueError: the model has no MASK id.

    Source: BD3-LM (arXiv 2503.09573) and SDAR (arXiv 2510.06303). differs: the number of MASKs is drawn, not their
    rate, which bounds the same likelihood with less variance and no weight above n.
    """
    blocks = cut_blocks(batch, block_length, predicts_next=predicts_next)
    is_masked, weights = noise(blocks, jnp.asarray(batch.block_phase), block_length)
    hidden = _hidden(module, blocks, is_masked)
    num_rows = blocks.tokens.shape[1]
    labels = next_row(blocks.tokens) if predicts_next else blocks.tokens
    scored = [next_row(each) if predicts_next else each for each in (is_masked, blocks.is_first)]
    ce = cross_entropy(hidden, module.head_weight(), jnp.tile(labels, (1, 2)), jnp.concatenate(scored, axis=1))
    row_weights = next_row(weights) if predicts_next else weights
    noisy = RowMean(jnp.sum(row_weights * ce[:, :num_rows]), count_true(blocks.is_hidden))
    clean = RowMean(jnp.sum(ce[:, num_rows:]), count_true(blocks.is_first))
    counts = row_counts or RowCounts(noisy.num_rows, clean.num_rows)
    loss = (noisy.total + clean.total) / jnp.maximum(counts.noisy + counts.clean, 1.0)
    metrics = {
        "loss": RowMean(noisy.total + clean.total, noisy.num_rows + clean.num_rows),
        "ce_noisy": noisy,
        "ce_clean": clean,
        "masked": RowMean(count_true(is_masked), noisy.num_rows),
    }
    return loss, jax.lax.stop_gradient(metrics)


def measure_agreement(module: Qwen3, batch: Batch, block_length: int, *, predicts_next: bool = False) -> Metrics:
    """How much a token's distribution with its whole block hidden agrees with the one behind its known left part.

    q hides the block, p hides the token and what follows it in the block; both see the blocks before. `acceptance` is
    sum_v min(p, q), the chance that a token filled in by the first forward over a block would survive a check from left
    to right: what the introspective acceptance rate is for a model whose rows see both ways. Named as in
    `measure_acceptance`; depth d is the token d + 1 places behind the block's first, whose p is q.
    """
    blocks = cut_blocks(batch, block_length, predicts_next=predicts_next)
    num_rows = blocks.tokens.shape[1]
    labels = next_row(blocks.tokens) if predicts_next else blocks.tokens
    q_rows = _hidden(module, blocks, blocks.is_hidden)[:, :num_rows]
    mask_id, weight = mask_token_id(module), module.head_weight()
    metrics: Metrics = {}
    for depth in range(block_length - 1):
        p_rows = _hidden(module, blocks, blocks.is_hidden & (blocks.place > depth))[:, :num_rows]
        is_counted = blocks.is_hidden & (blocks.place == depth + 1)
        is_counted = next_row(is_counted) if predicts_next else is_counted
        for name, values in agreement(q_rows, p_rows, weight, labels, mask_id).items():
            found = mean_over(is_counted, values)
            metrics[f"{name}/depth_{depth}"] = found
            before = metrics.get(name, RowMean(jnp.float32(0), jnp.float32(0)))
            metrics[name] = RowMean(before.total + found.total, before.num_rows + found.num_rows)
    return jax.lax.stop_gradient(metrics)


def noise(
    blocks: Blocks, phase: Int[Array, "B L"], block_length: int
) -> tuple[Bool[Array, "B L"], Float[Array, "B L"]]:
    """Which tokens are replaced by MASK, and n / m on those."""
    of_token, of_block = (_uniform(phase, *at) for at in ((blocks.positions, 0), (blocks.start, 1)))
    rank, size = jnp.zeros_like(blocks.start), blocks.is_hidden.astype(jnp.int32)
    for distance in [each for span in range(1, block_length) for each in (span, -span)]:
        segment, start, is_hidden, other = (
            _shifted(each, distance) for each in (blocks.segment_ids, blocks.start, blocks.is_hidden, of_token)
        )
        is_neighbour = (segment == blocks.segment_ids) & (start == blocks.start) & is_hidden
        size += is_neighbour.astype(jnp.int32)
        rank += (is_neighbour & (other < of_token)).astype(jnp.int32)
    num_masked = 1 + jnp.floor(of_block * size.astype(jnp.float32)).astype(jnp.int32)
    is_masked = blocks.is_hidden & (rank < num_masked)
    return is_masked, jnp.where(is_masked, size.astype(jnp.float32) / num_masked.astype(jnp.float32), 0.0)


def _uniform(phase: Int[Array, "B L"], place: Int[Array, "B L"], salt: int) -> Float[Array, "B L"]:
    """A number in [0, 1) for each row, the same for rows of the same phase and place."""

    def draw(phase: Int[Array, ""], place: Int[Array, ""]) -> Float[Array, ""]:
        key = jax.random.key(salt)
        return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, phase), place))

    return jax.vmap(jax.vmap(draw))(phase, place)


def _hidden(module: Qwen3, blocks: Blocks, is_masked: Bool[Array, "B L"]) -> Float[Array, "B T D"]:
    """Final hidden states of `[x_t | x_0]` under the mask of block diffusion, dense: [B, 2L, 2L]."""
    same = (blocks.segment_ids[:, :, None] == blocks.segment_ids[:, None]) & (blocks.segment_ids != 0)[:, :, None]
    is_before, is_own = (same & op(blocks.start[:, None], blocks.start[:, :, None]) for op in (jnp.less, jnp.equal))
    noisy_sees = jnp.concatenate([is_own, is_before], axis=2)
    clean_sees = jnp.concatenate([jnp.zeros_like(is_own), is_own | is_before], axis=2)
    mask = jnp.concatenate([noisy_sees, clean_sees], axis=1)

    def attend(q: Queries, k: Keys, v: Keys, layer: Int[Array, ""], carried: Any) -> tuple[Queries, Any]:
        del layer
        return masked_attention(q, k, v, mask), carried

    noisy = jnp.where(is_masked, jnp.asarray(mask_token_id(module), blocks.tokens.dtype), blocks.tokens)
    hidden, _ = module.hidden_states(
        along_stream(jnp.concatenate([noisy, blocks.tokens], axis=1)),
        along_stream(jnp.tile(blocks.positions, (1, 2))),
        attend,
    )
    return hidden


def _shifted(array: Array, distance: int) -> Array:
    """The row `distance` places to the right; 0 or False outside."""
    if distance < 0:
        return jnp.pad(array, ((0, 0), (-distance, 0)))[:, :distance]
    return jnp.pad(array[:, distance:], ((0, 0), (0, distance)))
