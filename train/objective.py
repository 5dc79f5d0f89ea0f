"""What training minimises: cross-entropy on a noisy and on a clean stream; and how well the two agree.

Owns noising, the block grid, which rows are scored, the loss and the acceptance measure. Knows nothing of
optimizers, steps or devices. Every document of length L runs as `[x_t | x_0]`: x_0 the clean tokens, x_t the
same with each response token replaced by MASK, both at positions 0..L-1. Row i is scored on token i+1.
"""

import dataclasses
import enum
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from idlm_jax.array_types import Keys, Queries
from idlm_jax.model.transformer import Qwen3
from pallas_kernels.linear_cross_entropy import linear_cross_entropy
from pallas_kernels.two_stream_attention import packed_causal_attention, two_stream_attention
from train.batch import Batch


class LabelRows(enum.Enum):
    """Which noisy rows are scored, among those whose next token lies in the same document.

    MASK_ROWS: MASK rows whose next token is a response token: the rows that decoding drafts from.
    OFFICIAL: rows at response positions, so also an answer's last row, where the document goes on after it.
    AUTOMODEL: rows whose next token is a response token, so also the last prompt row, which is no MASK.

    Clean rows are scored alike under all three: where the next token is a response token.
    """

    MASK_ROWS = "mask_rows"
    OFFICIAL = "official"
    AUTOMODEL = "automodel"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectiveSettings:
    """How the two streams are laid out and weighed.

    Attributes:
        block_length: MASK positions per block, 1..15: the largest stride that will run, minus one.
        clean_weight: alpha in CE_noisy + alpha * CE_clean; not read under `auto_balance`.
        auto_balance: alpha = stop_gradient(CE_noisy / CE_clean) instead.
        label_rows: which noisy rows are scored.
    """

    block_length: int
    clean_weight: float = 0.2
    auto_balance: bool = False
    label_rows: LabelRows = LabelRows.MASK_ROWS

    def __post_init__(self) -> None:
        if not 1 <= self.block_length <= 15:
            raise ValueError(f"{self.block_length=} must be in 1..15: strides go from 2 to 16")
        if not 0 <= self.clean_weight < float("inf"):
            raise ValueError(f"{self.clean_weight=} must be finite and not negative")


class RowMean(NamedTuple):
    """A mean in two parts: those of several batches add up, field by field, to the mean over all rows."""

    total: Float[Array, ""]
    num_rows: Float[Array, ""]

    @property
    def mean(self) -> Float[Array, ""]:
        """The quotient; 0 where nothing was counted."""
        return self.total / jnp.maximum(self.num_rows, 1.0)


Metrics = dict[str, RowMean]


class RowCounts(NamedTuple):
    """Scored rows per stream, float32: the denominators of the loss."""

    noisy: Float[Array, ""]
    clean: Float[Array, ""]


class Layout(NamedTuple):
    """All that can be read off a batch without a forward; every array [B, L].

    Attributes:
        tokens: x_0.
        positions: of the rows of either half.
        segment_ids: document of each row; 0 is padding.
        is_mask: the noisy row is fed MASK; decided by the token's role, never by its id: a prompt may hold
            the MASK id.
        block_start: position at which the row's block starts; 0 or less in the first block, which therefore
            has no clean context.
        depth: MASKs before this row in its own block, 0..b-1: the row of decoding's draft `depth + 1`. It is
            the position inside the block, except where prompt tokens or a shifted grid take the first places.
        labels: the next token; 0 where there is none.
        is_noisy_scored: the noisy row has a label that counts.
        is_clean_scored: the clean row has one.
    """

    tokens: Int[Array, "B L"]
    positions: Int[Array, "B L"]
    segment_ids: Int[Array, "B L"]
    is_mask: Bool[Array, "B L"]
    block_start: Int[Array, "B L"]
    depth: Int[Array, "B L"]
    labels: Int[Array, "B L"]
    is_noisy_scored: Bool[Array, "B L"]
    is_clean_scored: Bool[Array, "B L"]

    def count_rows(self) -> RowCounts:
        return RowCounts(_count(self.is_noisy_scored), _count(self.is_clean_scored))


