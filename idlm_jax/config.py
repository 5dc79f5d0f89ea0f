"""The shape of a Qwen3 model and of a LoRA adapter, and their translation from and to `config.json`."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp

from pallas_kernels.bodies import REFERENCE, Kernels
from pallas_kernels.quantized_matmul import Form

# Qwen3's tokenizer ends at 151,668 while its embedding holds 151,936 rows: the first free row is the MASK that the
# published I-DLM checkpoints use, so no tensor has to be resized.
QWEN3_MASK_TOKEN_ID = 151_669

DType = Literal["float32", "bfloat16"]
Remat = Literal["none", "full", "dots"]

# SDAR's and I-DLM's own checkpoints carry these names; their tensors are Qwen3's, one to one. Loading them with the
# class that their folder names would attend bidirectionally under an all-ones mask.
QWEN3_LIKE = {"qwen3", "sdar", "idlm", "i-dlm"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """A gated LoRA adapter on all seven projections of every layer.

    Attributes:
        rank: inner width r of the two factors.
        alpha: scale numerator; the update is `alpha / rank * gate * (x A) B`.
    """

    rank: int
    alpha: float

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"{self.rank=} must be at least 1")
        if self.alpha <= 0:
            raise ValueError(f"{self.alpha=} must be positive")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A dense Qwen3 decoder.

    Attributes:
        vocab_size: rows of the embedding, V.
        hidden_size: model width, D.
        num_layers: decoder blocks, L.
        num_heads: query heads, N.
        num_kv_heads: key/value heads, K; divides `num_heads`.
        head_dim: width of one head, H; not tied to `hidden_size / num_heads`.
        mlp_size: width of the gated MLP, F.
        rope_theta: base of the rotary frequencies.
        norm_eps: epsilon of every RMSNorm.
        tie_embeddings: the head is the transposed embedding (0.6B, 1.7B, 4B) or its own matrix (8B and up).
        max_position: longest sequence, in tokens, that the checkpoint claims to handle.
        mask_token_id: id fed at MASK positions; None when the vocabulary has no room for one.
        eos_token_ids: ids that end a completion.
        param_dtype: dtype in which parameters are stored.
        compute_dtype: dtype of activations and matrix products; reductions and softmax are always float32.
        quantize: 8-bit form in which the projections of the blocks are held, for inference; None holds them in
            `param_dtype`, like everything else.
        lora: adapter that acts on MASK rows, or None.
        markov_rank: rank of the head that corrects a MASK row's logits by the draft before it; None for no such head.
        remat: what the backward pass recomputes: "none", "full" (each block) or "dots" (all but matrix products).
        scan_unroll: layers per step of the scan over layers; `num_layers` unrolls it.
        kernels: the body of every op that has more than one (`pallas_kernels.choose_kernels`).
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_size: int
    rope_theta: float = 1_000_000.0
    norm_eps: float = 1e-6
    tie_embeddings: bool = False
    max_position: int = 40_960
    mask_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    param_dtype: DType = "float32"
    compute_dtype: DType = "float32"
    quantize: Form | None = None
    lora: LoraConfig | None = None
    markov_rank: int | None = None
    remat: Remat = "none"
    scan_unroll: int = 1
    kernels: Kernels = REFERENCE

    def __post_init__(self) -> None:
        for name in (
            "vocab_size hidden_size num_layers num_heads num_kv_heads head_dim mlp_size max_position scan_unroll"
        ).split():
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.markov_rank is not None and self.markov_rank < 1:
            raise ValueError(f"{self.markov_rank=} must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_heads=} must be a multiple of {self.num_kv_heads=}")
        if self.head_dim % 2:
            raise ValueError(f"{self.head_dim=} must be even: rotary embedding turns pairs")
        if self.mask_token_id is not None and not 0 <= self.mask_token_id < self.vocab_size:
            raise ValueError(f"{self.mask_token_id=} lies outside the vocabulary of {self.vocab_size} ids")

    @property
    def num_groups(self) -> int:
        """Query heads that share one key/value head, G."""
        return self.num_heads // self.num_kv_heads

    @property
    def compute(self) -> jnp.dtype:
        return jnp.dtype(self.compute_dtype)

    @property
    def num_params(self) -> int:
        """Parameters of the base model, adapter excluded."""
        attention = self.hidden_size * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)
        block = attention + 3 * self.hidden_size * self.mlp_size + 2 * self.hidden_size + 2 * self.head_dim
        heads = 1 if self.tie_embeddings else 2
        return self.num_layers * block + heads * self.vocab_size * self.hidden_size + self.hidden_size


def from_hf_config(hf: Mapping[str, Any], *, dtype: DType = "float32", mask_token_id: int | None = None) -> ModelConfig:
    """Reads the fields of a `config.json` that change the model; refuses what this model cannot compute.

    Args:
        hf: parsed `config.json` of a Qwen3 model or of an I-DLM/SDAR-named one.
        dtype: parameter and compute dtype of the result.
        mask_token_id: used when the folder names none and Qwen3's own does not fit the vocabulary.

    Raises:
        ValueError: a field is missing or `model_type` is not Qwen3-like.
        NotImplementedError: the checkpoint uses a feature outside dense Qwen3 (biases, RoPE scaling, experts).
    """
    model_type = str(hf.get("model_type", "")).lower()
    if model_type not in QWEN3_LIKE:
        raise ValueError(f"model_type={model_type!r} is not one of {sorted(QWEN3_LIKE)}")
    # transformers 5 moved rope_theta into rope_parameters; 4.x has rope_theta and rope_scaling side by side.
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    refused = {
        "attention_bias": bool(hf.get("attention_bias")),
        "use_sliding_window": bool(hf.get("use_sliding_window")),
        "num_experts": bool(hf.get("num_experts")),
        "rope_scaling": rope.get("rope_type", rope.get("type", "default")) not in ("default", None),
        "hidden_act": hf.get("hidden_act", "silu") != "silu",
    }
    for name, is_refused in refused.items():
        if is_refused:
            raise NotImplementedError(f"config.json: {name}={hf.get(name)!r} is outside dense Qwen3")

    def field(name: str) -> Any:
        if hf.get(name) is None:
            raise ValueError(f"config.json lacks {name!r}, which a Qwen3 model needs")
        return hf[name]

    eos = hf.get("eos_token_id")
    vocab_size = int(field("vocab_size"))
    mask = hf.get("mask_token_id")
    if mask is None:
        mask = QWEN3_MASK_TOKEN_ID if vocab_size > QWEN3_MASK_TOKEN_ID else mask_token_id
    hidden_size, num_heads = int(field("hidden_size")), int(field("num_attention_heads"))
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=int(field("num_hidden_layers")),
        num_heads=num_heads,
        num_kv_heads=int(hf.get("num_key_value_heads") or num_heads),
        head_dim=int(hf.get("head_dim") or hidden_size // num_heads),
        mlp_size=int(field("intermediate_size")),
        rope_theta=float(hf.get("rope_theta") or rope.get("rope_theta") or 10_000.0),
        norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
        tie_embeddings=bool(hf.get("tie_word_embeddings", False)),
        max_position=int(hf.get("max_position_embeddings", 40_960)),
        mask_token_id=None if mask is None else int(mask),
        eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list | tuple) else (int(eos),),
        param_dtype=dtype,
        compute_dtype=dtype,
    )


def to_hf_config(config: ModelConfig) -> dict[str, Any]:
    """The `config.json` of a Qwen3 model, readable by transformers 4.51 and later and by SGLang."""
    eos = config.eos_token_ids
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "eos_token_id": None if not eos else eos[0] if len(eos) == 1 else list(eos),
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": config.mlp_size,
        "mask_token_id": config.mask_token_id,
        "max_position_embeddings": config.max_position,
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "rms_norm_eps": config.norm_eps,
        "rope_scaling": None,
        "rope_theta": config.rope_theta,
        "sliding_window": None,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": config.param_dtype,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": config.vocab_size,
    }
