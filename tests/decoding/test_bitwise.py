"""`deterministic="bitwise"`: the same tokens from the same logits, bit for bit, under every method and in any batch."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idlm_jax.config import LoraConfig
from idlm_jax.decoding import AR, ISD, Completion, SamplingParams, fixed_width, generate, loop
from idlm_jax.decoding.fixed_width import checksums, group_slots_of
from idlm_jax.decoding.generate import NO_LIMIT, prepare_batch, read_completions
from idlm_jax.decoding.loop import programs
from idlm_jax.decoding.stream import stream_tokens
from idlm_jax.decoding.window import Outputs
from idlm_jax.model.language_model import LanguageModel, from_module
from pallas_kernels.bodies import BY_NAME, Body
from pallas_kernels.paged_attention import page_walk, paged_attention
from tests.support.tiny_model import random_prompts, randomize_adapter, sharpen, tiny_module

DTYPES = ["float32", "bfloat16"]
# Compiling takes most of a test: bfloat16, where more can go wrong, runs always.
BFLOAT16_FIRST = ["bfloat16", pytest.param("float32", marks=pytest.mark.proof)]
GREEDY = SamplingParams(max_tokens=20)
# 35 = 5 batches of 7; more than a tile of prompt, and less.
PROMPTS = random_prompts(35, 30, 11)
PROMPTS[0] = PROMPTS[0] * 30  # the first of every batch has the longest, so that all batches share their programs
PROMPTS = [prompt[:30] for prompt in PROMPTS]


def tiny(dtype: str, *, adapter: bool = False, **changes) -> LanguageModel:
    changes |= {"vocab_size": 12, "mask_token_id": 11, "param_dtype": dtype, "compute_dtype": dtype}
    lora = LoraConfig(rank=4, alpha=8.0) if adapter else None
    module = sharpen(tiny_module(3, lora=lora, **changes), 4.0)
    return from_module(randomize_adapter(module, scale=0.1) if adapter else module)


def decoded(lm, prompts, method, params=GREEDY, *, batch_size=1, group_slots=None) -> list[Completion]:
    """In the order of `prompts`, decoded in another one."""
    order = np.random.default_rng(batch_size).permutation(len(prompts))
    shuffled = [prompts[index] for index in order]
    wanted = params if isinstance(params, SamplingParams) else [params[index] for index in order]
    if group_slots is None:
        found = generate(lm, shuffled, method, wanted, batch_size=batch_size, deterministic="bitwise")
    else:
        wanted = [wanted] * len(prompts) if isinstance(wanted, SamplingParams) else wanted
        prepared = prepare_batch(lm, shuffled, method, wanted, group_slots)
        run_prefill, run_loop = programs(prepared.plan)
        state = run_prefill(lm.graph, lm.params, prepared.plan, prepared.state, prepared.prefill_rows)
        state = run_loop(lm.graph, lm.params, prepared.plan, state, jnp.int32(NO_LIMIT))
        found = read_completions(lm, state, prepared.prompt_lens, wanted)
    return [found[place] for place in np.argsort(order)]


def bits(completions) -> list[list[tuple[int, int]]]:
    """Tokens, each with the checksum of its logits."""
    return [list(zip(each.token_ids, each.logit_checksums, strict=True)) for each in completions]


def acceptance(completions) -> float:
    accepted, verified = (
        sum(sum(getattr(each, name)) for each in completions) for name in ("accepted_by_depth", "verified_by_depth")
    )
    return accepted / verified


@pytest.fixture(scope="module", params=BFLOAT16_FIRST)
def ar_alone(request) -> tuple[str, list[list[tuple[int, int]]]]:
    """AR of the base model without its adapter, one request at a time."""
    return request.param, bits(decoded(tiny(request.param), PROMPTS, AR()))


def test_r_isd_has_the_bits_of_the_base_model_alone_in_any_batch(ar_alone):
    dtype, wanted = ar_alone
    lm = tiny(dtype, adapter=True)
    for method, batch_size in ((ISD(4), 7), (ISD(8), 35), (ISD(2), 1)):
        found = decoded(lm, PROMPTS, method, batch_size=batch_size)
        assert bits(found) == wanted, (method, batch_size)
        assert 0.05 < acceptance(found) < 0.95


@pytest.mark.proof
@pytest.mark.parametrize("batch_size", [1, 7, 35])
@pytest.mark.parametrize("method", [AR(), ISD(2), ISD(4), ISD(8), ISD(4, branches=4), ISD(8, rows=16)], ids=str)
@pytest.mark.parametrize("adapter", [False, True])
def test_every_method_has_the_bits_of_ar_in_any_batch(ar_alone, adapter, method, batch_size):
    dtype, wanted = ar_alone
    assert bits(decoded(tiny(dtype, adapter=adapter), PROMPTS, method, batch_size=batch_size)) == wanted


def take_away_the_tile(patch: pytest.MonkeyPatch) -> None:
    """Windows as wide as their method has them; groups as large as the batch are the caller's affair."""

    def unpadded(module, plan, state, window):
        hidden, cache = fixed_width._tile(module, plan, state, window, state.context_len)
        return Outputs(hidden, module.logits(hidden)), cache

    patch.setattr(fixed_width, "window_outputs", unpadded)


