"""Distillation from the clean stream and weights by depth, against materialised distributions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.support.tiny_model import sharpen, tiny_module
from tests.train.dense_definition import (
    dense_loss,
    jitted,
    largest_difference,
    packed_batch,
    settings,
    value_and_grads,
    with_random_adapter,
)
from train.batch import Batch
from train.objective import LabelRows, RowCounts, introspective_loss, lay_out, measure_acceptance


def sharp_module():
    """Logits of a few units: with almost uniform distributions KL, TV and their gradients would all be near 0."""
    return sharpen(tiny_module(), 20.0)


@pytest.mark.parametrize(
    ("block_length", "changes"),
    [
        (3, {"tv_weight": 3.0, "depth_weights": (1.0, 0.5, 0.0), "label_rows": LabelRows.OFFICIAL}),
        (
            2,
            {
                "kl_weight": 0.7,
                "tv_weight": 0.4,
                "depth_weights": (2.0, 0.25),
                "label_rows": LabelRows.AUTOMODEL,
                "auto_balance": True,
            },
        ),
    ],
)
def test_loss_and_gradients_equal_the_dense_definition(block_length, changes):
    chosen, module = settings(block_length, **changes), sharp_module()

    def alpha(noisy, clean):
        return jax.lax.stop_gradient(noisy / clean) if chosen.auto_balance else 0.2

    ours, grads = value_and_grads(lambda module: introspective_loss(module, packed_batch(), chosen)[0], module)
    expected, expected_grads = value_and_grads(lambda module: dense_loss(module, chosen, alpha)[0], module)
    np.testing.assert_allclose(ours, expected, rtol=1e-5)
    # Gradients reach 1: sharp logits, and float32 sums of 50 rows in another order.
    assert largest_difference(grads, expected_grads) < 1e-4
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected_grads)) > 0.1


def test_an_adapter_is_distilled_from_the_frozen_base():
    chosen, module = settings(3, kl_weight=1.0, tv_weight=2.0), with_random_adapter(sharp_module())
    (ours, metrics), grads = value_and_grads(
        lambda module: introspective_loss(module, packed_batch(), chosen), module, wrt=nnx.LoRAParam, has_aux=True
    )
    (expected, terms), expected_grads = value_and_grads(
        lambda module: dense_loss(module, chosen, lambda noisy, clean: 0.0), module, wrt=nnx.LoRAParam, has_aux=True
    )
    np.testing.assert_allclose(ours, expected, rtol=1e-5)
    assert largest_difference(grads, expected_grads) < 1e-4
    np.testing.assert_allclose(metrics["tv"].mean, np.mean(terms["tv"]), rtol=1e-5)


def module_with_head():
    """Corrections of a few units, too."""
    module = sharpen(tiny_module(markov_rank=5), 20.0)
    for each in (module.markov.mix, module.markov.shrink):
        each[...] = 0.3 * each[...]
    return module


@pytest.mark.parametrize("with_adapter", [pytest.param(False, marks=pytest.mark.proof), True], ids=["full", "adapter"])
def test_a_markov_head_is_trained_by_every_term(with_adapter):
    """Also with AutoModel's labels, where a prompt row that is no MASK is scored: the head leaves that one alone."""
    chosen = settings(3, kl_weight=1.0, tv_weight=2.0, label_rows=LabelRows.AUTOMODEL)
    module = with_random_adapter(module_with_head()) if with_adapter else module_with_head()
    kind = nnx.LoRAParam if with_adapter else nnx.Param
    alpha = 0.0 if with_adapter else 0.2
    ours, grads = value_and_grads(
        lambda module: introspective_loss(module, packed_batch(), chosen)[0], module, wrt=kind
    )
    expected, expected_grads = value_and_grads(
        lambda module: dense_loss(module, chosen, lambda noisy, clean: alpha)[0], module, wrt=kind
    )
    np.testing.assert_allclose(ours, expected, rtol=1e-5)
    # As above, and columns beside a sharp head: the largest of these gradients is 9.
    assert largest_difference(grads, expected_grads) < 2e-4
    assert all(float(jnp.abs(leaf[...]).max()) > 0.01 for leaf in grads["markov"].values())


