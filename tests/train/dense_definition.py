"""The objective written a second time, densely and row by row in numpy: what the tests compare with."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from idlm_jax.config import LoraConfig
from idlm_jax.model.attention import causal_attend
from tests.support.tiny_model import TINY, tiny_module
from train.batch import Batch
from train.objective import (
    LabelRows,
    ObjectiveSettings,
)

MASK = TINY.mask_token_id
LORA = LoraConfig(rank=3, alpha=6.0)


def packed_batch(phase=True):
    """Row 0: a prompt with its answer, then a chat of two turns, then padding. Row 1: plain text."""
    prompt, answer = False, True
    first = [prompt] * 4 + [answer] * 7
    second = [prompt] * 2 + [answer] * 3 + [prompt] * 2 + [answer] * 3 + [prompt]
    length = len(first) + len(second) + 3
    tokens = np.random.default_rng(7).integers(0, MASK, (2, length))
    tokens[0, 1] = MASK  # a prompt may hold the MASK id
    tokens[0, -3:] = 0
    return Batch(
        tokens=tokens.astype(np.int32),
        segment_ids=np.array([[1] * len(first) + [2] * len(second) + [0] * 3, [1] * length], np.int32),
        positions=np.array([[*range(len(first)), *range(len(second)), 0, 0, 0], [*range(length)]], np.int32),
        is_response=np.array([first + second + [False] * 3, [True] * length]),
        block_phase=np.array([[7] * len(first) + [4] * len(second) + [0] * 3, [11] * length], np.int32)
        * np.int32(phase),
    )


def settings(block_length=3, **changes):
    return ObjectiveSettings(block_length=block_length, **changes)


@functools.cache
def dense_layout(block_length, label_rows, phase=True):
    """Mask [B, 2L, 2L], labels and scored rows: the definition's sentences as plain loops."""
    batch = packed_batch(phase)
    num_rows, length = batch.tokens.shape
    mask = np.zeros((num_rows, 2 * length, 2 * length), bool)
    labels = np.full((num_rows, length), -1)
    noisy_scored = np.zeros((num_rows, length), bool)
    clean_scored = np.zeros((num_rows, length), bool)
    for b in range(num_rows):
        for i in range(length):
            document = int(batch.segment_ids[b, i])
            if document == 0:
                continue
            offset = int(batch.block_phase[b, i]) % block_length
            at = int(batch.positions[b, i])
            block = (at + offset) // block_length
            for j in range(length):
                if batch.segment_ids[b, j] != document:
                    continue
                other = int(batch.positions[b, j])
                other_block = (other + offset) // block_length
                mask[b, length + i, length + j] = other <= at
                mask[b, i, length + j] = other_block < block
                mask[b, i, j] = other_block == block and other <= at
            if i + 1 == length or batch.segment_ids[b, i + 1] != document:
                continue
            labels[b, i] = batch.tokens[b, i + 1]
            here, following = batch.is_response[b, i], batch.is_response[b, i + 1]
            clean_scored[b, i] = following
            noisy_scored[b, i] = {
                LabelRows.MASK_ROWS: here and following,
                LabelRows.OFFICIAL: here,
                LabelRows.AUTOMODEL: following,
            }[label_rows]
    return mask, labels, noisy_scored, clean_scored


def dense_hidden(module, mask, phase=True):
    batch = packed_batch(phase)
    noisy = np.where(batch.is_response, MASK, batch.tokens).astype(np.int32)
    gate = np.concatenate([batch.is_response, np.zeros_like(batch.is_response)], axis=1)
    hidden, _ = module.hidden_states(
        jnp.asarray(np.concatenate([noisy, batch.tokens], axis=1)),
        jnp.asarray(np.concatenate([batch.positions, batch.positions], axis=1)),
        causal_attend(jnp.asarray(mask)),
        lora_gate=jnp.asarray(gate) if module.config.lora else None,
    )
    return hidden


def dense_logits(module, hidden):
    """Of both streams, the noisy half first; a Markov head tells a MASK row the true token at its own place."""
    noisy, clean = jnp.split(module.logits(hidden), 2, axis=1)
    if module.config.markov_rank is None:
        return noisy, clean
    batch, rows = packed_batch(), []
    for b in range(len(batch.tokens)):
        row = []
        for i, token in enumerate(batch.tokens[b]):
            x = [hidden[b, i], jax.lax.stop_gradient(module.embedding[...])[token]]
            both = jnp.concatenate([each / jnp.sqrt(jnp.mean(each**2) + module.config.norm_eps) for each in x])
            correction = jax.nn.silu(both @ module.markov.mix[...]) @ module.markov.shrink[...]
            row.append(float(batch.is_response[b, i]) * (module.markov.columns[...] @ correction))
        rows.append(jnp.stack(row))
    return noisy + jnp.stack(rows), clean