def take_away_attention_by_pages(patch: pytest.MonkeyPatch) -> None:
    """The reference in its place, which sums over the width of a table."""

    def by_table(q, k_pages, v_pages, page_table, context_len, visible):
        return paged_attention(q, k_pages, v_pages, page_table, context_len, visible, body=Body.REFERENCE)

    patch.setattr(page_walk, "paged_attention", by_table)


def take_away_barriers(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(jax.lax, "optimization_barrier", lambda values: values)


def take_away_exact_rounding(patch: pytest.MonkeyPatch) -> None:
    """The default mode's options."""
    patch.setattr(loop, "run_prefill_bitwise", loop.run_prefill)
    patch.setattr(loop, "run_loop_bitwise", loop.run_loop)


PARTS = [take_away_the_tile, take_away_attention_by_pages, take_away_barriers, take_away_exact_rounding]


@pytest.mark.proof
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "taken", [pytest.param(PARTS, id="all"), *(pytest.param([part], id=part.__name__[10:]) for part in PARTS)]
)
def test_on_a_cpu_the_tile_carries_the_claim(dtype, taken, monkeypatch):
    """The table of docs/decisions/0013-bitwise.md, which `-rP` prints: what changes bits when it is taken away."""
    for part in taken:
        part(monkeypatch)
    is_tiled = take_away_the_tile not in taken
    jax.clear_caches()  # of programs that were traced with the part
    try:
        alone = bits(decoded(tiny(dtype), PROMPTS[:14], AR()))
        found = bits(
            decoded(tiny(dtype, adapter=True), PROMPTS[:14], ISD(8), batch_size=7)
            if is_tiled
            else decoded(tiny(dtype, adapter=True), PROMPTS[:14], ISD(8), group_slots=16)  # the batch is 14, padded
        )
    finally:
        jax.clear_caches()  # of programs that were traced without the part
    pairs = [pair for row, wanted in zip(found, alone, strict=True) for pair in zip(row, wanted, strict=True)]
    tokens = sum(one[0] != other[0] for one, other in pairs)
    sums = sum(one[1] != other[1] for one, other in pairs)
    print(f"{dtype}: {tokens} tokens and {sums} checksums of {len(pairs)} differ")
    assert sums == 0 if is_tiled else sums > 0.5 * len(pairs)


@pytest.mark.proof
@pytest.mark.parametrize("dtype", DTYPES)
def test_four_slots_at_a_time_have_the_bits_of_one_request_among_fillers(dtype):
    """Another tile may have other bits than a tile of one slot; what counts is that they agree among themselves."""
    lm = tiny(dtype, adapter=True)
    together = bits(decoded(lm, PROMPTS[:8], ISD(4), group_slots=4))
    base = tiny(dtype)
    for index in (0, 5):
        assert bits(decoded(base, [PROMPTS[index]], AR(), group_slots=4)) == [together[index]]


