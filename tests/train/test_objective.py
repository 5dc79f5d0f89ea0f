"""The objective against a dense definition of its own, against what decoding sees, and in LoRA mode."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from idlm_jax.model.attention import causal_attend
from pallas_kernels.linear_cross_entropy import linear_cross_entropy
from tests.support.tiny_model import tiny_module
from tests.train.dense_definition import (
    LORA,
    MASK,
    dense_hidden,
    dense_layout,
    dense_terms,
    jitted,
    largest_difference,
    packed_batch,
    settings,
    value_and_grads,
    with_random_adapter,
)
from train import objective
from train.batch import Batch
from train.objective import (
    LabelRows,
    RowCounts,
    ar_loss,
    introspective_loss,
    lay_out,
)


@pytest.mark.parametrize("label_rows", LabelRows)
@pytest.mark.parametrize("block_length", [1, 2, 3, 5])
def test_scored_rows_and_labels_equal_the_definition(block_length, label_rows):
    _, labels, noisy_scored, clean_scored = dense_layout(block_length, label_rows)
    layout = lay_out(packed_batch(), settings(block_length, label_rows=label_rows))
    np.testing.assert_array_equal(layout.is_noisy_scored, noisy_scored)
    np.testing.assert_array_equal(layout.is_clean_scored, clean_scored)
    has_label = labels >= 0
    np.testing.assert_array_equal(np.asarray(layout.labels)[has_label], labels[has_label])


def test_label_rows_differ_as_their_names_say():
    layouts = {rows: lay_out(packed_batch(), settings(label_rows=rows)) for rows in LabelRows}
    noisy = {rows: np.asarray(layout.is_noisy_scored)[0] for rows, layout in layouts.items()}
    default = noisy[LabelRows.MASK_ROWS]
    # Row 0's document ends after its answer, so it has none past it; the chat has one after each answer.
    assert np.flatnonzero(noisy[LabelRows.OFFICIAL] & ~default).tolist() == [11 + 4, 11 + 9]
    assert np.flatnonzero(noisy[LabelRows.AUTOMODEL] & ~default).tolist() == [3, 11 + 1, 11 + 6]


@pytest.mark.parametrize(("block_length", "phase"), [(1, False), (2, True), (3, False), (3, True), (5, True)])
def test_hidden_states_equal_the_dense_mask(block_length, phase):
    mask, *_ = dense_layout(block_length, LabelRows.MASK_ROWS, phase)

    def both(module):
        layout = lay_out(packed_batch(phase), settings(block_length))
        return objective.two_stream_hidden(module, layout), dense_hidden(module, mask, phase)

    ours, expected = jitted(both, tiny_module())
    is_real = np.tile(packed_batch().segment_ids != 0, (1, 2))
    np.testing.assert_allclose(np.asarray(ours)[is_real], np.asarray(expected)[is_real], atol=2e-5)


@pytest.mark.parametrize(
    ("block_length", "label_rows", "auto_balance"),
    [
        (1, LabelRows.MASK_ROWS, False),
        (2, LabelRows.OFFICIAL, False),
        (5, LabelRows.AUTOMODEL, True),
    ],
)
def test_loss_and_gradients_equal_the_dense_definition(block_length, label_rows, auto_balance):
    module = tiny_module()
    chosen = settings(block_length, clean_weight=0.3, auto_balance=auto_balance, label_rows=label_rows)

    def dense_loss(module):
        noisy, clean = dense_terms(module, block_length, label_rows)
        return noisy + (jax.lax.stop_gradient(noisy / clean) if auto_balance else 0.3) * clean

    ours, grads = value_and_grads(lambda module: introspective_loss(module, packed_batch(), chosen)[0], module)
    expected, expected_grads = value_and_grads(dense_loss, module)
    np.testing.assert_allclose(ours, expected, rtol=1e-5)
    assert largest_difference(grads, expected_grads) < 2e-5


def test_every_term_is_reported_with_its_rows():
    def both(module):
        return introspective_loss(module, packed_batch(), settings(3)), dense_terms(module, 3)

    (loss, metrics), (noisy, clean) = jitted(both, tiny_module())
    np.testing.assert_allclose(metrics["ce_noisy"].mean, noisy, rtol=1e-5)
    np.testing.assert_allclose(metrics["ce_clean"].mean, clean, rtol=1e-5)
    np.testing.assert_allclose(loss, noisy + 0.2 * clean, rtol=1e-5)
    assert metrics["alpha"].mean == np.float32(0.2)
    depths = [metrics[f"ce_noisy/depth_{d}"] for d in range(3)]
    assert "ce_noisy/depth_3" not in metrics
    np.testing.assert_allclose(sum(depth.total for depth in depths), metrics["ce_noisy"].total, rtol=1e-5)
    assert sum(depth.num_rows for depth in depths) == metrics["ce_noisy"].num_rows
    assert all(depth.num_rows > 0 for depth in depths)


def test_depth_counts_the_masks_a_row_has_before_itself_in_its_block():
    for block_length in (1, 2, 3, 5):
        mask, *_ = dense_layout(block_length, LabelRows.MASK_ROWS)
        batch = packed_batch()
        length = batch.tokens.shape[1]
        seen = (mask[:, :length, :length] & batch.is_response[:, None]).sum(-1) - 1
        layout = lay_out(batch, settings(block_length))
        np.testing.assert_array_equal(np.asarray(layout.depth)[batch.is_response], seen[batch.is_response])


def test_micro_batches_add_up_to_the_step():
    chosen = settings(3)
    parts = [Batch(*(array[i : i + 1] for array in packed_batch())) for i in range(2)]
    counts = [lay_out(part, chosen).count_rows() for part in parts]
    assert counts[0] != counts[1]
    step_counts = RowCounts(counts[0].noisy + counts[1].noisy, counts[0].clean + counts[1].clean)

    def whole(module):
        return introspective_loss(module, packed_batch(), chosen)[0]

    def in_parts(module):
        return sum(introspective_loss(module, part, chosen, step_counts)[0] for part in parts)

    expected, expected_grads = value_and_grads(whole, tiny_module())
    ours, grads = value_and_grads(in_parts, tiny_module())
    np.testing.assert_allclose(ours, expected, rtol=1e-5)
    assert largest_difference(grads, expected_grads) < 1e-5


def test_autoregressive_loss_is_the_clean_term():
    def both(module):
        return introspective_loss(module, packed_batch(), settings(3))[1], ar_loss(module, packed_batch())

    metrics, (loss, ar_metrics) = jitted(both, tiny_module())
    np.testing.assert_allclose(loss, metrics["ce_clean"].mean, rtol=1e-5)
    assert ar_metrics["ce_clean"].num_rows == metrics["ce_clean"].num_rows


@pytest.mark.parametrize(("block_length", "with_lora"), [(1, False), (4, False), (4, True)])
def test_a_noisy_row_is_what_decoding_sees_for_that_draft(block_length, with_lora):
    """Noisy row i = row i of a causal forward over [x_0 before the block, x_t from the block on]."""
    length, prompt_len = 9, 3
    tokens = np.random.default_rng(1).integers(0, MASK, (1, length)).astype(np.int32)
    positions = np.arange(length, dtype=np.int32)[None]
    is_response = positions >= prompt_len
    batch = Batch(tokens, np.ones_like(positions), positions, is_response, np.zeros_like(positions))
    # One causal sequence per noisy row; what follows row i is the rest of that forward, invisible to it.
    start = positions[0, prompt_len:, None] // block_length * block_length
    gate = is_response & (positions >= start)
    sequences = np.where(gate, MASK, tokens).astype(np.int32)

    def both(module):
        noisy = objective.two_stream_hidden(module, lay_out(batch, settings(block_length)))
        decoded, _ = module.hidden_states(
            jnp.asarray(sequences),
            jnp.broadcast_to(positions, sequences.shape),
            causal_attend(jnp.tril(jnp.ones((len(sequences), length, length), bool))),
            lora_gate=jnp.asarray(gate) if with_lora else None,
        )
        return noisy, decoded

    module = with_random_adapter(tiny_module()) if with_lora else tiny_module()
    noisy, decoded = jitted(both, module)
    for row, i in enumerate(range(prompt_len, length)):
        np.testing.assert_allclose(noisy[0, i], decoded[row, i], atol=2e-5)


def layout_of_documents():
    return lay_out(packed_batch(phase=False), settings(3))


def noisy_and_clean(module):
    return jnp.split(objective.two_stream_hidden(module, layout_of_documents()), 2, axis=1)


def test_clean_rows_beside_an_adapter_are_bitwise_those_of_the_base_alone():
    base = tiny_module()
    _, clean = jitted(noisy_and_clean, with_random_adapter(base))
    alone = jitted(lambda module: objective.clean_hidden(module, layout_of_documents()), base)
    np.testing.assert_array_equal(clean, alone)


def test_an_adapter_changes_every_mask_row_and_no_prompt_row_that_the_noisy_stream_repeats():
    base = tiny_module()
    ours, _ = jitted(noisy_and_clean, with_random_adapter(base))
    without, _ = jitted(noisy_and_clean, tiny_module(lora=LORA))  # a fresh adapter changes nothing
    change = np.abs(np.asarray(ours) - np.asarray(without)).max(-1)
    assert (change[packed_batch().is_response] > 1e-3).all()
    # The four prompt rows of the first document, one of which holds the MASK id as text.
    np.testing.assert_array_equal(ours[0, :4], without[0, :4])


def test_a_fresh_adapter_over_the_frozen_pass_has_the_hidden_states_of_the_base_over_both_streams():
    fresh, base = tiny_module(lora=LORA), tiny_module()
    for got, want in zip(jitted(noisy_and_clean, fresh), jitted(noisy_and_clean, base), strict=True):
        real = packed_batch().segment_ids != 0
        np.testing.assert_allclose(np.asarray(got)[real], np.asarray(want)[real], atol=2e-5)


def test_lora_mode_runs_no_backward_pass_through_the_clean_stream():
    # A wide MLP, so that its products outweigh attention and the head; unrolled, or a loop's body would count once.
    module = tiny_module(lora=LORA, mlp_size=2048, scan_unroll=2)
    graph, adapter, base = nnx.split(module, nnx.LoRAParam, ...)

    def loss_of(adapter):
        return introspective_loss(nnx.merge(graph, adapter, base), packed_batch(), settings(3))[0]

    forward, both = (jax.jit(f).lower(adapter).cost_analysis()["flops"] for f in (loss_of, jax.grad(loss_of)))
    # Forward: noisy and clean. Backward: noisy activations, but no base weight. With clean activations it would be 2.
    assert 1.4 < both / forward < 1.7


def test_lora_mode_trains_on_the_noisy_term_alone():
    module = with_random_adapter(tiny_module())
    chosen = settings(3, clean_weight=0.7)
    (ours, metrics), grads = value_and_grads(
        lambda module: introspective_loss(module, packed_batch(), chosen),
        module,
        wrt=nnx.LoRAParam,
        has_aux=True,
    )
    (expected, clean), expected_grads = value_and_grads(
        lambda module: dense_terms(module, 3), module, wrt=nnx.LoRAParam, has_aux=True
    )
    np.testing.assert_allclose(ours, expected, rtol=1e-5)
    assert largest_difference(grads, expected_grads) < 2e-5
    np.testing.assert_allclose(metrics["ce_clean"].mean, clean, rtol=1e-5)
    assert metrics["alpha"].mean == 0


def test_the_clean_term_has_no_gradient_for_the_adapter():
    module = with_random_adapter(tiny_module())
    # By the dense definition, which stops no gradient: the zeros come from the gate, not from stop_gradient.
    _, grads = value_and_grads(lambda module: dense_terms(module, 3)[1], module, wrt=nnx.LoRAParam)
    assert not any(leaf.any() for leaf in jax.tree.leaves(grads))


def test_lora_mode_spends_no_head_product_on_clean_rows_going_back(monkeypatch):
    seen = []

    def record(_, loss_bar):
        jax.debug.callback(seen.append, loss_bar)
        return (loss_bar,)

    def spied(hidden, weight, labels, row_weights, *, vocab_axis, frozen_columns):
        assert frozen_columns == hidden.shape[1]

        @jax.custom_vjp
        def watch(loss):
            return loss

        watch.defvjp(lambda loss: (loss, None), lambda _, bar: (jax.debug.callback(seen.append, bar), (bar,))[1])
        loss, lse = linear_cross_entropy(hidden, weight, labels, row_weights)
        return watch(loss), lse

    monkeypatch.setattr(objective, "linear_cross_entropy", spied)
    module, batch = with_random_adapter(tiny_module()), packed_batch()
    value_and_grads(lambda module: introspective_loss(module, batch, settings(3))[0], module, wrt=nnx.LoRAParam)
    jax.effects_barrier()
    noisy, clean = np.split(np.asarray(seen[0]).reshape(2, -1), 2, axis=1)
    assert noisy.any() and not clean.any()


@pytest.mark.parametrize("block_length", [0, 16])
def test_a_block_length_outside_the_strides_is_refused(block_length):
    with pytest.raises(ValueError, match=rf"block_length={block_length} must be in 1..15"):
        settings(block_length)


def test_a_negative_or_infinite_clean_weight_is_refused():
    for weight in (-0.1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="clean_weight"):
            settings(clean_weight=weight)


def test_a_model_without_a_mask_id_is_refused():
    with pytest.raises(ValueError, match="mask_token_id is None"):
        introspective_loss(tiny_module(mask_token_id=None), packed_batch(), settings())


def test_a_batch_of_nothing_but_padding_has_zero_loss_and_finite_gradients():
    batch = Batch(*(np.zeros_like(array) for array in packed_batch()))
    for auto_balance in (False, True):
        chosen = dataclasses.replace(settings(3), auto_balance=auto_balance)
        loss, grads = value_and_grads(lambda m, c=chosen: introspective_loss(m, batch, c)[0], tiny_module())
        assert loss == 0
        assert not any(leaf.any() for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize("with_lora", [False, True])
def test_one_batch_can_be_learned_by_heart(with_lora):
    batch = packed_batch()
    module = with_random_adapter(tiny_module()) if with_lora else tiny_module()
    graph, trained, rest = nnx.split(module, nnx.LoRAParam if with_lora else nnx.Param, ...)
    optimizer = optax.adam(1e-2)
    chosen = settings(2, auto_balance=True)

    @jax.jit
    def step(trained, state):
        def loss_of(trained):
            return introspective_loss(nnx.merge(graph, trained, rest), batch, chosen)

        (_, metrics), grads = jax.value_and_grad(loss_of, has_aux=True)(trained)
        # Adam's bias correction mixes a float32 with an int32 step count.
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state, metrics

    state, history = optimizer.init(trained), []
    for _ in range(40):
        trained, state, metrics = step(trained, state)
        history.append({name: float(metrics[name].mean) for name in ("ce_noisy", "ce_clean")})
    if with_lora:
        # The frozen head's rows have a norm of about 0.11: no logit exceeds 0.65, which bounds the fall.
        assert history[-1]["ce_noisy"] < history[0]["ce_noisy"] - 0.2
        assert history[-1]["ce_clean"] == history[0]["ce_clean"]
    else:
        assert history[-1]["ce_noisy"] < 0.35 * history[0]["ce_noisy"]
        assert history[-1]["ce_clean"] < 0.35 * history[0]["ce_clean"]
