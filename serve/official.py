"""The reference server's configuration file (`--dllm-algorithm-config`), as far as it fits an exact server."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import pydantic
from omegaconf import OmegaConf

ALGORITHM = "IDLMBlockN"


@dataclasses.dataclass(frozen=True)
class Defaults:
    """What a request gets that does not say; OpenAI's values unless a configuration file has others."""

    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0


class OfficialFile(pydantic.BaseModel):
    """The keys that the reference knows. Those that would make it inexact are taken at their exact values only.

    Attributes:
        gen_block_size: the stride N.
        block_size: rows of a window, 2 N - 1.
        temperature: of requests that name none, like `top_k` and `top_p`.
        use_spec_verify: false would commit drafts unverified.
        verify_alpha: a factor on p in the acceptance test; other than 1 it no longer samples from p.
        verify_num_specs: drafts to verify; all of them, N - 1.
    """

    model_config = pydantic.ConfigDict(extra="forbid")

    gen_block_size: int | None = None
    block_size: int | None = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    use_spec_verify: Literal[True] = True
    verify_alpha: Literal[1] = 1
    verify_num_specs: int | None = None
    # How the reference computes, of no consequence for what comes out here.
    confidence_threshold: Any = None
    causal_prefill: Any = None
    fast_verify: Any = None
    fast_verify_topk: Any = None
    fast_verify_topk_per_spec: Any = None
    output_correction: Any = None
    conditional_lora: Any = None
    confidence_accept_threshold: Any = None  # of drafts that are not verified; here all are
    # Where it writes traces.
    stats_file: Any = None
    rounds_file: Any = None
    draft_conf_file: Any = None


def read_official(path: Path) -> tuple[int | None, Defaults]:
    """Stride, if the file names one, and defaults of requests.

    Raises:
        ValueError: an unknown key, or a value that this server does not have.
        FileNotFoundError: no such file.
    """
    content: Any = OmegaConf.to_container(OmegaConf.load(path))
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no keys")
    try:
        file = OfficialFile.model_validate(content)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    strides = {
        "gen_block_size": file.gen_block_size,
        "block_size": None if file.block_size is None else (file.block_size + 1) / 2,
        "verify_num_specs": None if file.verify_num_specs is None else file.verify_num_specs + 1,
    }
    named = {name: stride for name, stride in strides.items() if stride is not None}
    if len(set(named.values())) > 1:
        asked = ", ".join(f"{name}={getattr(file, name)}" for name in named)
        raise ValueError(f"{path}: {asked} do not fit together: block_size is 2 N - 1, verify_num_specs N - 1")
    stride = next(iter(named.values()), None)
    if stride is not None and stride != int(stride):
        raise ValueError(f"{path}: block_size={file.block_size} must be odd: it is 2 N - 1")
    return None if stride is None else int(stride), Defaults(file.temperature, file.top_k, file.top_p)
