"""The stack: scanning, unrolling and rematerialising agree; the adapter's gate; cached attention equals dense."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from idlm_jax.config import LoraConfig, from_hf_config, to_hf_config
from idlm_jax.model.attention import causal_attend, masked_attention, paged_attend
from idlm_jax.model.kv_cache import contiguous_pages, empty_cache
from idlm_jax.model.layers import apply_rope, rope_tables
from tests.support.released import QWEN3_8B
from tests.support.tiny_model import randomize_adapter, tiny_config, tiny_lm, tiny_module

TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 96, (2, 11)), jnp.int32)
POSITIONS = jnp.broadcast_to(jnp.arange(11, dtype=jnp.int32), (2, 11))
CAUSAL = jnp.broadcast_to(jnp.tril(jnp.ones((11, 11), bool)), (2, 11, 11))


@pytest.mark.parametrize("changes", [{"scan_unroll": 2}, {"remat": "full"}, {"remat": "dots"}], ids=str)
def test_unrolling_and_rematerialising_change_no_logit(changes):
    scanned, other = tiny_module(), tiny_module(**changes)
    np.testing.assert_allclose(other(TOKENS), scanned(TOKENS), rtol=1e-5, atol=1e-6)


def test_logits_are_float32_and_close_in_bfloat16():
    exact, rounded = tiny_module()(TOKENS), tiny_module(compute_dtype="bfloat16")(TOKENS)
    assert rounded.dtype == jnp.float32
    # bfloat16 keeps 8 bits; two layers of a tiny model stay within 3 % of the largest logit
    assert float(jnp.max(jnp.abs(rounded - exact))) < 0.03 * float(jnp.max(jnp.abs(exact)))


def test_an_adapter_acts_on_gated_rows_and_on_later_rows_only():
    module = randomize_adapter(tiny_module(lora=LoraConfig(rank=3, alpha=6.0)))
    gate = jnp.zeros((2, 11), bool).at[:, 6].set(True)

    def hidden(gate):
        return module.hidden_states(TOKENS, POSITIONS, causal_attend(CAUSAL), lora_gate=gate)[0]

    off, on = hidden(jnp.zeros_like(gate)), hidden(gate)
    np.testing.assert_array_equal(off, hidden(None))  # bitwise: a closed gate adds exactly zero
    np.testing.assert_array_equal(on[:, :6], off[:, :6])
    assert float(jnp.max(jnp.abs(on[:, 6] - off[:, 6]))) > 1e-3
    # rows behind it see its keys and values, which is why MASK rows must never become context
    assert float(jnp.max(jnp.abs(on[:, 7:] - off[:, 7:]))) > 1e-5


@pytest.mark.parametrize("visible", [None, True])
def test_cached_windows_equal_one_dense_forward(visible):
    module = tiny_module()
    dense, _ = module.hidden_states(TOKENS, POSITIONS, causal_attend(CAUSAL))
    cache, done, rows = empty_cache(module.config, num_pages=8, page_size=4), 0, []
    page_table = contiguous_pages(2, 4)[:, ::-1]
    for width in (4, 1, 3, 3):
        part = slice(done, done + width)
        start = jnp.full((2,), done, jnp.int32)
        hidden, cache = module.hidden_states(
            TOKENS[:, part],
            POSITIONS[:, part],
            paged_attend(page_table, start, visible and CAUSAL[:, :width, :width], module.config.kernels),
            carried=cache,
        )
        done += width
        rows.append(hidden)
    np.testing.assert_allclose(jnp.concatenate(rows, axis=1), dense, rtol=1e-4, atol=1e-5)


def test_a_row_that_sees_nothing_is_zero_with_finite_gradients():
    q = jnp.ones((1, 2, 4, 8))
    k = v = jnp.ones((1, 3, 2, 8))
    mask = jnp.zeros((1, 2, 3), bool).at[0, 1, 0].set(True)
    np.testing.assert_array_equal(masked_attention(q, k, v, mask)[0, 0], 0.0)
    grads = jax.grad(lambda x: masked_attention(x, k, v, mask).sum())(q)
    assert bool(jnp.all(jnp.isfinite(grads)))


def test_rotary_angles_stay_exact_at_positions_that_bfloat16_would_merge():
    x = jnp.ones((1, 2, 1, 8), jnp.bfloat16)
    turned = apply_rope(x, rope_tables(jnp.array([[256, 257]], jnp.int32), 8, 1e6))
    assert turned.dtype == jnp.bfloat16
    assert float(jnp.max(jnp.abs((turned[:, 0] - turned[:, 1]).astype(jnp.float32)))) > 0.5


def test_causal_logits_do_not_see_the_future_whatever_follows():
    lm = tiny_lm()
    changed = TOKENS.at[:, 7:].set(5)
    np.testing.assert_array_equal(lm.logits(TOKENS)[:, :7], lm.logits(changed)[:, :7])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 5}, "must be a multiple of"),
        ({"head_dim": 15}, "must be even"),
        ({"mask_token_id": 97}, "outside the vocabulary of 97"),
        ({"num_layers": 0}, "num_layers=0 must be at least 1"),
    ],
    ids=str,
)
def test_impossible_shapes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)


def test_config_survives_the_way_through_config_json():
    config = tiny_config(eos_token_ids=(3, 4), rope_theta=12345.0, tie_embeddings=True)
    assert from_hf_config(to_hf_config(config)) == config


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("model_type", "llama", ValueError),
        ("attention_bias", True, NotImplementedError),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}, NotImplementedError),
        ("num_experts", 8, NotImplementedError),
        ("hidden_size", None, ValueError),
    ],
)
def test_checkpoints_outside_dense_qwen3_are_refused_by_field(field, value, error):
    with pytest.raises(error, match=field):
        from_hf_config(to_hf_config(tiny_config()) | {field: value})


def test_the_mask_id_is_the_folders_else_qwen3s_else_the_callers():
    hf = to_hf_config(tiny_config(mask_token_id=None))
    assert from_hf_config(hf).mask_token_id is None
    assert from_hf_config(hf, mask_token_id=9).mask_token_id == 9
    assert from_hf_config(hf | {"vocab_size": 151_936}, mask_token_id=9).mask_token_id == 151_669
    assert from_hf_config(hf | {"mask_token_id": 7}, mask_token_id=9).mask_token_id == 7


def test_parameters_of_the_released_8b_model_are_counted_right():
    assert QWEN3_8B.num_params == 8_190_735_360  # Qwen/Qwen3-8B, model.safetensors.index.json: 16,381,470,720 bytes / 2


def test_num_params_equals_the_arrays_of_a_module():
    for tied in (False, True):
        module = tiny_module(tie_embeddings=tied)
        assert sum(x.size for x in jax.tree.leaves(nnx.state(module))) == module.config.num_params