def lay_out(batch: Batch, settings: ObjectiveSettings) -> Layout:
    """Noises a batch, cuts it into blocks and marks the scored rows.

    Position i of a document with grid offset o = phase % b lies in block k = (i + o) // b, which starts at
    k*b - o.

    Args:
        batch: packed documents; the tokens of one document are neighbours, in order.
        settings: `block_length` and `label_rows` are read.
    """
    tokens, segment_ids, positions, is_response, phase = (jnp.asarray(array) for array in batch)
    block_length = settings.block_length
    offset = phase % block_length
    block_start = (positions + offset) // block_length * block_length - offset

    depth = jnp.zeros(tokens.shape, jnp.int32)
    for distance in range(1, block_length):
        is_same_block = (_before(segment_ids, distance) == segment_ids) & (
            _before(block_start, distance) == block_start
        )
        depth += (is_same_block & _before(is_response, distance)).astype(jnp.int32)

    has_next = (segment_ids != 0) & (_next(segment_ids) == segment_ids)
    predicts_response = has_next & _next(is_response)
    match settings.label_rows:
        case LabelRows.MASK_ROWS:
            is_noisy_scored = is_response & predicts_response
        case LabelRows.OFFICIAL:
            is_noisy_scored = is_response & has_next
        case LabelRows.AUTOMODEL:
            is_noisy_scored = predicts_response
    return Layout(
        tokens=tokens,
        positions=positions,
        segment_ids=segment_ids,
        is_mask=is_response,
        block_start=block_start,
        depth=depth,
        labels=_next(tokens),
        is_noisy_scored=is_noisy_scored,
        is_clean_scored=predicts_response,
    )


def introspective_loss(
    module: Qwen3, batch: Batch, settings: ObjectiveSettings, row_counts: RowCounts | None = None
) -> tuple[Float[Array, ""], Metrics]:
    """CE_noisy + alpha * CE_clean from one forward over [x_t | x_0], each a mean over its own scored rows.

    With an adapter (`config.lora`) the base counts as frozen: the adapter acts on MASK rows alone, clean rows
    are the base's own, the loss is CE_noisy, and nothing is differentiated through the clean stream.

    Args:
        module: the model; its config names the MASK id.
        batch: packed documents, arrays [B, L].
        settings: layout and weights.
        row_counts: denominators to use instead of this batch's own. Given the counts of a whole step
            (`lay_out(...).count_rows()`), the losses and gradients of its micro-batches add up to the step's:
            exactly for a fixed alpha; an automatic one stays each micro-batch's own ratio of means.

    Returns:
        The loss, float32, and its terms: `ce_noisy`, `ce_clean`, `ce_noisy/depth_<d>` (MASK rows only) and
        `alpha`, the weight that CE_clean had in this loss: 0 with an adapter.

    Raises:
        ValueError: the model has no MASK id.

    Source: I-DLM (arXiv 2604.11035), automatic alpha included. differs: scored rows default to those that
    decoding reads (`LabelRows`).
    """
    layout = lay_out(batch, settings)
    ce = _cross_entropy(
        module,
        two_stream_hidden(module, layout),
        jnp.tile(layout.labels, (1, 2)),
        jnp.concatenate([layout.is_noisy_scored, layout.is_clean_scored], axis=1),
    )
    ce_noisy, ce_clean = jnp.split(ce, 2, axis=1)
    noisy = _mean_over(layout.is_noisy_scored, ce_noisy)
    clean = _mean_over(layout.is_clean_scored, ce_clean)

    if module.config.lora is not None:
        # Clean rows then get a cotangent of 0, and the head's backward pass drops such rows.
        alpha = jnp.float32(0)
    elif settings.auto_balance:
        # The floor only matters for a batch without a scored clean row, whose CE_clean is 0.
        alpha = jax.lax.stop_gradient(noisy.mean / jnp.maximum(clean.mean, 1e-6))
    else:
        alpha = jnp.float32(settings.clean_weight)
    counts = row_counts or layout.count_rows()
    loss = noisy.total / jnp.maximum(counts.noisy, 1.0) + alpha * clean.total / jnp.maximum(counts.clean, 1.0)

    metrics = {"ce_noisy": noisy, "ce_clean": clean, "alpha": RowMean(alpha, jnp.float32(1))}
    is_draft = layout.is_noisy_scored & layout.is_mask
    metrics |= _means_by_depth("ce_noisy", ce_noisy, is_draft, layout.depth, settings.block_length)
    return loss, jax.lax.stop_gradient(metrics)


