"""The step optimises exactly the stated mean, and only what is meant to be trained."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from idlm_jax.config import LoraConfig
from tests.support.tiny_model import randomize_adapter, tiny_module
from tests.support.tiny_run import TINY_MODEL
from train.batch import Batch
from train.config import TrainConfig, config_from_mapping
from train.layout import ObjectiveSettings, lay_out
from train.optimizer import decay_mask, learning_rate, make_optimizer, update
from train.step import TrainState, init_state, make_eval_step, make_train_step

LAYOUT = ObjectiveSettings(block_length=2)


def run(**changes) -> TrainConfig:
    values = {
        "run_name": "a",
        "model": TINY_MODEL,
        "dataset": {"path": "unused"},
        "steps": 40,
        "batch_size": 4,
        "learning_rate": 1e-2,
        "warmup_ratio": 0.1,
        "objective": "introspective",
    }
    return config_from_mapping(values | changes)


def uneven_batch(rows: int = 4, row_len: int = 12) -> Batch:
    """Row r has 2 r prompt tokens and r of padding: every row scores another number of tokens."""
    rng = np.random.default_rng(0)
    positions = np.broadcast_to(np.arange(row_len, dtype=np.int32), (rows, row_len))
    lengths = row_len - np.arange(rows, dtype=np.int32)[:, None]
    is_token = positions < lengths
    return Batch(
        tokens=jnp.asarray(np.where(is_token, rng.integers(0, 96, (rows, row_len)), 0).astype(np.int32)),
        segment_ids=jnp.asarray(is_token.astype(np.int32)),
        positions=jnp.asarray(np.where(is_token, positions, 0).astype(np.int32)),
        is_response=jnp.asarray(is_token & (positions >= 2 * np.arange(rows)[:, None])),
        block_phase=jnp.zeros((rows, row_len), jnp.int32),
    )


@pytest.fixture(scope="module")
def model():
    return split(tiny_module())


def split(module, kind=nnx.Param):
    return nnx.split(module, kind, ...)


def jitted_step(graph, config: TrainConfig):
    return jax.jit(make_train_step(graph, config))


def leaves(tree):
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def assert_close(one, other, tolerance):
    one, other = leaves(one), leaves(other)
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_allclose(one[name], other[name], rtol=tolerance, atol=tolerance, err_msg=name)


def grads_and_metrics(config: TrainConfig, model, batch: Batch):
    """Gradients as the first moment of Adam shows them: (1 - beta1) * gradient when nothing is clipped."""
    graph, params, frozen = model
    state, metrics = jitted_step(graph, config)(init_state(config, params, frozen), batch)
    return optax.tree.get(state.opt_state, "mu"), metrics


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "parts"), [pytest.param("ar", 2, marks=pytest.mark.proof), ("introspective", 4)])
def test_accumulated_gradients_are_those_of_the_uncut_batch(model, objective, parts):
    batch = uneven_batch()
    changes = {"objective": objective, "clip_norm": 1e9, "clean_loss_weight": 0.7, "block_length": 2}
    whole, whole_metrics = grads_and_metrics(run(**changes), model, batch)
    cut, cut_metrics = grads_and_metrics(run(**changes, gradient_accumulation_steps=parts), model, batch)
    # The two orders of summation differ by float32 rounding; a mean of means would be off by per cents.
    assert_close(cut, whole, 1e-6)
    assert_close(cut_metrics, whole_metrics, 1e-5)


def test_an_automatic_alpha_is_the_ratio_of_each_accumulated_part(model):
    graph, params, frozen = model
    batch, config = uneven_batch(), run(auto_balance=True, gradient_accumulation_steps=2, block_length=2)
    _, metrics = grads_and_metrics(config, model, batch)
    evaluate = make_eval_step(graph, config)
    ratios, expected = [], float(metrics["ce_noisy"])
    for part in range(2):
        terms = evaluate(params, frozen, jax.tree.map(lambda x, part=part: x[part::2], batch))
        ratios.append(float(terms["ce_noisy"].mean / terms["ce_clean"].mean))
        expected += ratios[-1] * float(terms["ce_clean"].total) / float(lay_out(batch, LAYOUT).count_rows().clean)
    assert abs(ratios[0] - ratios[1]) > 1e-3
    np.testing.assert_allclose(metrics["alpha"], np.mean(ratios), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)


def test_metrics_count_tokens_and_supervised_rows(model):
    batch = uneven_batch()
    _, metrics = grads_and_metrics(run(), model, batch)
    is_response, in_text = np.asarray(batch.is_response), np.asarray(batch.segment_ids) != 0
    assert int(metrics["tokens"]) == in_text.sum()
    assert int(metrics["supervised_tokens"]) == (is_response[:, :-1] & is_response[:, 1:]).sum()


def test_a_batch_is_learned_by_heart(model):
    config = run(steps=60, block_length=2, learning_rate=2e-2)
    graph, params, frozen = model
    state, step = init_state(config, params, frozen), jitted_step(graph, config)
    first = None
    for _ in range(config.steps):
        state, metrics = step(state, uneven_batch())
        first = metrics if first is None else first
    assert first is not None and float(metrics["loss"]) < 0.2 * float(first["loss"])


def test_lora_trains_the_adapter_alone():
    module = randomize_adapter(tiny_module(lora=LoraConfig(rank=4, alpha=8.0)))
    graph, params, frozen = split(module, nnx.LoRAParam)
    config = run(model=None, init_from="unused", lora={"rank": 4})
    state = init_state(config, params, frozen)
    after, _ = jitted_step(graph, config)(state, uneven_batch())
    for name, array in leaves(state.frozen).items():
        np.testing.assert_array_equal(array, leaves(after.frozen)[name], err_msg=name)
    changed = [name for name, array in leaves(params).items() if (array != leaves(after.params)[name]).any()]
    assert len(changed) == 14 and all("lora" in name for name in leaves(params))
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert sum(x.size for x in moments) == 2 * sum(x.size for x in jax.tree.leaves(params))


def test_bfloat16_compute_keeps_float32_parameters_and_moments():
    graph, params, frozen = split(tiny_module(compute_dtype="bfloat16"))
    config = run(compute_dtype="bfloat16")
    state, metrics = jitted_step(graph, config)(init_state(config, params, frozen), uneven_batch())
    assert {x.dtype for x in jax.tree.leaves((state.params, metrics))} == {jnp.dtype("float32")}
    assert {x.dtype for x in jax.tree.leaves(state.opt_state) if x.ndim} == {jnp.dtype("float32")}
    assert np.isfinite(metrics["loss"])


def test_weight_decay_spares_norms_and_nothing_else(model):
    _, params, _ = model
    config = run(weight_decay=0.5)
    zeros = jax.tree.map(jnp.zeros_like, params)
    optimizer = make_optimizer(config)
    after, _ = jax.jit(functools.partial(update, optimizer))(zeros, optimizer.init(params), params)
    moved = {name for name, array in leaves(params).items() if (array != leaves(after)[name]).any()}
    spared = leaves(params).keys() - moved
    assert len(spared) == 5 and all("norm" in name for name in spared)
    assert sum(jax.tree.leaves(decay_mask(params))) == len(moved) == 9


def test_gradients_are_clipped_to_the_global_norm_and_reported_unclipped(model):
    graph, params, frozen = model
    config = run(clip_norm=1e-3)
    state, metrics = jitted_step(graph, config)(init_state(config, params, frozen), uneven_batch())
    moment = optax.tree.get(state.opt_state, "mu")
    np.testing.assert_allclose(optax.tree.norm(moment), (1 - config.adam_beta1) * 1e-3, rtol=1e-5)
    assert metrics["grad_norm"] > 0.1


def test_the_rate_rises_linearly_peaks_after_the_warm_up_and_falls_to_zero():
    config = run(steps=100, warmup_ratio=0.1, learning_rate=1.0)
    rates = np.array([learning_rate(config, jnp.int32(step)) for step in range(100)])
    np.testing.assert_allclose(rates[:11], np.arange(1, 12) / 11, rtol=1e-6)
    np.testing.assert_allclose(rates[55], 0.5, atol=1e-6)
    assert (np.diff(rates[10:]) < 0).all() and 0 < rates[-1] < 1e-3


def test_each_stage_of_a_curriculum_warms_up_and_decays_like_a_run_of_its_own():
    stages = [{"block_length": 1, "share": 0.25}, {"block_length": 3, "share": 0.75}]
    config = run(steps=40, warmup_ratio=0.2, learning_rate=1.0, curriculum=stages)
    rates = [learning_rate(config, jnp.int32(step)) for step in range(40)]
    alone = [
        learning_rate(run(steps=steps, warmup_ratio=0.2, learning_rate=1.0), jnp.int32(step))
        for steps in (10, 30)
        for step in range(steps)
    ]
    np.testing.assert_array_equal(rates, alone)


def test_the_state_is_donated_and_its_step_counts():
    graph, params, frozen = split(tiny_module())
    config = run()
    before = init_state(config, params, frozen)
    after, _ = jax.jit(make_train_step(graph, config), donate_argnums=0)(before, uneven_batch())
    assert isinstance(after, TrainState) and int(after.step) == 1
    assert all(x.is_deleted() for x in jax.tree.leaves((before.params, before.opt_state)))


def test_evaluation_of_two_halves_adds_up_to_that_of_the_whole(model):
    graph, params, frozen = model
    evaluate = make_eval_step(graph, run(block_length=2))
    batch = uneven_batch()
    halves = [jax.tree.map(lambda x, half=half: x[half], batch) for half in (slice(0, 2), slice(2, 4))]
    total = jax.tree.map(jnp.add, *(evaluate(params, frozen, half) for half in halves))
    whole = evaluate(params, frozen, batch)
    assert {"ce_noisy", "ce_clean", "acceptance", "acceptance/depth_1", "greedy_acceptance"} <= whole.keys()
    assert_close(
        {name: term.mean for name, term in total.items()},
        {name: term.mean for name, term in whole.items()},
        1e-5,
    )
