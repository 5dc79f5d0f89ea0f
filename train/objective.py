"""What training minimises: cross-entropy on a noisy and on a clean stream; and how well the two agree.

Owns the losses and the acceptance measure. Knows nothing of optimizers, steps or devices. Which rows are fed
and scored is `train.layout`'s.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from idlm_jax.array_types import Keys, Queries
from idlm_jax.model.transformer import Qwen3
from pallas_kernels.linear_cross_entropy import linear_cross_entropy
from pallas_kernels.linear_distillation import linear_distillation
from pallas_kernels.two_stream_attention import noisy_attention, packed_causal_attention, two_stream_attention
from train.batch import Batch
from train.layout import LabelRows, Layout, ObjectiveSettings, RowCounts, lay_out
from train.mesh import STREAM, TOKENS, along_stream, for_lookup, layer_stack, per_device, per_head, vocab_axis
from train.row_means import Metrics, RowMean, mean_over, means_by_depth

RowIndices = dict[str, Int[Array, "B L"]]


def introspective_loss(
    module: Qwen3, batch: Batch, settings: ObjectiveSettings, row_counts: RowCounts | None = None
) -> tuple[Float[Array, ""], Metrics]:
    """Noisy loss + alpha * CE_clean from one forward over [x_t | x_0], each a mean over its own scored rows.

    noisy loss = 1 / N sum_r w[depth of r] (CE[r] + kl_weight KL(p || q)[r] + tv_weight TV(p, q)[r])

    over the N scored noisy rows, counted without their weights w, so that a weight of 2 is twice the gradient.
    q is the noisy stream's distribution at the row, p the clean stream's, both for the same token and both as
    decoding takes them: without the MASK id. p is a constant target. TV is one minus the chance that a draft
    from q is accepted at temperature 1. A row fed a prompt token (`LabelRows.AUTOMODEL`) is no draft: it has
    weight 1 and neither KL nor TV.

    With an adapter (`config.lora`) the base counts as frozen: the adapter acts on MASK rows alone, clean rows
    are the base's own, the loss is the noisy one, and nothing is differentiated through the clean stream.

    Args:
        module: the model; its config names the MASK id.
        batch: packed documents, arrays [B, L].
        settings: layout and weights.
        row_counts: denominators to use instead of this batch's own. Given the counts of a whole step
            (`lay_out(...).count_rows()`), the losses and gradients of its micro-batches add up to the step's:
            exactly for a fixed alpha; an automatic one is each micro-batch's own ratio of means, because the
            step's is known only after all their forwards.

    Returns:
        The loss, float32, and its terms: `loss_noisy` as above, and without depth weights `ce_noisy`,
        `ce_clean`, `kl` and `tv` (where one of the two has a weight), `<name>/depth_<d>` of the noisy ones
        (MASK rows only) and `alpha`, the weight that CE_clean had in this loss: 0 with an adapter.

    Raises:
        ValueError: the model has no MASK id.

    Source: I-DLM (arXiv 2604.11035), automatic alpha included. differs: scored rows default to those that
    decoding reads (`LabelRows`); KL, TV and depth weights are ours.
    """
    layout = lay_out(batch, settings)
    hidden, weight = with_markov_head(module, layout, two_stream_hidden(module, layout))
    ce = cross_entropy(
        hidden,
        weight,
        jnp.tile(layout.labels, (1, 2)),
        jnp.concatenate([layout.is_noisy_scored, layout.is_clean_scored], axis=1),
        frozen_columns=_frozen_columns(module),
    )
    ce_noisy, ce_clean = jnp.split(ce, 2, axis=1)
    is_noisy, is_draft = layout.is_noisy_scored, layout.is_draft_scored
    weights = layout.row_weights(settings.depth_weights) if settings.depth_weights else jnp.ones_like(ce_noisy)
    weighted_ce, clean = mean_over(is_noisy, weights * ce_noisy), mean_over(layout.is_clean_scored, ce_clean)

    metrics = {"ce_noisy": mean_over(is_noisy, ce_noisy), "ce_clean": clean}
    metrics |= means_by_depth("ce_noisy", ce_noisy, is_draft, layout.depth, settings.block_length)
    noisy = weighted_ce
    if settings.kl_weight or settings.tv_weight:
        divergences = _divergences(module, hidden, weight, is_draft)
        for name, values in divergences.items():
            metrics[name] = mean_over(is_draft, values)
            metrics |= means_by_depth(name, values, is_draft, layout.depth, settings.block_length)
        extra = settings.kl_weight * divergences["kl"] + settings.tv_weight * divergences["tv"]
        noisy = mean_over(is_noisy, weights * (ce_noisy + extra))

    if module.config.lora is not None:
        # Clean rows then get a cotangent of 0, and the head's backward pass drops such rows.
        alpha = jnp.float32(0)
    elif settings.auto_balance:
        # The floor only matters for a batch without a scored clean row, whose CE_clean is 0.
        alpha = jax.lax.stop_gradient(weighted_ce.mean / jnp.maximum(clean.mean, 1e-6))
    else:
        alpha = jnp.float32(settings.clean_weight)
    counts = row_counts or layout.count_rows()
    loss = noisy.total / jnp.maximum(counts.noisy, 1.0) + alpha * clean.total / jnp.maximum(counts.clean, 1.0)
    metrics |= {"loss_noisy": noisy, "alpha": RowMean(alpha, jnp.float32(1))}
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
    ce = cross_entropy(clean_hidden(module, layout), module.head_weight(), layout.labels, layout.is_clean_scored)
    clean = mean_over(layout.is_clean_scored, ce)
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
    hidden, weight = with_markov_head(module, layout, two_stream_hidden(module, layout))
    noisy, clean = jnp.split(hidden, 2, axis=1)
    mask_id = mask_token_id(module)
    metrics: Metrics = {}
    for name, values in agreement(noisy, clean, weight, layout.labels, mask_id, tile_rows=tile_rows).items():
        metrics[name] = mean_over(layout.is_noisy_scored, values)
        metrics |= means_by_depth(name, values, layout.is_noisy_scored, layout.depth, settings.block_length)
    return jax.lax.stop_gradient(metrics)


def agreement(
    noisy: Float[Array, "B L D"],
    clean: Float[Array, "B L D"],
    weight: Float[Array, "V D"],
    labels: Int[Array, "B L"],
    mask_id: int,
    *,
    tile_rows: int = 512,
) -> dict[str, Float[Array, "B L"]]:
    """What `measure_acceptance` reports of each row, from what q and p are read from and the head that reads it."""

    def compare(
        row: tuple[Float[Array, " D"], Float[Array, " D"], Int[Array, ""]], head: Float[Array, "V D"]
    ) -> dict[str, Array]:
        noisy_row, clean_row, label = row
        noisy_logits = jnp.einsum("D,VD->V", noisy_row, head, preferred_element_type=jnp.float32)
        clean_logits = jnp.einsum("D,VD->V", clean_row, head, preferred_element_type=jnp.float32)
        proposal_probs = jax.nn.softmax(noisy_logits.at[mask_id].set(-jnp.inf))
        anchor_probs = jax.nn.softmax(clean_logits.at[mask_id].set(-jnp.inf))
        draft = jnp.argmax(proposal_probs)
        return {
            "acceptance": jnp.sum(jnp.minimum(anchor_probs, proposal_probs)),
            "greedy_acceptance": (jnp.argmax(anchor_probs) == draft).astype(jnp.float32),
            "argmax_acceptance": anchor_probs[draft],
            "ce_noisy": jax.nn.logsumexp(noisy_logits) - noisy_logits[label],
            "ce_clean": jax.nn.logsumexp(clean_logits) - clean_logits[label],
        }

    def local(rows: tuple[Array, Array, Array], head: Float[Array, "V D"]) -> dict[str, Array]:
        noisy, clean, labels = rows
        flat = noisy.reshape(-1, noisy.shape[-1]), clean.reshape(-1, clean.shape[-1]), labels.reshape(-1)
        flat_values = jax.lax.map(functools.partial(compare, head=head), flat, batch_size=tile_rows)
        return {name: values.reshape(labels.shape) for name, values in flat_values.items()}

    measure = per_device(local, (TOKENS, P()), TOKENS)
    return measure((noisy, clean, labels), weight)


def clean_hidden(module: Qwen3, layout: Layout) -> Float[Array, "B L D"]:
    """Final hidden states of x_0 alone; an adapter is left out."""

    def attend(q: Queries, k: Keys, v: Keys, layer: Int[Array, ""], carried: Any) -> tuple[Queries, Any]:
        del layer
        return _packed_causal(module, layout, q, (k, v)), carried

    hidden, _ = module.hidden_states(along_stream(layout.tokens), along_stream(layout.positions), attend)
    return hidden


def two_stream_hidden(module: Qwen3, layout: Layout) -> Float[Array, "B T D"]:
    """Final hidden states of `[x_t | x_0]`, the noisy half first; an adapter acts on the MASK rows."""
    module = _embeddings_laid_for_lookup(module)
    mask_id = jnp.asarray(mask_token_id(module), layout.tokens.dtype)
    noisy_tokens = jnp.where(layout.is_mask, mask_id, layout.tokens)
    if module.config.lora is not None:
        return _hidden_over_frozen_clean(module, layout, noisy_tokens)
    kernels = module.config.kernels

    def attend(q: Queries, k: Keys, v: Keys, layer: Int[Array, ""], carried: Any) -> tuple[Queries, Any]:
        del layer

        def local(q: Queries, keys: tuple[Keys, ...], rows: RowIndices) -> Queries:
            streams = [jnp.split(x, 2, axis=1) for x in (q, *keys)]
            mixed = two_stream_attention(
                *(x[0] for x in streams),
                *(x[1] for x in streams),
                **rows,
                body=kernels.two_stream_attention,
                interpret=kernels.interpret,
            )
            return jnp.concatenate(mixed, axis=1)

        return per_head(local)(q, (k, v), _row_indices(layout)), carried

    hidden, _ = module.hidden_states(
        along_stream(jnp.concatenate([noisy_tokens, layout.tokens], axis=1)),
        along_stream(jnp.tile(layout.positions, (1, 2))),
        attend,
    )
    return hidden


def with_markov_head(
    module: Qwen3, layout: Layout, hidden: Float[Array, "B T D"]
) -> tuple[Float[Array, "B T _"], Float[Array, "V _"]]:
    """What `two_stream_hidden` gave, and the head that turns it into logits; with a Markov head, both are wider.

    The sum of two products is one product of what lies side by side: MASK rows bring features of the true token
    before the one they predict, all others zeros.
    """
    weight = module.head_weight()
    if module.config.markov_rank is None:
        return hidden, weight
    noisy, _ = jnp.split(hidden, 2, axis=1)
    features = module.markov_features(noisy, along_stream(layout.tokens))
    features = jnp.where(along_stream(layout.is_mask)[..., None], features, 0)
    both = jnp.concatenate([features, jnp.zeros_like(features)], axis=1)
    wider = jnp.concatenate([hidden, along_stream(both)], axis=2)
    return along_stream(wider), jnp.concatenate([weight, module.markov.weight()], axis=1)


def _hidden_over_frozen_clean(module: Qwen3, layout: Layout, noisy_tokens: Int[Array, "B L"]) -> Float[Array, "B T D"]:
    """`two_stream_hidden` in two passes: the base runs the clean rows, and the noisy rows read its keys and values.

    Nothing trained reaches the clean pass, so it has no backward pass and keeps no activations: a step takes 3/4 of
    the matrix products that one pass over both streams takes, 2/3 with `remat: full`.
    """
    kernels, positions = module.config.kernels, along_stream(layout.positions)

    def attend_clean(
        q: Queries, k: Keys, v: Keys, layer: Int[Array, ""], carried: tuple[Array, Array]
    ) -> tuple[Queries, tuple[Array, Array]]:
        kept = carried[0].at[layer].set(k), carried[1].at[layer].set(v)
        return _packed_causal(module, layout, q, (k, v)), kept

    num_keys = (*layout.tokens.shape, module.config.num_kv_heads, module.config.head_dim)
    empty = layer_stack(jax.ShapeDtypeStruct(num_keys, module.config.compute), module.config.num_layers)
    clean, all_keys = module.hidden_states(along_stream(layout.tokens), positions, attend_clean, carried=(empty, empty))

    def attend_noisy(q: Queries, k: Keys, v: Keys, layer: Int[Array, ""], carried: Any) -> tuple[Queries, Any]:
        def local(q: Queries, keys: tuple[Keys, ...], rows: RowIndices) -> Queries:
            return noisy_attention(q, *keys, **rows, body=kernels.two_stream_attention, interpret=kernels.interpret)

        # Closed over, not carried: what is carried would be kept once for every layer.
        clean_keys = (jax.lax.dynamic_index_in_dim(each, layer, keepdims=False) for each in all_keys)
        return per_head(local)(q, (k, v, *clean_keys), _row_indices(layout)), carried

    noisy, _ = module.hidden_states(
        along_stream(noisy_tokens), positions, attend_noisy, lora_gate=along_stream(layout.is_mask)
    )
    return jnp.concatenate([noisy, clean], axis=1)


def _packed_causal(module: Qwen3, layout: Layout, q: Queries, keys: tuple[Keys, Keys]) -> Queries:
    kernels = module.config.kernels

    def local(q: Queries, keys: tuple[Keys, ...], rows: RowIndices) -> Queries:
        return packed_causal_attention(q, *keys, **rows, body=kernels.two_stream_attention, interpret=kernels.interpret)

    rows = {"segment_ids": layout.segment_ids, "positions": layout.positions}
    return per_head(local)(q, keys, rows)


def _row_indices(layout: Layout) -> RowIndices:
    return {name: getattr(layout, name) for name in ("segment_ids", "positions", "block_start")}


def _embeddings_laid_for_lookup(module: Qwen3) -> Qwen3:
    graph, params = nnx.split(module)  # which may come from outside the trace, where it must not be changed
    table: Any = params["embedding"]
    params["embedding"] = table.replace(for_lookup(table[...]))
    return nnx.merge(graph, params)


def mask_token_id(module: Qwen3) -> int:
    """The id fed at MASK positions.

    Raises:
        ValueError: the model has none.
    """
    if module.config.mask_token_id is None:
        raise ValueError("config.mask_token_id is None, but noising needs an id below vocab_size to feed as MASK")
    return module.config.mask_token_id


def cross_entropy(
    hidden: Float[Array, "B T D"],
    weight: Float[Array, "V D"],
    labels: Int[Array, "B T"],
    is_scored: Bool[Array, "B T"],
    *,
    frozen_columns: int = 0,
) -> Float[Array, "B T"]:
    """Per-row loss under the head `weight`, 0 on rows that are not scored; its first columns may be frozen."""

    def local(rows: tuple[Array, Array, Array], weight: Float[Array, "V D"]) -> Float[Array, "_ _"]:
        hidden, labels, is_scored = rows
        flat = hidden.reshape(-1, hidden.shape[-1])
        row_weights = is_scored.reshape(-1).astype(jnp.float32)
        loss, _ = linear_cross_entropy(
            flat, weight, labels.reshape(-1), row_weights, vocab_axis=axis, frozen_columns=frozen_columns
        )
        return loss.reshape(labels.shape)

    axis = vocab_axis()
    return per_device(local, (STREAM, P(axis)), STREAM)((hidden, labels, is_scored), weight)


def _divergences(
    module: Qwen3, hidden: Float[Array, "B T D"], weight: Float[Array, "V D"], is_draft: Bool[Array, "B L"]
) -> dict[str, Float[Array, "B L"]]:
    """`kl` and `tv` of the noisy from the clean stream per row, 0 on rows that are no scored draft."""
    mask_id = mask_token_id(module)

    def local(rows: tuple[Array, Array, Array], weight: Float[Array, "V D"]) -> tuple[Array, Array]:
        noisy, clean, is_draft = rows
        student, teacher = (half.reshape(-1, half.shape[-1]) for half in (noisy, clean))
        kl, tv = linear_distillation(
            student,
            teacher,
            weight,
            is_draft.reshape(-1).astype(jnp.float32),
            excluded_id=mask_id,
            vocab_axis=axis,
            frozen_columns=_frozen_columns(module),
        )
        return kl.reshape(is_draft.shape), tv.reshape(is_draft.shape)

    axis = vocab_axis()
    noisy, clean = jnp.split(hidden, 2, axis=1)
    rows = (noisy, jax.lax.stop_gradient(clean), is_draft)
    kl, tv = per_device(local, (STREAM, P(axis)), STREAM)(rows, weight)
    return {"kl": kl, "tv": tv}


def _frozen_columns(module: Qwen3) -> int:
    """Of the head's columns: with an adapter all are the base's, but for those of a Markov head behind them."""
    return 0 if module.config.lora is None else module.config.hidden_size