def ar_loss(module: Qwen3, batch: Batch, row_counts: RowCounts | None = None) -> tuple[Float[Array, ""], Metrics]:
    """Causal next-token cross-entropy on the clean stream alone: CE_clean of the same batch.

    Args:
        module: the model; an adapter is left out.
        batch: packed documents, arrays [B, L]; each sees only itself.
        row_counts: denominators to use instead of this batch's own; only `clean` is read.

    Returns:
        The loss, float32, and `ce_clean`.
    """
    layout = lay_out(batch, ObjectiveSettings(block_length=1))
    kernels = module.config.kernels

    def attend(q: Queries, k: Keys, v: Keys, layer: Int[Array, ""], carried: Any) -> tuple[Queries, Any]:
        del layer
        mixed = packed_causal_attention(
            q,
            k,
            v,
            segment_ids=layout.segment_ids,
            positions=layout.positions,
            body=kernels.two_stream_attention,
            interpret=kernels.interpret,
        )
        return mixed, carried

    hidden, _ = module.hidden_states(layout.tokens, layout.positions, attend)
    ce = _cross_entropy(module, hidden, layout.labels, layout.is_clean_scored)
    clean = _mean_over(layout.is_clean_scored, ce)
    num_rows = clean.num_rows if row_counts is None else row_counts.clean
    return clean.total / jnp.maximum(num_rows, 1.0), {"ce_clean": jax.lax.stop_gradient(clean)}


def measure_acceptance(module: Qwen3, batch: Batch, settings: ObjectiveSettings, *, tile_rows: int = 512) -> Metrics:
    """How often drafts would be accepted, at temperature 1 and 0, after true prefixes; no gradient.

    At a MASK row i with a label, the noisy stream gives q and the clean stream p, both for token i+1 and both
    as decoding takes them: without the MASK id. A draft drawn from q and kept with probability min(1, p/q) is
    kept with probability sum_v min(p, q), so nothing has to be sampled. The row at depth d stands for draft
    d + 1, given that the drafts before it were kept and equal the data.

    Args:
        module: the model; its config names the MASK id.
        batch: packed documents, arrays [B, L].
        settings: only `block_length` is read; the rows are always those of `LabelRows.MASK_ROWS`.
        tile_rows: rows whose logits exist at a time: two float32 arrays [tile_rows, V] and what derives from
            them.

    Returns:
        Over all rows, and under `<name>/depth_<d>`: `acceptance` (sum_v min(p, q)), `greedy_acceptance`
        (argmax p = argmax q), `argmax_acceptance` (p at argmax q: an argmax draft checked at temperature 1),
        `ce_noisy` and `ce_clean` (MASK id included, as in the losses).

    Raises:
        ValueError: the model has no MASK id.
    """
    layout = lay_out(batch, dataclasses.replace(settings, label_rows=LabelRows.MASK_ROWS))
    noisy, clean = jnp.split(two_stream_hidden(module, layout), 2, axis=1)
    head, mask_token_id = module.head_weight(), _mask_token_id(module)

    def compare(row: tuple[Float[Array, " D"], Float[Array, " D"], Int[Array, ""]]) -> dict[str, Array]:
        noisy_row, clean_row, label = row
        noisy_logits = jnp.einsum("D,VD->V", noisy_row, head, preferred_element_type=jnp.float32)
        clean_logits = jnp.einsum("D,VD->V", clean_row, head, preferred_element_type=jnp.float32)
        proposal_probs = jax.nn.softmax(noisy_logits.at[mask_token_id].set(-jnp.inf))
        anchor_probs = jax.nn.softmax(clean_logits.at[mask_token_id].set(-jnp.inf))
        draft = jnp.argmax(proposal_probs)
        return {
            "acceptance": jnp.sum(jnp.minimum(anchor_probs, proposal_probs)),
            "greedy_acceptance": (jnp.argmax(anchor_probs) == draft).astype(jnp.float32),
            "argmax_acceptance": anchor_probs[draft],
            "ce_noisy": jax.nn.logsumexp(noisy_logits) - noisy_logits[label],
            "ce_clean": jax.nn.logsumexp(clean_logits) - clean_logits[label],
        }

    width = noisy.shape[-1]
    rows = noisy.reshape(-1, width), clean.reshape(-1, width), layout.labels.reshape(-1)
    metrics: Metrics = {}
    for name, flat_values in jax.lax.map(compare, rows, batch_size=tile_rows).items():
        values = flat_values.reshape(layout.depth.shape)
        metrics[name] = _mean_over(layout.is_noisy_scored, values)
        metrics |= _means_by_depth(name, values, layout.is_noisy_scored, layout.depth, settings.block_length)
    return jax.lax.stop_gradient(metrics)