@pytest.mark.proof
def test_a_stream_has_the_tokens_of_the_whole():
    lm, params = tiny("bfloat16", adapter=True), SamplingParams(max_tokens=20, temperature=0.7, seed=3)
    wanted = decoded(lm, PROMPTS[:1], ISD(4), params)[0].token_ids
    pieces = list(stream_tokens(lm, PROMPTS[0], ISD(4), params, deterministic="bitwise"))
    assert [token for piece in pieces for token in piece] == wanted
    assert 1 < len(pieces) < len(wanted)


@pytest.mark.proof
@pytest.mark.parametrize("dtype", BFLOAT16_FIRST)
def test_capacity_and_long_neighbours_change_no_bit(dtype):
    """Beside a request of 300 tokens, every page table is twice as wide."""
    lm = tiny(dtype, adapter=True)
    prompts = [random_prompts(1, 150, 11, seed=5)[0] * 150, [1, 2, 3]]
    prompts[0] = prompts[0][:150]
    params = [SamplingParams(max_tokens=40), SamplingParams(max_tokens=300)]
    together = decoded(lm, prompts, ISD(4), params, batch_size=2)
    assert bits(decoded(lm, prompts[:1], ISD(4), params[:1])) == bits(together)[:1]


@pytest.mark.proof
@pytest.mark.parametrize("dtype", BFLOAT16_FIRST)
def test_sampled_requests_are_the_same_alone_and_among_others(dtype):
    lm = tiny(dtype, adapter=True)
    params = [
        SamplingParams(max_tokens=8 + index, temperature=0.4 * (index % 3), top_k=5 * (index % 2), seed=index)
        for index in range(7)
    ]
    together = bits(decoded(lm, PROMPTS[:7], ISD(4), params, batch_size=7))
    for index in (1, 2):  # one is filtered, the other is not; the batch holds both, and greedy ones
        assert bits(decoded(lm, [PROMPTS[index]], ISD(4), [params[index]])) == [together[index]]


@pytest.mark.proof
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["triton", "tpu"])
def test_the_kernels_keep_the_bits(name, dtype):
    # As in test_kernels.py: two of the TPU interpreter's kernels at once can wait for each other forever.
    kernels = dataclasses.replace(BY_NAME[name], interpret=True, verify=Body.REFERENCE)
    prompts, params = PROMPTS[:2], SamplingParams(max_tokens=6)
    wanted = bits(decoded(tiny(dtype, kernels=kernels), prompts, AR(), params))
    found = decoded(tiny(dtype, adapter=True, kernels=kernels), prompts, ISD(3), params, batch_size=2)
    assert bits(found) == wanted


def test_a_window_that_does_not_fit_is_refused():
    lm = tiny("float32")
    with pytest.raises(ValueError, match="16 rows a request, and a window of this method has 17"):
        generate(lm, [[1]], ISD(9), GREEDY, deterministic="bitwise")
    with pytest.raises(ValueError, match="must be None or 'bitwise'"):
        inspect.unwrap(group_slots_of)("yes")


def test_the_default_mode_reports_no_checksums():
    assert generate(tiny("float32"), [[1, 2]], AR(), SamplingParams(max_tokens=2))[0].logit_checksums is None


def test_a_checksum_shows_every_change_of_one_logit_and_knows_the_order():
    row = np.random.default_rng(0).normal(size=50).astype(np.float32)
    changed = row.copy()
    changed[17] = np.nextafter(changed[17], np.float32(9))
    sums = np.asarray(checksums(jnp.asarray(np.stack([row, changed, row[::-1], row])[None])))[0]
    assert sums[0] == sums[3]
    assert len(set(sums.tolist())) == 3
