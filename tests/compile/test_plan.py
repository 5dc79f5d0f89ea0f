"""`--plan` for named devices: configs fit where they say, and a step that does not fit is told apart."""

import pytest

from train.config import load_config
from train.plan import describe, make_plan

pytestmark = pytest.mark.compile


@pytest.mark.parametrize(
    ("name", "target"), [pytest.param("qwen3_0p6b", "h100x8", marks=pytest.mark.proof), ("qwen3_8b", "h100x8")]
)
def test_a_config_fits_the_devices_that_it_names(name, target):
    config = load_config(f"configs/{name}.yaml")
    plan = make_plan(config, target)
    assert plan.fits and plan.mesh["fsdp"] == 8
    # Float32 parameters and two moments, cut over eight devices; nothing else is kept from step to step.
    kept = plan.param_bytes + plan.optimizer_bytes
    assert kept == pytest.approx(12 * plan.num_params / 8, rel=1e-3)
    assert "fits" in list(describe(plan, config))[-1]


@pytest.mark.proof
def test_all_of_8b_in_float32_with_moments_does_not_fit_one_gpu():
    config = load_config("configs/qwen3_8b.yaml", ["gradient_accumulation_steps=32"])
    plan = make_plan(config, "h100x1")
    assert not plan.fits and plan.bytes_per_device > 12 * plan.num_params
    assert "DOES NOT FIT" in list(describe(plan, config))[-1]


@pytest.mark.proof
def test_an_adapter_of_8b_trains_on_one_h200_without_a_score_matrix():
    lora = ["lora.rank=128", "lora.alpha=256", "param_dtype=bfloat16", "curriculum=[]"]
    config = load_config("configs/qwen3_8b.yaml", [*lora, "batch_size=1", "gradient_accumulation_steps=1"])
    plan = make_plan(config, "h200x1")
    # A bfloat16 base; float32 factors with two moments.
    assert plan.param_bytes == pytest.approx(2 * (plan.num_params - plan.num_trained) + 4 * plan.num_trained, rel=1e-3)
    assert plan.optimizer_bytes == pytest.approx(8 * plan.num_trained, rel=1e-3)
    # 18.5 GB with the reference's score matrices; 5.7 GB with the kernels, of which 0.6 GB clean keys and values.
    assert plan.temporary_bytes < 6.5e9
