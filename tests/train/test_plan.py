"""What a run would take, without running it: on this machine, and what is refused. Named devices: tests/compile."""

import pytest

from tests.support.tiny_run import TINY_MODEL
from train.config import config_from_mapping
from train.plan import describe, make_plan
from train.targets import find_device, named_devices

RUN = {
    "run_name": "plan",
    "model": TINY_MODEL | {"vocab_size": 320},
    "mask_token_id": 319,
    "dataset": {"path": "nowhere", "build": {"tokenizer": "nowhere", "max_seq_len": 32}},
    "steps": 10,
    "batch_size": 8,
    "learning_rate": 1e-3,
}


def test_a_plan_for_this_machine_counts_parameters_and_bytes_and_gives_no_verdict_on_a_cpu(tmp_path):
    config = config_from_mapping(RUN | {"mesh": {"fsdp": 4}})
    plan = make_plan(config)
    # Embedding and blocks, written out; all of it trained, each of the four devices holding a quarter and the norms.
    width, layers = 16, 2
    blocks = layers * (width * 8 * 2 * (2 + 1) + 3 * width * 24 + 2 * width + 2 * 8)
    assert plan.num_params == plan.num_trained == 320 * width + blocks + width
    assert plan.num_params < plan.param_bytes < 1.1 * plan.num_params
    assert 2 * plan.param_bytes <= plan.optimizer_bytes < 2 * plan.param_bytes + 100
    assert plan.temporary_bytes > 0 and plan.tokens == 8 * 32
    assert plan.fits and "unknown" in list(describe(plan, config))[-1]


def test_lora_trains_the_adapter_alone():
    qwen = make_plan(config_from_mapping(_lora()))
    assert qwen.num_trained < 0.01 * qwen.num_params
    assert qwen.optimizer_bytes < 0.05 * qwen.param_bytes


def _lora():
    del_model = {key: value for key, value in RUN.items() if key != "model"}
    return del_model | {
        "init_from": "assets/tiny-qwen3-py",
        "lora": {"rank": 1, "alpha": 1},
        "param_dtype": "bfloat16",
        "mask_token_id": None,
    }


@pytest.mark.parametrize(
    ("changes", "target", "message"),
    [
        ({}, "h100", r"'h100' is no target: h100x8"),
        ({}, "h100x9", r"up to 8 GPUs, or whole hosts of 8"),
        ({}, "v5e-7", r"is no slice: v5e-1, v5e-4"),
        (
            {"model": None, "init_from": "models/Llama"},
            None,
            r"none of Qwen3-0.6B, .*the shape of the model is unknown",
        ),
        ({"dataset": {"path": "nowhere"}}, None, r"give dataset.build.max_seq_len"),
        ({"mesh": {"fsdp": 3}}, None, r"8 rows do not divide over data x fsdp = 3"),
    ],
    ids=str,
)
def test_what_cannot_be_planned_is_refused_with_what_is_missing(changes, target, message):
    with pytest.raises(ValueError, match=message):
        make_plan(config_from_mapping(RUN | changes), target)


def test_the_table_of_devices_knows_how_jax_spells_them():
    spelled = {"NVIDIA H100 80GB HBM3": "h100", "NVIDIA H200": "h200", "TPU v5 lite": "v5e", "TPU v5": "v5p"}
    for kind, name in (spelled | {"TPU v6 lite": "v6e"}).items():
        found = find_device(kind)
        assert found is not None and found.name == name
    assert find_device("cpu") is None


def test_a_missing_compiler_says_what_to_install():
    pytest.importorskip("jax")
    try:
        named_devices("v5e-4")
    except RuntimeError as error:
        assert "needs libtpu" in str(error)
