"""A model over several devices says what it says on one; its pool is cut, and stays where it was cut."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

import idlm_jax
from idlm_jax.config import LoraConfig
from idlm_jax.decoding import AR, ISD, SamplingParams, generate
from idlm_jax.model.language_model import LanguageModel, from_module
from idlm_jax.weights.adapter import export_adapter
from serve.device import Device, Draws
from serve.engine import Engine
from serve.mesh import mesh_of, serving_mesh
from tests.serve.conftest import CONFIG
from tests.support.tiny_model import random_prompts, randomize_adapter, sharpen, tiny_module

GREEDY = SamplingParams(max_tokens=24)
# One program for a decode and one for a prefill, which do everything that a request may ask for.
SMALL = dataclasses.replace(
    CONFIG, decode_batches=(4,), prefill_shapes=((1, 16),), num_pages=21, shapes=True, max_logprobs=2
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """A model of four key heads that eight query heads read, with an adapter and a Markov head that do something."""
    lora = LoraConfig(rank=4, alpha=4.0)
    module = tiny_module(3, vocab_size=12, mask_token_id=11, num_heads=8, num_kv_heads=4, lora=lora, markov_rank=4)
    lm = from_module(randomize_adapter(sharpen(module, 4.0), scale=0.1))
    base, adapter = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("adapter")
    export_adapter(lm, adapter, base_model_name_or_path=str(base))
    idlm_jax.export_hf(lm, base)
    return base, adapter


def load(folders: tuple[Path, Path], mesh: Mesh | None) -> LanguageModel:
    return idlm_jax.load(folders[0], adapter=folders[1], dtype="float32", mesh=mesh)


@pytest.fixture(scope="module")
def lm(folders) -> LanguageModel:
    return load(folders, None)


class Cut(NamedTuple):
    tp_size: int
    lm: LanguageModel
    device: Device


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.proof)])
def cut(request, folders) -> Cut:
    lm = load(folders, serving_mesh(request.param))
    return Cut(request.param, lm, Device(lm, SMALL))


@pytest.fixture
def engine(cut) -> Iterator[Engine]:
    cut.device.reset()
    with Engine(cut.lm, SMALL, device=cut.device, after_step=lambda scheduler: scheduler.check()) as engine:
        yield engine


def test_greedy_requests_that_come_and_go_equal_ar_on_one_device(lm, engine):
    prompts = random_prompts(12, 30, 11)
    early = [engine.submit(prompt, GREEDY) for prompt in prompts[:6]]
    first = next(iter(early[2])).token_ids  # the others arrive while this one runs
    late = [engine.submit(prompt, GREEDY) for prompt in prompts[6:]]
    got = [handle.result()[0] for handle in early + late]
    got[2] = first + got[2]
    assert got == [completion.token_ids for completion in generate(lm, prompts, AR(), GREEDY)]


def test_seeded_requests_are_those_of_generate_on_one_device(lm, engine):
    prompts = random_prompts(12, 40, 11, seed=1)
    params = [SamplingParams(max_tokens=20, temperature=1.0, top_k=seed % 3 * 4, seed=seed) for seed in range(11)]
    params = [dataclasses.replace(each, frequency_penalty=0.5) for each in params] + [
        SamplingParams(max_tokens=20, logprobs=2)
    ]
    handles = [engine.submit(*each) for each in zip(prompts, params, strict=True)]
    got = [list(handle) for handle in handles]
    expected = generate(lm, prompts, ISD(stride=4), params, batch_size=16)
    for pieces, completion in zip(got, expected, strict=True):
        assert [token for piece in pieces for token in piece.token_ids] == completion.token_ids
    reported = [entry for piece in got[-1] for entry in piece.logprobs or ()]
    assert expected[-1].logprobs is not None
    for entry, other in zip(reported, expected[-1].logprobs, strict=True):
        np.testing.assert_allclose(entry.logprob, other.logprob, rtol=1e-4)
        assert list(entry.top) == list(other.top)


def test_every_device_holds_its_heads_and_keeps_them_where_they_are(cut):
    tp_size, lm, device = cut
    device.reset()
    config = lm.config

    def check() -> list[int]:
        """Where each device has its part of the pool."""
        state = device._state
        assert state.cache.k.shape == (config.num_layers, SMALL.num_pages, 4, SMALL.page_size, config.head_dim)
        shards = [shard for pool in state.cache for shard in pool.addressable_shards]
        assert {shard.data.shape[2] for shard in shards} == {4 // tp_size}
        assert {shard.index[2].start or 0 for shard in shards} == set(range(0, 4, 4 // tp_size))
        rest = jax.tree.leaves(state._replace(cache=None))
        assert all(leaf.is_fully_replicated and len(leaf.devices()) == tp_size for leaf in rest)
        return [shard.data.unsafe_buffer_pointer() for shard in shards]

    before, places = device._state, check()
    decode, prefill = (
        next(shape for kind, shape, *_ in device._programs if kind == each) for each in ("decode", "prefill")
    )
    # Nothing but the words goes anywhere.
    with jax.transfer_guard_device_to_device("disallow"):
        np.asarray(device.decode(np.zeros(decode, np.int32), Draws.FULL))
        assert check() == places
        np.asarray(device.prefill(np.zeros(prefill, np.int32)))
        assert check() == places
    assert all(leaf.is_deleted() for leaf in before.cache)


def test_every_device_holds_its_part_of_the_weights(cut):
    tp_size, lm, _ = cut
    module = lm.module
    cut_weights = [module.embedding, module.head, module.blocks.attention.k.kernel, module.blocks.mlp.down.kernel]
    for weight in cut_weights:
        array = weight[...]
        assert {shard.data.size for shard in array.addressable_shards} == {array.size // tp_size}


def test_nothing_is_compiled_after_start_up(engine):
    engine.submit([1], GREEDY).result()
    compiled: list[str] = []

    def listen(event: str, duration_secs: float, **_) -> None:
        if "compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        handles = [engine.submit(prompt, GREEDY) for prompt in random_prompts(6, 40, 11, seed=4)]
        assert all(len(handle.result()[0]) == 24 for handle in handles)
        assert compiled == []
        jax.jit(lambda x: x + 1)(np.float32(1)).block_until_ready()
        assert compiled != [], "the listener hears nothing"
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def on(mesh: Mesh, lm: LanguageModel) -> LanguageModel:
    """A copy on every device of a mesh."""
    return dataclasses.replace(lm, params=jax.device_put(lm.params, jax.NamedSharding(mesh, PartitionSpec())))


@pytest.mark.parametrize("tp_size", [3, 8])
def test_devices_that_cannot_share_out_the_heads_are_refused(lm, tp_size):
    mesh = serving_mesh(tp_size)
    assert mesh is not None
    message = rf"tp_size={tp_size} does not divide the model's 4 key heads: it may be one of \[1, 2, 4\]"
    with pytest.raises(ValueError, match=message):
        Device(on(mesh, lm), SMALL)


def test_a_mesh_for_something_else_is_refused(lm):
    mesh = Mesh(np.asarray(jax.devices()[:4]).reshape(2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    with pytest.raises(ValueError, match=r"loaded on {'data': 2, 'tensor': 2}, but serving cuts over 'tensor' alone"):
        Device(on(mesh, lm), SMALL)


@pytest.mark.parametrize(
    ("tp_size", "message"), [(0, "tp_size=0 must be at least 1"), (9, "as many devices, but there are 8: cpu")]
)
def test_a_mesh_that_cannot_be_is_refused(tp_size, message):
    with pytest.raises(ValueError, match=message):
        serving_mesh(tp_size)


def test_one_device_needs_no_mesh(lm):
    assert serving_mesh(1) is None
    assert mesh_of(lm) is None
