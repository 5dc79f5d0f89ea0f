"""Exports: what is in the folder, and that it is there whole or not at all."""

import json
import os
import resource

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tokenizers
import transformers
from safetensors import safe_open

from idlm_jax.config import LoraConfig
from idlm_jax.model.language_model import from_module
from idlm_jax.weights import export_hf, load
from idlm_jax.weights.export import plan_shards
from idlm_jax.weights.hf_names import base_tensors
from tests.support.tiny_model import tiny_config, tiny_lm, tiny_module
from tests.support.tiny_tokenizer import byte_tokenizer
from tests.weights.folders import assert_same_params, edit_json, exported, tensors_of


def names_in(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_one_shard_has_no_index(tmp_path):
    assert names_in(exported(tmp_path / "out")) == {
        "model.safetensors",
        "config.json",
        "generation_config.json",
    }
    with safe_open(tmp_path / "out" / "model.safetensors", "numpy") as file:
        # Older transformers refuse a file that does not say so.
        assert file.metadata() == {"format": "pt"}


def test_shards_and_index_agree(tmp_path):
    export_hf(tiny_lm(), tmp_path, max_shard_bytes=30_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert [shard.name for shard in shards] == [
        f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)
    ]
    for shard in shards:
        names = set(tensors_of(tmp_path, shard.name))
        assert names == {name for name, file in index["weight_map"].items() if file == shard.name}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors_of(tmp_path).values())


def test_no_shard_exceeds_its_limit_unless_one_tensor_does():
    specs = base_tensors(tiny_config())
    for limit in (1, 5_000, 30_000, 10**9):
        shards = list(plan_shards(specs, limit, 4))
        assert tuple(spec for shard in shards for spec in shard) == specs
        sizes = [[4 * np.prod(spec.shape) for spec in shard] for shard in shards]
        assert all(sum(size) <= limit or len(size) == 1 for size in sizes)


def test_a_cast_export_names_its_dtype(tmp_path):
    export_hf(tiny_lm(), tmp_path, dtype="bfloat16")
    assert {tensor.dtype for tensor in tensors_of(tmp_path).values()} == {np.dtype(ml_dtypes.bfloat16)}
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_source_fields_that_are_still_true_are_kept(tmp_path):
    exported(tmp_path / "a")
    edit_json(
        tmp_path / "a" / "config.json",
        architectures=["SDARForCausalLM"],
        model_type="sdar",
        auto_map={"AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM"},
        bos_token_id=3,
        dtype="float16",
        initializer_range=0.5,
        max_window_layers=28,
    )
    export_hf(load(tmp_path / "a", dtype="float32"), tmp_path / "b")
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert (config["initializer_range"], config["max_window_layers"], config["bos_token_id"]) == (0.5, 28, 3)
    assert (config["architectures"], config["model_type"]) == (["Qwen3ForCausalLM"], "qwen3")
    assert "auto_map" not in config and "dtype" not in config and config["torch_dtype"] == "float32"


def test_a_model_with_an_adapter_exports_its_base(tmp_path):
    module = tiny_module(lora=LoraConfig(rank=2, alpha=4.0))
    module.blocks.mlp.up.lora_b[...] = jnp.ones_like(module.blocks.mlp.up.lora_b[...])
    export_hf(from_module(module), tmp_path / "adapted")
    kernel = np.asarray(module.blocks.mlp.up.kernel[...][0])
    found = tensors_of(tmp_path / "adapted")
    assert found.keys() == tensors_of(exported(tmp_path / "base")).keys()
    np.testing.assert_array_equal(found["model.layers.0.mlp.up_proj.weight"].T, kernel)


def tiny_tokenizer() -> transformers.PreTrainedTokenizerFast:
    words = {word: index for index, word in enumerate(["<unk>", "<eos>", *"abcdefgh"])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<eos>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} <eos>{% endfor %}"
    return tokenizer


@pytest.mark.parametrize("model_type", ["qwen3", "sdar"])
def test_the_tokenizer_and_its_chat_template_survive_the_round_trip(tmp_path, model_type):
    export_hf(from_module(tiny_module(), tokenizer=tiny_tokenizer()), tmp_path / "a")
    edit_json(tmp_path / "a" / "config.json", model_type=model_type)
    lm = load(tmp_path / "a", dtype="float32")
    assert lm.tokenizer is not None and lm.tokenizer("a c e")["input_ids"] == [2, 4, 6]
    export_hf(lm, tmp_path / "b")
    again = load(tmp_path / "b", dtype="float32").tokenizer
    chat = [{"role": "user", "content": "b d"}]
    assert again is not None and again.apply_chat_template(chat, tokenize=False) == "b d <eos>"


