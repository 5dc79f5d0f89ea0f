"""The folder for the reference server: every field that it reads has the value that it needs.

The readers below are written from what `dllm/config.py` and `dllm/algorithm/idlm_blockN.py` of
github.com/thuEcstasy/I-DLM (3342a17, inference/sglang/sglang/srt) take from these files; none of its code ran here.
"""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from idlm_jax import cli
from idlm_jax.config import LoraConfig
from idlm_jax.model.language_model import LanguageModel, from_module
from idlm_jax.weights import export_hf, export_sglang, load
from idlm_jax.weights.checkpoint import open_checkpoint
from idlm_jax.weights.hf_names import adapter_tensors
from serve.official import Defaults, read_official
from tests.support.tiny_model import randomize_adapter, tiny_module
from tests.support.tiny_tokenizer import byte_tokenizer, lm_with_tokenizer
from tests.weights.folders import assert_same_params, tensors_of

# dllm/config.py: DLLM_PARAMS, the entries for dense Qwen3.
KNOWN_ARCHITECTURES = {"SDARForCausalLM": 151669, "Qwen3ForCausalLM": 151669}
# idlm_blockN.py: what it takes from the YAML, with the default it has for a key that is not there.
ALGORITHM_DEFAULTS: dict[str, Any] = {
    **{"gen_block_size": 3, "temperature": 1.0, "top_k": 50, "top_p": 0.95, "confidence_threshold": 0.0},
    **{"use_spec_verify": True, "confidence_accept_threshold": 0.0, "verify_alpha": 1.0, "fast_verify": False},
    **{"fast_verify_topk": 5, "fast_verify_topk_per_spec": [], "output_correction": False, "conditional_lora": False},
    **{"stats_file": "/tmp/idlm_stats.jsonl", "rounds_file": "/tmp/idlm_rounds.jsonl"},
    **{"draft_conf_file": "/tmp/idlm_draft_conf.jsonl", "verify_num_specs": None},
}
SMALL = dict(vocab_size=151_680, mask_token_id=151_669, hidden_size=8, head_dim=8, mlp_size=8, num_layers=1)


def lm_of(**changes: Any) -> LanguageModel:
    module = tiny_module(**{**SMALL, "param_dtype": "bfloat16", **changes})
    return from_module(randomize_adapter(module) if module.config.lora else module, tokenizer=byte_tokenizer())


def what_the_server_reads(command: list[str]) -> dict[str, Any]:
    """The settings it would run with, from the command's own paths."""
    options = dict(zip(command[3::2], command[4::2], strict=True))
    assert command[:3] == ["python", "-m", "sglang.launch_server"]
    config = json.loads((Path(options["--model-path"]) / "config.json").read_text())
    algorithm = OmegaConf.to_container(OmegaConf.load(options["--dllm-algorithm-config"]))
    assert isinstance(algorithm, dict)
    common = {"block_size", "causal_prefill"}
    assert set(algorithm) <= set(ALGORITHM_DEFAULTS) | common, "a key that nothing reads"
    return {
        **{name: algorithm.get(name, default) for name, default in ALGORITHM_DEFAULTS.items()},
        "mask_id": KNOWN_ARCHITECTURES[config["architectures"][0]],
        "block_size": algorithm.get("block_size", config.get("block_size", 4)),
        "config_block_size": config["block_size"],
        "causal_prefill": algorithm.get("causal_prefill", config.get("use_regular_causal", False)),
        "options": options,
    }


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> tuple[Path, LanguageModel]:
    folder, lm = tmp_path_factory.mktemp("sglang") / "model", lm_of()
    export_sglang(lm, folder)
    return folder, lm


@pytest.fixture(scope="module")
def adapted(tmp_path_factory) -> tuple[Path, LanguageModel, list[str]]:
    folder, lm = tmp_path_factory.mktemp("sglang") / "model", lm_of(lora=LoraConfig(rank=3, alpha=6.0))
    return folder, lm, export_sglang(lm, folder, stride=2)


