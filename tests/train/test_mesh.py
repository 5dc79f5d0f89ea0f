"""A step on every shape of mesh against the same step on one device, over fake CPU devices."""

import contextlib
import functools
import itertools

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from idlm_jax.config import LoraConfig
from tests.support.tiny_model import randomize_adapter, tiny_module
from tests.support.tiny_run import tiny_dataset, tiny_run
from train.batch import Batch
from train.config import ConfigError, MeshShape, config_from_mapping
from train.loop import run_training
from train.mesh import ROWS, make_mesh, state_sharding
from train.step import init_state, make_train_step

# data, fsdp, context, tensor
MESHES = [
    (2, 2, 1, 2),
    (1, 2, 2, 2),
    (1, 1, 4, 1),  # two key heads over four devices: gathered
    *((4, 1, 1, 1), (1, 4, 1, 1), (1, 1, 2, 1), (1, 1, 1, 2), (4, 1, 2, 1), (1, 2, 4, 1), (2, 1, 2, 2)),
]
RUN = {
    "run_name": "mesh",
    "init_from": "x",
    "dataset": {"path": "x"},
    "steps": 4,
    "batch_size": 8,
    "learning_rate": 1e-2,
    "block_length": 3,
}
OBJECTIVES = {
    "ar": {"objective": "ar"},
    "introspective": {"kl_weight": 0.5, "tv_weight": 0.5, "auto_balance": True},
    "accumulated": {"gradient_accumulation_steps": 2},
    "lora": {"lora": {"rank": 3, "alpha": 6}},
    "markov": {"lora": {"rank": 3, "alpha": 6}, "markov_rank": 4, "tv_weight": 0.5},
}
# Every objective (that of the head is over an adapter), and every axis; `make proofs` has every pair.
ALWAYS = [
    (MESHES[0], "ar"),
    (MESHES[0], "accumulated"),
    (MESHES[1], "introspective"),
    (MESHES[2], "markov"),
]
CASES = [
    each if each in ALWAYS else pytest.param(*each, marks=(pytest.mark.slow, pytest.mark.proof))
    for each in itertools.product(MESHES, OBJECTIVES)
]


def batch() -> Batch:
    """Eight rows of two documents and some padding."""
    random = np.random.default_rng(0)
    segment_ids = np.repeat([[1] * 7 + [2] * 7 + [0] * 2], 8, axis=0)
    positions = np.repeat([[*range(7), *range(7), 0, 0]], 8, axis=0)
    is_response = (segment_ids != 0) & (positions > random.integers(0, 4, (8, 1)))
    tokens = random.integers(0, 90, segment_ids.shape) * (segment_ids != 0)
    return Batch(*(np.asarray(x, np.int32) for x in (tokens, segment_ids, positions)), is_response, segment_ids * 5)


def one_step(changes, mesh):
    """Metrics and optimizer state of one step from the same start, on the host; and the state where it lies."""
    config = config_from_mapping(RUN | changes)
    rank = changes.get("lora", {}).get("rank")
    lora = LoraConfig(rank=rank, alpha=6.0) if rank else None
    model = tiny_module(vocab_size=96, mask_token_id=95, lora=lora, markov_rank=changes.get("markov_rank"))
    if rank:
        randomize_adapter(model)
    kind = nnx.LoRAParam if rank else nnx.Param
    graph, params, frozen = nnx.split(model, kind, ...)
    state, data = init_state(config, params, frozen), jax.tree.map(jax.numpy.asarray, batch())
    out_shardings = None
    if mesh is not None:
        shardings = state_sharding(state, mesh)
        state, data = jax.device_put(state, shardings), jax.device_put(data, NamedSharding(mesh, ROWS))
        out_shardings = (shardings, NamedSharding(mesh, P()))
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        state, metrics = jax.jit(make_train_step(graph, config), out_shardings=out_shardings)(state, data)
    return jax.device_get((metrics, state.opt_state)), state


@functools.cache
def on_one_device(objective):
    return one_step(OBJECTIVES[objective], None)[0]


@pytest.mark.parametrize(("shape", "objective"), CASES, ids=str)
def test_a_step_is_the_same_on_every_mesh(objective, shape):
    data, fsdp, context, tensor = shape
    mesh = make_mesh(MeshShape(data=data, fsdp=fsdp, context=context, tensor=tensor), jax.devices())
    (metrics, moments), state = one_step(OBJECTIVES[objective], mesh)
    wanted_metrics, wanted_moments = on_one_device(objective)
    for name, value in wanted_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    # After one step the moments are the gradient, clipped to norm 1, and its square, each times a constant.
    for got, want in zip(jax.tree.leaves(moments), jax.tree.leaves(wanted_moments), strict=True):
        # Sums over a cut vocabulary run in another order: up to 1.4e-6 of the largest element was seen.
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=3e-6 * np.abs(want).max())
    leaves = [leaf for leaf in jax.tree.leaves((state.params, state.opt_state)) if leaf.ndim]
    held = sum(leaf.addressable_shards[0].data.size for leaf in leaves) / sum(leaf.size for leaf in leaves)
    # Head norms stay whole. Of an adapter only the wide axes are cut, each over one mesh axis.
    cuts = fsdp * context * tensor
    assert held < (0.85 if "lora" in OBJECTIVES[objective] and cuts > 1 else 1.1 / cuts)


@pytest.mark.proof
@pytest.mark.slow
def test_a_run_goes_on_over_another_mesh_and_ends_where_one_device_does(tmp_path):
    data = tiny_dataset(tmp_path)
    introspective = {"objective": "introspective", "mask_token_id": 299, "steps": 4}

    def run(name, mesh, **options):
        config = tiny_run(data, tmp_path / "runs", run_name=name, mesh=mesh, **introspective)
        return run_training(config, echo=lambda line: None, **options)

    answers = iter([False, True])
    stopped = run("moved", {"fsdp": 4}, should_stop=lambda: next(answers))
    assert (stopped.step, stopped.is_finished) == (2, False)
    moved, alone = run("moved", {"data": 2, "fsdp": 2}), run("alone", {})
    assert moved.is_finished and alone.is_finished
    for name, value in alone.last_eval.items():
        np.testing.assert_allclose(moved.last_eval[name], value, rtol=2e-3, atol=1e-4, err_msg=name)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"fsdp": 3}, r"4 rows do not divide over data x fsdp = 3 devices"),
        ({"tensor": 2}, r"mesh.tensor=2 does not divide num_kv_heads=1"),
        ({"context": 3}, r"mesh.context x mesh.tensor = 3 does not divide max_seq_len=32"),
        ({"context": 4}, r"= 4 cannot share out num_heads=2 and num_kv_heads=1"),
        ({"data": 3, "fsdp": 3}, r"needs 9 devices, but there are 8"),
        ({"data": 3, "fsdp": -1}, r"8 devices are no multiple of 3"),
    ],
    ids=str,
)
def test_a_mesh_that_does_not_fit_is_refused_with_the_numbers(tmp_path, shape, message):
    with pytest.raises(ValueError, match=message):
        run_training(tiny_run(tiny_dataset(tmp_path), tmp_path / "runs", mesh=shape), echo=lambda line: None)


def test_at_most_one_axis_takes_the_rest():
    with pytest.raises(ConfigError, match="at most one is -1"):
        config_from_mapping(RUN | {"mesh": {"data": -1, "fsdp": -1}})
    with pytest.raises(ConfigError, match="sizes are positive"):
        config_from_mapping(RUN | {"mesh": {"data": 0}})
