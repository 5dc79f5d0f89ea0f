"""Axis letters to mesh axes, and loading over some of the devices."""

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from idlm_jax.sharding import param_sharding, param_spec
from idlm_jax.weights import export_hf, load
from tests.weights.folders import assert_same_params, cpu_mesh, exported, tensors_of

TOKENS = np.arange(22, dtype=np.int32).reshape(2, 11)


def test_the_table_cuts_width_over_fsdp_and_wide_axes_over_tensor():
    mesh = cpu_mesh(fsdp=2, tensor=2)
    assert param_spec("LDNH", (2, 32, 4, 16), mesh) == PartitionSpec(None, "fsdp", "tensor", None)
    assert param_spec("LNHD", (2, 4, 16, 32), mesh) == PartitionSpec(None, "tensor", None, "fsdp")
    assert param_spec("VD", (96, 32), mesh) == PartitionSpec("tensor", "fsdp")


def test_an_axis_that_cannot_be_cut_stays_whole():
    assert param_spec("LDKH", (2, 32, 1, 16), cpu_mesh(fsdp=2, tensor=2))[2] is None
    assert param_spec("DF", (32, 48), cpu_mesh(fsdp=4)) == PartitionSpec("fsdp", None)


def test_two_axes_on_one_mesh_axis_are_refused():
    with pytest.raises(ValueError, match="NK"):
        param_spec("NK", (4, 2), cpu_mesh(fsdp=2, tensor=2))


def test_letters_and_sizes_must_agree_in_number():
    with pytest.raises(ValueError, match="3 axes"):
        param_spec("LDF", (32, 48), cpu_mesh(fsdp=2))


def test_a_mesh_with_explicit_axes_is_refused():
    mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(AxisType.Explicit,))
    with pytest.raises(ValueError, match="Auto"):
        param_spec("VD", (96, 32), mesh)


def test_without_a_mesh_there_is_no_sharding():
    assert param_sharding("VD", (96, 32), None) is None


@pytest.mark.parametrize("axes", [dict(fsdp=2, tensor=2), dict(tensor=4), dict(fsdp=4), dict(data=4)], ids=str)
def test_a_sharded_load_equals_a_single_device_load(tmp_path, axes):
    exported(tmp_path / "hf", tie_embeddings=axes == {"tensor": 4})
    single = load(tmp_path / "hf", dtype="float32")
    sharded = load(tmp_path / "hf", dtype="float32", mesh=cpu_mesh(**axes))
    assert_same_params(sharded, single)
    wanted = np.asarray(single.logits(TOKENS))
    # Sums are cut differently over the mesh; float32 keeps about 1e-6 of the largest logit.
    np.testing.assert_allclose(sharded.logits(TOKENS), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    export_hf(sharded, tmp_path / "again")
    theirs, ours = tensors_of(tmp_path / "hf"), tensors_of(tmp_path / "again")
    assert {name: t.tobytes() for name, t in theirs.items()} == {name: t.tobytes() for name, t in ours.items()}


def test_each_device_holds_its_part_only(tmp_path):
    lm = load(exported(tmp_path), dtype="float32", mesh=cpu_mesh(fsdp=2, tensor=2))
    arrays = {path: variable[...] for path, variable in nnx.to_flat_state(lm.params)}
    kernel = arrays["blocks", "attention", "q", "kernel"]
    assert [shard.data.shape for shard in kernel.addressable_shards] == [(2, 16, 2, 16)] * 4
    assert {array.sharding.mesh for array in arrays.values()} == {cpu_mesh(fsdp=2, tensor=2)}
    # 97 ids do not divide by two: that axis stays whole, the other is still cut.
    assert arrays["embedding",].addressable_shards[0].data.shape == (97, 16)
