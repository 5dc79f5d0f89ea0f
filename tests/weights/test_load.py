"""What a folder may hold, what is refused, and how much memory a load takes."""

import gc
import json
import shutil
import weakref

import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from idlm_jax.sharding import param_sharding
from idlm_jax.weights import WeightsError, export_hf, load
from idlm_jax.weights.assemble import _write
from idlm_jax.weights.checkpoint import Checkpoint
from idlm_jax.weights.hf_names import base_tensors
from tests.support.tiny_model import tiny_config, tiny_lm
from tests.weights.folders import assert_same_params, cpu_mesh, edit_json, exported, rewrite

Q = "model.layers.1.self_attn.q_proj.weight"


def problems_of(folder) -> tuple[str, ...]:
    with pytest.raises(WeightsError) as caught:
        load(folder, dtype="float32")
    assert all(problem in str(caught.value) for problem in caught.value.problems)
    return caught.value.problems


def test_a_load_inverts_an_export(tmp_path):
    lm = tiny_lm(seed=1)
    export_hf(lm, tmp_path, max_shard_bytes=1)
    assert_same_params(load(tmp_path, dtype="float32"), lm)
    assert load(tmp_path, dtype="float32").config == lm.config


def test_parameters_are_cast_to_the_dtype_asked_for(tmp_path):
    lm = load(exported(tmp_path))
    assert lm.config.param_dtype == lm.config.compute_dtype == "bfloat16"
    found = np.asarray(lm.params["final_norm"]["weight"][...])
    assert found.dtype == ml_dtypes.bfloat16
    wanted = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"].astype(ml_dtypes.bfloat16)
    assert np.asarray(lm.params["embedding"][...]).tobytes() == wanted.tobytes()


def test_float16_files_are_read(tmp_path):
    tensors = load_file(exported(tmp_path) / "model.safetensors")
    halves = {name: tensor.astype(np.float16) for name, tensor in tensors.items()}
    save_file(halves, tmp_path / "model.safetensors")
    found = np.asarray(load(tmp_path, dtype="float32").params["embedding"][...])
    np.testing.assert_array_equal(found, halves["model.embed_tokens.weight"].astype(np.float32))


def test_loaded_parameters_can_be_donated(tmp_path):
    lm = load(exported(tmp_path), dtype="float32")
    doubled = jax.jit(lambda params: jax.tree.map(lambda x: x * 2, params), donate_argnums=0)(lm.params)
    before = load(tmp_path, dtype="float32").params["final_norm"]["weight"][...]
    np.testing.assert_array_equal(doubled["final_norm"]["weight"][...], 2 * np.asarray(before))


def test_every_fault_is_listed_at_once(tmp_path):
    tensors = load_file(exported(tmp_path) / "model.safetensors")
    rewrite(
        tmp_path,
        {
            "model.norm.weight": None,
            Q: np.ascontiguousarray(tensors[Q].T),
            "lm_head.weight": tensors["lm_head.weight"].astype(np.int32),
            "model.layers.2.mlp.up_proj.weight": np.zeros((48, 32), np.float32),
        },
    )
    assert set(problems_of(tmp_path)) == {
        "missing: model.norm.weight, wanted shape (32,)",
        f"shape: {Q} is (32, 64), wanted (64, 32)",
        "dtype: lm_head.weight is I32, wanted one of ['BF16', 'F16', 'F32']",
        "unexpected: model.layers.2.mlp.up_proj.weight of shape (48, 32) in model.safetensors",
    }


def test_a_float64_tensor_is_refused_not_truncated(tmp_path):
    tensors = load_file(exported(tmp_path) / "model.safetensors")
    rewrite(tmp_path, {Q: tensors[Q].astype(np.float64)})
    assert problems_of(tmp_path) == (f"dtype: {Q} is F64, wanted one of ['BF16', 'F16', 'F32']",)


@pytest.fixture
def sharded(tmp_path):
    export_hf(tiny_lm(), tmp_path, max_shard_bytes=30_000)
    return tmp_path


def first_shards(folder):
    one, other, *_ = sorted(folder.glob("model-*.safetensors"))
    return one, other


def test_a_tensor_in_two_shards_is_named(sharded):
    one, other = first_shards(sharded)
    name, tensor = next(iter(load_file(one).items()))
    rewrite(sharded, {name: tensor}, other.name)
    problems = problems_of(sharded)
    assert f"duplicate: {name} is in {one.name} {tensor.shape} and in {other.name} {tensor.shape}" in problems


def test_an_index_that_names_the_wrong_shard_is_refused(sharded):
    one, other = first_shards(sharded)
    index = sharded / "model.safetensors.index.json"
    name = next(iter(load_file(one)))
    content = json.loads(index.read_text())
    content["weight_map"][name] = other.name
    index.write_text(json.dumps(content))
    assert problems_of(sharded) == (f"index: {name} is in {one.name}, but {index.name} says {other.name}",)


def test_a_missing_shard_names_the_file_and_its_tensors(sharded):
    one, _ = first_shards(sharded)
    names = list(load_file(one))
    one.unlink()
    problems = problems_of(sharded)
    assert any(problem.startswith(f"file: {one.name}") for problem in problems)
    assert all(any(problem.startswith(f"missing: {name},") for problem in problems) for name in names)


