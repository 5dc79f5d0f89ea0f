"""Shapes of the released dense Qwen3 models, as their `config.json` state them: for what needs no weights."""

from idlm_jax.config import QWEN3_MASK_TOKEN_ID, ModelConfig


def _size(width: int, layers: int, heads: int, mlp: int, *, tie_embeddings: bool) -> ModelConfig:
    return ModelConfig(
        vocab_size=151_936,
        hidden_size=width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=8,
        head_dim=128,
        mlp_size=mlp,
        tie_embeddings=tie_embeddings,
        mask_token_id=QWEN3_MASK_TOKEN_ID,
    )


# By the last part of the hub id. https://huggingface.co/Qwen/<name>/blob/main/config.json
QWEN3_SIZES = {
    "Qwen3-0.6B": _size(1024, 28, 16, 3072, tie_embeddings=True),
    "Qwen3-1.7B": _size(2048, 28, 16, 6144, tie_embeddings=True),
    "Qwen3-4B": _size(2560, 36, 32, 9728, tie_embeddings=True),
    "Qwen3-8B": _size(4096, 36, 32, 12_288, tie_embeddings=False),
    "Qwen3-14B": _size(5120, 40, 40, 17_408, tie_embeddings=False),
    "Qwen3-32B": _size(5120, 64, 64, 25_600, tie_embeddings=False),
}