def two_stream_hidden(module: Qwen3, layout: Layout) -> Float[Array, "B T D"]:
    """Final hidden states of `[x_t | x_0]`, the noisy half first; an adapter acts on the MASK rows."""
    mask_id = jnp.asarray(_mask_token_id(module), layout.tokens.dtype)
    has_adapter, kernels = module.config.lora is not None, module.config.kernels

    def attend(q: Queries, k: Keys, v: Keys, layer: Int[Array, ""], carried: Any) -> tuple[Queries, Any]:
        del layer
        streams = [jnp.split(x, 2, axis=1) for x in (q, k, v)]
        mixed = two_stream_attention(
            *(x[0] for x in streams),
            *(x[1] for x in streams),
            segment_ids=layout.segment_ids,
            positions=layout.positions,
            block_start=layout.block_start,
            # The frozen base alone makes the clean rows: their backward pass would only compute zeros.
            clean_grad=not has_adapter,
            body=kernels.two_stream_attention,
            interpret=kernels.interpret,
        )
        return jnp.concatenate(mixed, axis=1), carried

    noisy_tokens = jnp.where(layout.is_mask, mask_id, layout.tokens)
    gate = jnp.concatenate([layout.is_mask, jnp.zeros_like(layout.is_mask)], axis=1)
    hidden, _ = module.hidden_states(
        jnp.concatenate([noisy_tokens, layout.tokens], axis=1),
        jnp.tile(layout.positions, (1, 2)),
        attend,
        lora_gate=gate if has_adapter else None,
    )
    return hidden


def _mask_token_id(module: Qwen3) -> int:
    if module.config.mask_token_id is None:
        raise ValueError("config.mask_token_id is None, but noising needs an id below vocab_size to feed as MASK")
    return module.config.mask_token_id


def _cross_entropy(
    module: Qwen3, hidden: Float[Array, "B T D"], labels: Int[Array, "B T"], is_scored: Bool[Array, "B T"]
) -> Float[Array, "B T"]:
    """Per-row loss, 0 on rows that are not scored."""
    rows = hidden.reshape(-1, hidden.shape[-1])
    weights = is_scored.reshape(-1).astype(jnp.float32)
    loss, _ = linear_cross_entropy(rows, module.head_weight(), labels.reshape(-1), weights)
    return loss.reshape(labels.shape)


def _next(array: Array) -> Array:
    """Every row's right neighbour; 0 or False past the end."""
    return jnp.pad(array[:, 1:], ((0, 0), (0, 1)))


def _before(array: Array, distance: int) -> Array:
    """The row `distance` places to the left; 0 or False past the start."""
    return jnp.pad(array, ((0, 0), (distance, 0)))[:, : array.shape[1]]


def _count(is_counted: Bool[Array, "B L"]) -> Float[Array, ""]:
    return jnp.sum(is_counted, dtype=jnp.float32)


def _mean_over(is_counted: Bool[Array, "B L"], values: Float[Array, "B L"]) -> RowMean:
    return RowMean(jnp.sum(jnp.where(is_counted, values, 0.0)), _count(is_counted))


def _means_by_depth(
    name: str,
    values: Float[Array, "B L"],
    is_counted: Bool[Array, "B L"],
    depth: Int[Array, "B L"],
    block_length: int,
) -> Metrics:
    return {f"{name}/depth_{d}": _mean_over(is_counted & (depth == d), values) for d in range(block_length)}