def dense_terms(module, block_length, label_rows=LabelRows.MASK_ROWS, phase=True):
    """CE_noisy and CE_clean from materialised logits."""
    mask, labels, *scored = dense_layout(block_length, label_rows, phase)
    halves = dense_logits(module, dense_hidden(module, mask, phase))
    means = []
    for half, rows in zip(halves, scored, strict=True):
        b, i = np.nonzero(rows)
        means.append(-jnp.mean(jax.nn.log_softmax(half)[b, i, jnp.asarray(labels[b, i])]))
    return tuple(means)


def dense_loss(module, chosen, alpha):
    """The noisy loss plus alpha * CE_clean from materialised logits; by name, every term's values by row.

    `alpha` takes the noisy cross-entropy, weighted by depth, and the clean one.
    """
    mask, labels, noisy_scored, clean_scored = dense_layout(chosen.block_length, chosen.label_rows)
    batch = packed_batch()
    length = batch.tokens.shape[1]
    logits = dense_logits(module, dense_hidden(module, mask))
    b, i = np.nonzero(noisy_scored)
    label = jnp.asarray(labels[b, i])
    ce = -jax.nn.log_softmax(logits[0][b, i])[jnp.arange(len(b)), label]
    # Decoding never draws MASK, so it is struck out of both distributions. p is the target.
    q, p = (jax.nn.softmax(jnp.delete(half[b, i], MASK, axis=1)) for half in logits)
    p = jax.lax.stop_gradient(p)
    kl, tv = jnp.sum(p * jnp.log(p / q), axis=1), jnp.sum(jnp.abs(p - q), axis=1) / 2
    is_draft = batch.is_response[b, i]
    masks_seen = (mask[:, :length, :length] & batch.is_response[:, None]).sum(-1)
    depth = masks_seen[b, i] - 1
    by_depth = dict(enumerate(chosen.depth_weights))
    weights = jnp.asarray(
        [by_depth.get(d, 1.0) if fed_mask else 1.0 for d, fed_mask in zip(depth, is_draft, strict=True)]
    )
    extra = jnp.where(jnp.asarray(is_draft), chosen.kl_weight * kl + chosen.tv_weight * tv, 0.0)
    b, i = np.nonzero(clean_scored)
    ce_clean = jnp.mean(-jax.nn.log_softmax(logits[1][b, i])[jnp.arange(len(b)), jnp.asarray(labels[b, i])])
    noisy = jnp.mean(weights * (ce + extra))
    loss = noisy + alpha(jnp.mean(weights * ce), ce_clean) * ce_clean
    return loss, {"loss_noisy": noisy, "kl": kl[is_draft], "tv": tv[is_draft], "depth": depth[is_draft]}


def with_random_adapter(module):
    """The same base with an adapter whose B is not zero."""
    adapted = tiny_module(lora=LORA, markov_rank=module.config.markov_rank)
    nnx.update(adapted, nnx.state(module, nnx.Not(nnx.LoRAParam)))
    adapter = nnx.state(adapted, nnx.LoRAParam)
    leaves, tree = jax.tree.flatten(adapter)
    random = np.random.default_rng(3)
    leaves = [jnp.asarray(0.3 * random.normal(size=leaf.shape), jnp.float32) for leaf in leaves]
    nnx.update(adapted, jax.tree.unflatten(tree, leaves))
    return adapted


def jitted(function, module):
    """`function(module)`, compiled once instead of operation by operation."""
    graph, params = nnx.split(module)
    return jax.jit(lambda params: function(nnx.merge(graph, params)))(params)


def value_and_grads(loss_of, module, *, wrt=nnx.Param, has_aux=False):
    """Loss and gradients with respect to one kind of parameter, compiled."""
    graph, trained, rest = nnx.split(module, wrt, ...)
    grad = jax.value_and_grad(lambda trained: loss_of(nnx.merge(graph, trained, rest)), has_aux=has_aux)
    return jax.jit(grad)(trained)


def largest_difference(left, right):
    return max(float(jnp.abs(a - b).max()) for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True))