def test_acceptance_is_measured_with_the_head():
    """As the loss has it: TV, where it is computed, is one minus the acceptance."""
    chosen = settings(3, tv_weight=1.0)

    def both(module):
        _, metrics = introspective_loss(module, packed_batch(), chosen)
        return metrics, measure_acceptance(module, packed_batch(), chosen)

    metrics, measured = jitted(both, module_with_head())
    _, without = jitted(both, sharp_module())
    np.testing.assert_allclose(measured["acceptance"].mean, 1 - metrics["tv"].mean, rtol=1e-5)
    np.testing.assert_allclose(measured["ce_noisy"].mean, metrics["ce_noisy"].mean, rtol=1e-5)
    assert abs(float(measured["ce_noisy"].mean - without["ce_noisy"].mean)) > 0.05


def test_divergences_are_reported_by_depth_and_tv_is_one_minus_the_acceptance():
    chosen = settings(3, kl_weight=0.1, depth_weights=(3.0, 2.0, 1.0))

    def everything(module):
        batch = packed_batch()
        _, metrics = introspective_loss(module, batch, chosen)
        return metrics, measure_acceptance(module, batch, chosen), dense_loss(module, chosen, lambda *_: 0.2)[1]

    metrics, accepted, terms = jitted(everything, sharp_module())
    for name in ("kl", "tv"):
        np.testing.assert_allclose(metrics[name].mean, np.mean(terms[name]), rtol=1e-5)
        for depth in range(3):
            here = terms[name][terms["depth"] == depth]
            assert metrics[f"{name}/depth_{depth}"].num_rows == len(here) > 0
            np.testing.assert_allclose(metrics[f"{name}/depth_{depth}"].mean, np.mean(here), rtol=1e-5)
    for suffix in ("", "/depth_0", "/depth_1", "/depth_2"):
        np.testing.assert_allclose(1 - metrics["tv" + suffix].mean, accepted["acceptance" + suffix].mean, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss_noisy"].mean, terms["loss_noisy"], rtol=1e-5)
    assert 0.1 < metrics["tv"].mean < 0.9


def test_weights_leave_the_reported_cross_entropies_alone():
    def both(module):
        return [
            introspective_loss(module, packed_batch(), settings(2, depth_weights=weights))[1]
            for weights in ((), (0.0, 5.0))
        ]

    plain, weighted = jitted(both, sharp_module())
    assert plain["loss_noisy"] == plain["ce_noisy"] != weighted["loss_noisy"]
    for name in ("ce_noisy", "ce_noisy/depth_0", "ce_noisy/depth_1", "ce_clean", "alpha"):
        assert plain[name] == weighted[name]
    assert "kl" not in plain and "tv" not in plain


def test_micro_batches_add_up_to_the_step_with_every_weight():
    chosen = settings(2, kl_weight=0.5, tv_weight=0.5, depth_weights=(1.0, 0.3), label_rows=LabelRows.AUTOMODEL)
    parts = [Batch(*(array[i : i + 1] for array in packed_batch())) for i in range(2)]
    counts = [lay_out(part, chosen).count_rows() for part in parts]
    assert counts[0] != counts[1]
    step_counts = RowCounts(counts[0].noisy + counts[1].noisy, counts[0].clean + counts[1].clean)

    def losses(module):
        whole = introspective_loss(module, packed_batch(), chosen)[0]
        return whole, sum(introspective_loss(module, part, chosen, step_counts)[0] for part in parts)

    np.testing.assert_allclose(*jitted(losses, sharp_module()), rtol=1e-5)


def test_weights_that_make_no_sense_are_refused():
    for name in ("kl_weight", "tv_weight"):
        for weight in (-0.1, float("inf"), float("nan")):
            with pytest.raises(ValueError, match=f"{name}={weight} must be finite and not negative"):
                settings(**{name: weight})
    with pytest.raises(ValueError, match=r"depth_weights=\(1.0, -1.0, 1.0\) must be finite and not negative"):
        settings(3, depth_weights=(1.0, -1.0, 1.0))
    with pytest.raises(ValueError, match=r"one weight per depth: .*block_length=3"):
        settings(3, depth_weights=(1.0, 0.5))
    assert dataclasses.replace(settings(2), depth_weights=(0.0, 1.0)).depth_weights == (0.0, 1.0)