@pytest.mark.parametrize("keep", [0, 4, 500, -1])
def test_a_truncated_file_is_refused(tmp_path, keep):
    file = exported(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert any(problem.startswith("file: model.safetensors") for problem in problems_of(tmp_path))


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_an_unreadable_index_is_refused(sharded, content):
    (sharded / "model.safetensors.index.json").write_text(content)
    assert problems_of(sharded)[0].startswith("file: model.safetensors.index.json")


def test_an_index_may_not_point_outside_its_folder(sharded):
    index = sharded / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "../secret.safetensors"}}))
    assert "outside" in problems_of(sharded)[0]


def test_a_folder_without_weights_says_what_it_looked_for(tmp_path):
    (exported(tmp_path) / "model.safetensors").unlink()
    assert problems_of(tmp_path)[0].startswith("file: neither model.safetensors nor")


def test_a_tied_checkpoint_may_repeat_its_head_only_if_it_is_the_embedding(tmp_path):
    exported(tmp_path, tie_embeddings=True)
    embedding = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    rewrite(tmp_path, {"lm_head.weight": embedding})
    assert load(tmp_path, dtype="float32").config.tie_embeddings
    changed = embedding.copy()
    changed[-1, -1] += 1
    rewrite(tmp_path, {"lm_head.weight": changed})
    (problem,) = problems_of(tmp_path)
    assert problem.startswith("tied: lm_head.weight (97, 32) differs from model.embed_tokens.weight")


def test_an_untied_checkpoint_needs_its_head(tmp_path):
    rewrite(exported(tmp_path), {"lm_head.weight": None})
    assert problems_of(tmp_path) == ("missing: lm_head.weight, wanted shape (97, 32)",)


def test_a_config_that_is_missing_or_broken_is_refused(tmp_path):
    file = exported(tmp_path) / "config.json"
    file.write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        load(tmp_path)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load(tmp_path)


def test_end_tokens_come_from_the_generation_config_and_survive_an_export(tmp_path):
    exported(tmp_path / "a", eos_token_ids=(5,))
    edit_json(tmp_path / "a" / "generation_config.json", eos_token_id=[5, 7], repetition_penalty=1.3)
    lm = load(tmp_path / "a")
    assert lm.config.eos_token_ids == (5, 7)
    export_hf(lm, tmp_path / "b")
    assert load(tmp_path / "b").config.eos_token_ids == (5, 7)
    assert json.loads((tmp_path / "b" / "config.json").read_text())["eos_token_id"] == 5


def test_a_mask_id_can_be_given_where_the_vocabulary_has_none(tmp_path):
    exported(tmp_path, mask_token_id=None)
    assert load(tmp_path).config.mask_token_id is None
    assert load(tmp_path, mask_token_id=90).config.mask_token_id == 90


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/at/all", "a/b/c"])
def test_a_path_that_is_no_hub_id_never_reaches_the_network(path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("network"))
    with pytest.raises(FileNotFoundError, match="no folder"):
        load(path)


def test_an_unreachable_hub_is_explained(monkeypatch):
    def offline(*_, **__):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no route")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(FileNotFoundError, match="'Qwen/Qwen3-8B' is not a local folder, and the hub"):
        load("Qwen/Qwen3-8B")


def test_a_hub_id_is_fetched_and_loaded(tmp_path, monkeypatch):
    exported(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
    assert load("someone/tiny").config.hidden_size == 32


@pytest.mark.parametrize("axes", [None, dict(fsdp=2, tensor=2)], ids=str)
def test_a_load_holds_one_tensor_beyond_its_result(tmp_path, monkeypatch, axes):
    exported(tmp_path, num_layers=6)
    mesh = None if axes is None else cpu_mesh(**axes)
    load(tmp_path, dtype="float32", mesh=mesh)  # warms every jit cache, which may hold constants
    gc.collect()
    before = sum(array.nbytes for array in jax.live_arrays())
    sizes, reads, live_reads = [], weakref.WeakValueDictionary(), []
    read = Checkpoint.read

    def watched(self, name, index=...):
        sizes.append(sum(array.nbytes for array in jax.live_arrays()) - before)
        live_reads.append(len({key[0] for key in reads if key[0] != name}))
        part = read(self, name, index)
        reads[name, len(sizes)] = part
        return part

    monkeypatch.setattr(Checkpoint, "read", watched)
    lm = load(tmp_path, dtype="float32", mesh=mesh)
    result = sum(leaf.nbytes for leaf in jax.tree.leaves(lm.params))
    largest_bytes = lm.params["embedding"][...].nbytes
    assert len(sizes) >= 6 * 11 + 3
    assert max(sizes) <= result + largest_bytes
    # The host keeps no tensor but the one being read; a CPU array may be a view of the last one.
    assert max(live_reads) <= 1


@pytest.mark.parametrize("axes", [None, dict(fsdp=2, tensor=2)], ids=str)
def test_a_layer_is_written_into_its_stack_in_place(axes):
    config = tiny_config()
    spec = next(spec for spec in base_tensors(config) if spec.name == Q)
    sharding = param_sharding("L" + spec.axes, (2, *spec.shape), None if axes is None else cpu_mesh(**axes))
    stack = jnp.zeros((2, *spec.shape), device=sharding)
    pointers = [shard.data.unsafe_buffer_pointer() for shard in stack.addressable_shards]
    tensor = jnp.ones(spec.hf_shape, jnp.bfloat16)
    written = _write(stack, tensor, np.int32(1), spec, "float32", sharding)
    assert stack.is_deleted()
    assert pointers == [shard.data.unsafe_buffer_pointer() for shard in written.addressable_shards]
    assert (written[1] == 1).all() and (written[0] == 0).all()


def test_a_moved_folder_still_loads(tmp_path):
    exported(tmp_path / "a")
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert load(tmp_path / "b").config.num_layers == 2