def test_the_tokenizer_names_no_class_that_only_transformers_5_has(tmp_path):
    tokenizer = byte_tokenizer()
    export_hf(from_module(tiny_module(), tokenizer=tokenizer), tmp_path / "a")
    config = json.loads((tmp_path / "a" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["additional_special_tokens"] == ["<|MASK|>"]
    assert not isinstance(config.get("extra_special_tokens"), list)  # 4.x expects an object there
    found = load(tmp_path / "a", dtype="float32").tokenizer
    text = "<|MASK|>é<|endoftext|>"
    assert found is not None and found.encode(text) == tokenizer.encode(text)
    assert found.decode(found.encode(text), skip_special_tokens=True) == "é"


def test_a_folder_without_a_tokenizer_loads_with_none(tmp_path):
    assert load(exported(tmp_path), dtype="float32").tokenizer is None


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path):
    exported(tmp_path / "out")
    before = tensors_of(tmp_path / "out")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        export_hf(tiny_lm(seed=5), tmp_path / "out")
    assert {n: t.tobytes() for n, t in before.items()} == {
        n: t.tobytes() for n, t in tensors_of(tmp_path / "out").items()
    }
    assert names_in(tmp_path) == {"out"}


def test_overwrite_replaces_an_export_and_leaves_nothing_of_it(tmp_path):
    export_hf(tiny_lm(), tmp_path / "out", max_shard_bytes=30_000)
    export_hf(tiny_lm(seed=5), tmp_path / "out", overwrite=True)
    assert names_in(tmp_path / "out") == {"model.safetensors", "config.json", "generation_config.json"}
    assert_same_params(load(tmp_path / "out", dtype="float32"), tiny_lm(seed=5))
    assert names_in(tmp_path) == {"out"}


def test_overwrite_never_deletes_a_folder_that_is_no_export(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"no config\.json"):
        export_hf(tiny_lm(), tmp_path / "thesis", overwrite=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError, match="is a file"):
        export_hf(tiny_lm(), tmp_path / "file", overwrite=True)
    assert names_in(tmp_path) == {"thesis", "file"} and names_in(tmp_path / "thesis") == {"chapter.txt"}


@pytest.mark.parametrize("has_old", [False, True])
def test_a_full_disk_leaves_no_half_export_and_keeps_the_old_one(tmp_path, has_old):
    if has_old:
        exported(tmp_path / "out")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The kernel refuses to let a file grow past this, in the middle of a shard, as a full disk would.
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OSError, match="cannot write model"):
            export_hf(tiny_lm(seed=5), tmp_path / "out", max_shard_bytes=30_000, overwrite=has_old)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names_in(tmp_path) == ({"out"} if has_old else set())
    if has_old:
        assert_same_params(load(tmp_path / "out", dtype="float32"), tiny_lm())


@pytest.mark.parametrize("call", [1, 2])
def test_an_interrupted_swap_restores_the_old_export(tmp_path, monkeypatch, call):
    exported(tmp_path / "out")
    rename, calls = os.rename, []
    path_type = type(tmp_path)

    def interrupted(source, target):
        calls.append(target)
        if len(calls) == call:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(path_type, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_hf(tiny_lm(seed=5), tmp_path / "out", overwrite=True)
    monkeypatch.undo()
    assert names_in(tmp_path) == {"out"}
    assert_same_params(load(tmp_path / "out", dtype="float32"), tiny_lm())


def test_a_crash_between_shards_leaves_nothing(tmp_path, monkeypatch):
    calls = []

    def crash(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise RuntimeError("preempted")

    monkeypatch.setattr("idlm_jax.weights.export.write_tensors", crash)
    with pytest.raises(RuntimeError, match="preempted"):
        export_hf(tiny_lm(), tmp_path / "new" / "out", max_shard_bytes=30_000)
    assert names_in(tmp_path / "new") == set()


def test_a_shard_limit_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="max_shard_bytes=0"):
        export_hf(tiny_lm(), tmp_path / "out", max_shard_bytes=0)
