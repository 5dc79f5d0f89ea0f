"""Row statistics, and one draft plus verification, against the reference under XLA."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.device.case import Case, Program, Setting, Tolerance, Work, sliced
from pallas_kernels.bodies import Body
from pallas_kernels.verify import Sampling, TpuTiles, TritonTiles, draft, row_stats, verify
from pallas_kernels.verify.shapes import SHAPES, TINY, Shape

LAST = slice(-1, None)
HEADLINE = ("qwen3_stride4_b1", "qwen3_stride8_b64")
STATS_FORMULA = "every logit once; no matrix product"
STEP_FORMULA = (
    "every logit of anchors and drafts once, drafted rows again for the draw, one row of p and q per request again"
)
STATS = Tolerance(
    relative=2e-5,
    largest=2e-4,
    reason="float32 sums of up to 151,936 terms in another order; thresholds are exact logits",
)
STEP = Tolerance(
    relative=1e-4,
    largest=1e-3,
    mismatches=0.01,
    reason="as the statistics; a token may differ where two candidates are within rounding, or a nucleus within 1e-6",
)


def cases(setting: Setting) -> list[Case]:
    """Statistics with and without a filter, and whole steps, at every shape."""
    shapes = {"tiny": TINY["tiny"]} if setting.is_dry else {**SHAPES, **TINY}
    return [
        make(setting, name, shape, filtered)
        for name, shape in shapes.items()
        for filtered in (False, True)
        if filtered or not setting.is_dry
        for make in (_stats, _step)
    ]


def _logits(key: jax.Array, shape: tuple[int, ...], dtype: str) -> jax.Array:
    return (3 * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


def _sampling(shape: Shape, *, filtered: bool) -> Sampling:
    requests = jnp.arange(shape.requests)
    keep = (jnp.where(requests % 2 == 0, 50, 0), jnp.where(requests % 3 == 0, 0.9, 1.0))
    none = (jnp.zeros_like(requests), jnp.ones((shape.requests,)))
    top_k, top_p = keep if filtered else none
    # Every fourth request is greedy.
    temperature = jnp.where(requests % 4 == 3, 0.0, 0.8).astype(jnp.float32)
    return Sampling(temperature, top_k.astype(jnp.int32), top_p.astype(jnp.float32), requests.astype(jnp.uint32))


def _rank(name: str, *, filtered: bool) -> int:
    return 3 if name.startswith("tiny") else 0 if name in HEADLINE and not filtered else 1


def _stats(setting: Setting, name: str, shape: Shape, filtered: bool) -> Case:
    rows = shape.requests * (shape.num_masks + 1)

    def make_inputs(seed: int) -> tuple[Any, ...]:
        sampling = _sampling(shape, filtered=filtered)
        per_row = tuple(jnp.repeat(values, shape.num_masks + 1) for values in sampling[:3])
        return (_logits(jax.random.key(seed), (rows, shape.vocab_size), shape.dtype), *per_row)

    def of(body: Body, tiles: TritonTiles | TpuTiles | None = None) -> Program:
        return functools.partial(row_stats, filtered=filtered, body=body, interpret=setting.is_dry, tiles=tiles)

    kernels = [body for body in setting.bodies if body is not Body.REFERENCE]
    return Case(
        op="verify.row_stats",
        shape=name + "_filtered" * filtered,
        rank=_rank(name, filtered=filtered),
        is_for_dry=setting.is_dry,
        is_timed=not name.startswith("tiny"),
        make_inputs=make_inputs,
        programs={body.value: of(body) for body in setting.bodies},
        truth=of(Body.REFERENCE),
        tolerance=STATS,
        work=Work(
            num_bytes=rows * shape.vocab_size * jnp.dtype(shape.dtype).itemsize, num_flops=0, formula=STATS_FORMULA
        ),
        same_bits={
            f"{body.value}: a row alone has the bits it has in its batch": (
                sliced(of(body), LAST),
                lambda *inputs, body=body: of(body)(*(array[-1:] for array in inputs)),
            )
            for body in kernels
            if setting.is_dry or name == HEADLINE[1]
        },
        tunings=_tunings(setting, of) if setting.is_dry or name in HEADLINE else {},
    )


def _tunings(setting: Setting, of) -> dict[str, dict[str, Program]]:
    candidates: list[tuple[Body, TritonTiles | TpuTiles]] = []
    if setting.is_dry and Body.TRITON in setting.bodies:
        candidates = [(Body.TRITON, TritonTiles(vocab=vocab)) for vocab in (128, 256)]
    elif Body.TRITON in setting.bodies:
        candidates = [
            (Body.TRITON, TritonTiles(vocab=vocab, num_warps=warps))
            for vocab in (1024, 2048, 4096, 8192)
            for warps in (4, 8)
        ]
    elif Body.TPU in setting.bodies:
        candidates = [(Body.TPU, TpuTiles(chunk=chunk)) for chunk in (1024, 2048, 4096)]
    return {"": {repr(tiles): of(body, tiles) for body, tiles in candidates}}


def _step(setting: Setting, name: str, shape: Shape, filtered: bool) -> Case:
    """Drafts of this step, then the check of the drafts as if the anchors of the next forward were there."""
    anchors = (shape.requests, shape.num_masks + 1, shape.vocab_size)
    drafts = (shape.requests, shape.num_masks, shape.vocab_size)

    def make_inputs(seed: int) -> tuple[Any, ...]:
        keys = jax.random.split(jax.random.key(seed))
        anchor_logits = _logits(keys[0], anchors, shape.dtype)
        # Drafts that agree with the anchors more often than not, or every request would stop at its first.
        apart = 0.3 * jax.random.normal(keys[1], drafts, jnp.float32)
        proposal_logits = (anchor_logits[:, :-1].astype(jnp.float32) + apart).astype(shape.dtype)
        num_proposals = jnp.full((shape.requests,), shape.num_masks, jnp.int32)
        positions = jnp.arange(shape.requests, dtype=jnp.int32) * 17
        return anchor_logits, proposal_logits, num_proposals, positions, _sampling(shape, filtered=filtered)

    def of(body: Body) -> Program:
        options: dict[str, Any] = {"filtered": filtered, "body": body, "interpret": setting.is_dry}

        def step(anchor_logits, proposal_logits, num_proposals, positions, sampling):
            proposals, stats = draft(proposal_logits, sampling, positions, argmax=False, **options)
            verdict = verify(
                anchor_logits, proposals, proposal_logits, stats, num_proposals, sampling, positions, **options
            )
            return proposals, verdict

        return step

    rows = shape.requests * (3 * shape.num_masks + 1 + 1 + (shape.num_masks > 0))
    return Case(
        op="verify",
        shape=name + "_filtered" * filtered,
        rank=_rank(name, filtered=filtered),
        is_for_dry=setting.is_dry,
        is_timed=not name.startswith("tiny"),
        make_inputs=make_inputs,
        programs={body.value: of(body) for body in setting.bodies},
        truth=of(Body.REFERENCE),
        tolerance=STEP,
        work=Work(
            num_bytes=rows * shape.vocab_size * jnp.dtype(shape.dtype).itemsize, num_flops=0, formula=STEP_FORMULA
        ),
    )
