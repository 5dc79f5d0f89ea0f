"""R-ISD on the model in the repository and real prompts: places of held-out Python text, every stride, float32."""

import functools
from pathlib import Path

import pytest

import idlm_jax
from idlm_jax.decoding import AR, ISD, SamplingParams, generate

ROOT = Path(__file__).parents[2]
BASE, ADAPTER = ROOT / "assets" / "tiny-qwen3-py", ROOT / "assets" / "tiny-qwen3-py-isd"
GREEDY = SamplingParams(max_tokens=32, ignore_eos=True)


def real_prompts() -> list[str]:
    """200 prompts of 20 to 400 characters, cut from this repository's own sources."""
    text = "".join(path.read_text() for path in sorted((ROOT / "idlm_jax").rglob("*.py")))
    return [text[at : at + 20 + (at * 7919) % 380] for at in range(0, len(text), len(text) // 200)][:200]


@pytest.fixture(scope="module")
def r_isd() -> idlm_jax.LanguageModel:
    return idlm_jax.load(BASE, adapter=ADAPTER, dtype="float32")


@functools.cache
def base_tokens(num_prompts: int) -> list[list[int]]:
    lm = idlm_jax.load(BASE, dtype="float32")
    return [c.token_ids for c in generate(lm, real_prompts()[:num_prompts], AR(), GREEDY)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stride", "num_prompts"),
    [(4, 64), *(pytest.param(stride, 200, marks=pytest.mark.proof) for stride in (2, 3, 4, 8))],
)
def test_r_isd_writes_what_the_base_model_writes(r_isd, stride, num_prompts):
    completions = generate(r_isd, real_prompts()[:num_prompts], ISD(stride=stride), GREEDY)
    assert [c.token_ids for c in completions] == base_tokens(num_prompts)
    assert sum(len(c.token_ids) for c in completions) > 1.1 * sum(c.num_forwards for c in completions)


def test_the_asset_is_small_and_says_how_it_was_made():
    assert (BASE / "model.safetensors").stat().st_size <= 12_000_000
    assert (ADAPTER / "adapter_model.safetensors").stat().st_size <= 12_000_000
    for folder in (BASE, ADAPTER):
        assert (folder / "config.yaml").is_file()
        assert (folder / "metrics.jsonl").stat().st_size > 1_000
