"""The count of operations against XLA's own, on shapes whose products outweigh everything else."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from idlm_jax.config import LoraConfig
from idlm_jax.qwen3_sizes import QWEN3_SIZES
from tests.support.tiny_model import tiny_module
from tests.train.test_mesh import batch
from train import flops
from train.layout import ObjectiveSettings
from train.objective import ar_loss, introspective_loss

WIDE = {"hidden_size": 256, "mlp_size": 1024, "scan_unroll": 2}


def xla_flops(objective, lora):
    module = tiny_module(**WIDE, lora=LoraConfig(rank=8, alpha=8.0) if lora else None)
    graph, trained, rest = nnx.split(module, nnx.LoRAParam if lora else nnx.Param, ...)
    data = jax.tree.map(jnp.asarray, batch())

    def loss_of(trained):
        merged = nnx.merge(graph, trained, rest)
        if objective == "ar":
            return ar_loss(merged, data)[0]
        return introspective_loss(merged, data, ObjectiveSettings(block_length=3))[0]

    return jax.jit(jax.grad(loss_of)).lower(trained).cost_analysis()["flops"], module.config


@pytest.mark.parametrize(("objective", "lora"), [("ar", False), ("introspective", False), ("introspective", True)])
def test_projections_are_counted_as_xla_counts_them(objective, lora):
    measured, config = xla_flops(objective, lora)
    # All rows go through the blocks, padding included. XLA counts the head, dense attention and the arithmetic
    # between products as well, which are some hundredths here.
    tokens = batch().tokens.size
    counted = flops.step_flops(config, flops.Work(tokens, 0, 0, 0), is_ar=objective == "ar", has_divergence=False)
    assert 0.94 < counted / measured < 1


def test_six_operations_a_parameter_and_token_is_what_remains_of_a_plain_language_model():
    config = QWEN3_SIZES["Qwen3-8B"]
    embedding = config.vocab_size * config.hidden_size
    counted = flops.step_flops(config, flops.Work(1, 0, 1, 0), is_ar=True, has_divergence=False)
    assert counted == pytest.approx(6 * (config.num_params - embedding), rel=1e-3)


def test_an_adapter_has_the_weights_that_the_model_draws():
    module = tiny_module(lora=LoraConfig(rank=3, alpha=6.0))
    drawn = sum(x.size for x in jax.tree.leaves(nnx.state(module, nnx.LoRAParam)))
    assert flops.adapter_weights(module.config) == drawn


def test_a_markov_head_has_the_weights_that_the_model_draws():
    module = tiny_module(markov_rank=3)
    drawn = sum(x.size for x in jax.tree.leaves(nnx.state(module, nnx.LoRAParam)))
    assert flops.markov_weights(module.config) == drawn


def test_a_frozen_base_saves_its_weight_gradients_and_the_clean_backward_pass():
    full = QWEN3_SIZES["Qwen3-8B"]
    frozen = dataclasses.replace(full, lora=LoraConfig(rank=1, alpha=1.0))
    work = flops.Work(4096, 0, 0, 4096 * 4097)
    ratio = [flops.step_flops(each, work, is_ar=False, has_divergence=False) for each in (frozen, full)]
    assert 0.49 < ratio[0] / ratio[1] < 0.56


@pytest.mark.parametrize("name", QWEN3_SIZES)
def test_the_released_sizes_have_the_parameters_that_their_names_say(name):
    billions = float(name.removeprefix("Qwen3-").removesuffix("B"))
    # Names round: 0.6B has 0.596e9, 32B 32.8e9; 1.7B counts its tied head twice.
    assert QWEN3_SIZES[name].num_params / 1e9 == pytest.approx(billions, rel=0.06)