@pytest.mark.parametrize("stride", [2, 3, 4, 8])
def test_every_stride_meets_what_the_server_asserts(exported, stride):
    folder, lm = exported
    command = (folder / "SGLANG.md").read_text().split("```")[1].replace("\\\n", " ")
    other = shlex.split(command.replace("idlm_blockN4_config", f"idlm_blockN{stride}_config"))
    read = what_the_server_reads(other)
    assert read["gen_block_size"] == stride
    assert read["block_size"] == 2 * stride - 1  # IDLMBlockN.__init__ asserts it
    assert read["mask_id"] == lm.config.mask_token_id
    assert read["use_spec_verify"] is True and read["verify_alpha"] == 1.0 and read["confidence_threshold"] == 0.0
    assert read["fast_verify"] is False and read["output_correction"] is False
    assert (read["temperature"], read["top_k"], read["top_p"]) == (1.0, 50, 0.95)
    assert read["causal_prefill"] is True and read["conditional_lora"] is False
    assert read["stats_file"] is read["rounds_file"] is read["draft_conf_file"] is None
    assert read["config_block_size"] == 7 and read["options"]["--dllm-algorithm"] == "IDLMBlockN"
    # The same file on this project's server, which verifies exactly.
    file = Path(read["options"]["--dllm-algorithm-config"])
    assert read_official(file) == (stride, Defaults(temperature=1.0, top_k=50, top_p=0.95))


def test_the_rest_is_what_export_hf_writes(exported, tmp_path):
    folder, lm = exported
    export_hf(lm, tmp_path / "plain")
    assert tensors_of(folder).keys() == tensors_of(tmp_path / "plain").keys()
    assert (folder / "model.safetensors").read_bytes() == (tmp_path / "plain" / "model.safetensors").read_bytes()
    ours, plain = (json.loads((each / "config.json").read_text()) for each in (folder, tmp_path / "plain"))
    assert ours.pop("block_size") == 7 and ours == plain
    assert_same_params(load(folder, dtype="bfloat16"), lm)


def test_an_adapter_goes_beside_the_base_and_acts_on_mask_rows_only(adapted):
    folder, lm, command = adapted
    read = what_the_server_reads(command)
    assert read["conditional_lora"] is True
    assert (read["gen_block_size"], read["block_size"], read["config_block_size"]) == (2, 3, 3)
    name, _, path = read["options"]["--lora-paths"].partition("=")
    assert name == "idlm" and Path(path) == folder / "adapter"
    peft = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert (peft["r"], peft["lora_alpha"], len(peft["target_modules"])) == (3, 6.0, 7)
    open_checkpoint(folder / "adapter", "adapter_model").check(adapter_tensors(lm.config))
    assert_same_params(load(folder, dtype="bfloat16", adapter=folder / "adapter"), lm)
    assert '"model": "idlm"' in (folder / "SGLANG.md").read_text()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lm_with_tokenizer(), "feeds id 151669 at MASK positions .* has 258 ids and mask_token_id=257"),
        (lambda: lm_of(mask_token_id=151_670), "has 151680 ids and mask_token_id=151670"),
        (lambda: from_module(tiny_module(**SMALL)), "needs a tokenizer"),
    ],
)
def test_a_model_that_the_server_would_misread_is_refused(tmp_path, make, message):
    with pytest.raises(ValueError, match=message):
        export_sglang(make(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("sizes", [dict(stride=5), dict(stride=1, strides=(1,))])
def test_strides_without_a_file_or_without_a_mask_are_refused(tmp_path, sizes):
    with pytest.raises(ValueError, match="must be one of"):
        export_sglang(lm_of(), tmp_path / "out", **sizes)


def test_the_command_line_writes_it_and_prints_the_command(tmp_path, monkeypatch, capsys, adapted):
    base, _, _ = adapted
    out = tmp_path / "with spaces"
    arguments = ["idlm", "export", base, out, "--for", "sglang", "--adapter", base / "adapter", "--stride", "8"]
    monkeypatch.setattr("sys.argv", [str(each) for each in arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert not stopped.value.code
    read = what_the_server_reads(shlex.split(capsys.readouterr().out.splitlines()[-1]))
    assert read["gen_block_size"] == 8 and read["options"]["--model-path"] == str(out)
    assert read["options"]["--lora-paths"] == f"idlm={out}/adapter"


def test_an_adapter_for_a_plain_folder_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["idlm", "export", "model", str(tmp_path / "out"), "--adapter", "adapter"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2 and "belongs to --for sglang" in capsys.readouterr().err
