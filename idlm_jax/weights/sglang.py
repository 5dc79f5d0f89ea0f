"""A folder that the reference server, I-DLM's fork of SGLang, launches as it is.

What that server reads was read in github.com/thuEcstasy/I-DLM at 3342a17, under `inference/sglang/sglang/srt`:
`dllm/config.py` takes the MASK id from a table by `architectures[0]`, `block_size` from config.json unless the YAML has
one, and prompt attention from `causal_prefill`; `dllm/algorithm/idlm_blockN.py` takes the rest of the YAML.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path

from idlm_jax.config import QWEN3_MASK_TOKEN_ID, DType
from idlm_jax.model.language_model import LanguageModel
from idlm_jax.weights.adapter import write_adapter
from idlm_jax.weights.atomic_folder import atomic_folder
from idlm_jax.weights.export import write_model

STRIDES = (2, 3, 4, 8)
README_FILE = "SGLANG.md"
ADAPTER_FOLDER = "adapter"
ADAPTER_NAME = "idlm"  # what requests name as their model
# dllm/config.py: the id that goes with Qwen3ForCausalLM. No file can change it.
MASK_TOKEN_ID = QWEN3_MASK_TOKEN_ID


def export_sglang(
    lm: LanguageModel,
    folder: str | Path,
    *,
    stride: int = 4,
    strides: Sequence[int] = STRIDES,
    max_shard_bytes: int = 4_000_000_000,
    dtype: DType | None = None,
    overwrite: bool = False,
) -> list[str]:
    """Writes what `export_hf` writes, and what the reference server needs beside it; whole or not at all.

    That is: `block_size` in config.json, one `idlm_blockN<N>_config.yaml` a stride, `SGLANG.md` with the command that
    launches it, and of a model with a gated adapter `adapter/`, which its conditional LoRA applies to MASK rows only.

    Args:
        lm: model to write; arrays may be sharded.
        folder: destination.
        stride: the one that config.json and the command name.
        strides: of the YAML files; beyond the trained block, drafts are guesses.
        max_shard_bytes: size above which a new file is begun.
        dtype: of all tensors; None keeps the parameters' own.
        overwrite: replace an earlier export.

    Returns:
        The launch command, an argument each.

    Raises:
        ValueError: the MASK id is not the one the server has for Qwen3, there is no tokenizer, or a stride is no
            stride.
        FileExistsError: the folder is not empty and `overwrite` is False, or it holds no earlier export.
        OSError: the disk is full or not writable; nothing is left behind.
        NotImplementedError: weights are held in 8 bits, or parameters are spread over several processes.
    """
    mask, folder = lm.config.mask_token_id, Path(folder)
    if mask != MASK_TOKEN_ID or lm.config.vocab_size <= MASK_TOKEN_ID:
        raise ValueError(
            f"the reference server feeds id {MASK_TOKEN_ID} at MASK positions of every Qwen3, no file changes that; "
            f"this model has {lm.config.vocab_size} ids and mask_token_id={mask}"
        )
    if lm.tokenizer is None:
        raise ValueError("the server needs a tokenizer, and the model has none")
    if stride not in strides or any(each < 2 for each in strides):
        raise ValueError(f"{stride=} must be one of {strides=}, all of which are at least 2")
    has_adapter = lm.config.lora is not None
    command = launch_command(folder, stride, has_adapter=has_adapter)
    with atomic_folder(folder, overwrite=overwrite, marker="config.json") as partial:
        also = {"block_size": window_rows(stride)}
        write_model(lm, partial, max_shard_bytes=max_shard_bytes, dtype=dtype, also=also)
        for each in strides:
            (partial / yaml_name(each)).write_text(algorithm_yaml(each, has_adapter=has_adapter))
        if has_adapter:
            (partial / ADAPTER_FOLDER).mkdir()
            write_adapter(lm, partial / ADAPTER_FOLDER, base_model_name_or_path=str(folder), dtype=dtype)
        has_markov_head = lm.config.markov_rank is not None
        readme = _readme(command, strides, has_adapter=has_adapter, has_markov_head=has_markov_head)
        (partial / README_FILE).write_text(readme)
    return command


def window_rows(stride: int) -> int:
    """Rows of a forward, `block_size` in that server's words: the pending token, N - 1 drafts, N - 1 MASKs."""
    return 2 * stride - 1


def yaml_name(stride: int) -> str:
    """The file for a stride, named as in `inference/configs` there."""
    return f"idlm_blockN{stride}_config.yaml"


def algorithm_yaml(stride: int, *, has_adapter: bool) -> str:
    """The file for `--dllm-algorithm-config`: the reference's own values, its traces off.

    Sampling is the server's, not the request's. `confidence_threshold` 0 leaves acceptance to verification.
    """
    fields = {
        "block_size": window_rows(stride),
        "gen_block_size": stride,
        "confidence_threshold": 0.0,
        "temperature": 1.0,
        "top_k": 50,
        "top_p": 0.95,
        "use_spec_verify": "true",
        # For SDAR's class, which attends to a prompt both ways without it; Qwen3's is causal whatever it says.
        "causal_prefill": "true",
        # Without it an adapter acts on every row, which is not the model that was trained.
        "conditional_lora": "true" if has_adapter else "false",
        # By default traces of every request grow in /tmp.
        "stats_file": "null",
        "rounds_file": "null",
        "draft_conf_file": "null",
    }
    return "".join(f"{name}: {value}\n" for name, value in fields.items())


def launch_command(folder: Path, stride: int, *, has_adapter: bool) -> list[str]:
    """The reference README's command for this folder."""
    arguments = ["python", "-m", "sglang.launch_server", "--model-path", str(folder)]
    if has_adapter:
        arguments += ["--lora-paths", f"{ADAPTER_NAME}={folder / ADAPTER_FOLDER}"]
    arguments += ["--dllm-algorithm", "IDLMBlockN", "--dllm-algorithm-config", str(folder / yaml_name(stride))]
    arguments += ["--attention-backend", "flashinfer", "--dtype", "bfloat16", "--tp-size", "1"]
    return [*arguments, "--mem-fraction-static", "0.85", "--max-running-requests", "32", "--port", "30000"]


def _readme(command: Sequence[str], strides: Sequence[int], *, has_adapter: bool, has_markov_head: bool) -> str:
    shell = " \\\n    ".join(_by_option(command))
    files = ", ".join(f"`{yaml_name(each)}` (N = {each})" for each in strides)
    lines = [
        "# Launching this folder with SGLang",
        "",
        "With the SGLang of github.com/Introspective-Diffusion/I-DLM (`inference/install.sh`), on a GPU:",
        "",
        f"```\n{shell}\n```",
        "",
        f"Another stride is another file: {files}. Sampling is in that file too: the server takes it from there, "
        "not from requests.",
        "",
        "The weights are a plain Qwen3, which transformers and any SGLang load; without `--dllm-algorithm` they decode "
        "one token a forward.",
    ]
    if has_adapter:
        lines += [
            "",
            f"`{ADAPTER_FOLDER}/` acts on MASK rows only (`conditional_lora: true` in the files). Requests say "
            f'`"model": "{ADAPTER_NAME}"`; under any other name the server drafts without it.',
        ]
    if has_markov_head:
        lines += [
            "",
            "The model was trained with a Markov head, which that server has no place for. It is left out, and drafts "
            "are accepted less often than where they were measured with it.",
        ]
    return "\n".join(lines) + "\n"


def _by_option(command: Sequence[str]) -> list[str]:
    """The command's arguments, each option joined with its value."""
    words: list[str] = []
    for argument in command:
        if words and not argument.startswith("-") and words[-1].startswith("--"):
            words[-1] += f" {shlex.quote(argument)}"
        else:
            words.append(shlex.quote(argument))
    return [" ".join(words[:3]), *words[3:]]
