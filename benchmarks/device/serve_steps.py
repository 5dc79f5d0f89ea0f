"""The server's decode step on random weights: milliseconds, and what a forward must commit for ISD to beat AR."""

import dataclasses
import statistics
import time
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.device.budget import SKIPPED, Budget
from benchmarks.device.compiling import describe
from benchmarks.device.train_steps import TINY
from idlm_jax.decoding.method import AR, ISD
from idlm_jax.decoding.sampling import SamplingParams
from idlm_jax.model.language_model import LanguageModel, from_module
from idlm_jax.model.transformer import Qwen3
from idlm_jax.qwen3_sizes import QWEN3_SIZES
from pallas_kernels.bodies import choose_kernels
from serve.config import EngineConfig
from serve.device import Device, Draws
from serve.packing import layout_of, pack_chunks, pack_windows, sampling_words
from serve.requests import Chunk, Request, Window

WARM_UP, SAMPLES, STEPS_EACH = 2, 8, 8
CHUNK = 128
# Compiling and running the programs of one stride, on a slow day.
NEEDS_S = 75.0
# Greedy tokens per forward of the repository's tiny adapter on held-out prompts, by stride and rows: README.md, and for
# rows benchmarks/results/branches/.
TRACE = {(1, None): 1.0, (2, None): 1.42, (4, None): 1.64, (8, None): 1.66, (4, 7): 1.86, (8, 15): 2.08}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeCase:
    """A decode batch.

    Attributes:
        size: released model.
        stride: 1 is AR.
        rows: where MASKs compete for them; None has one group.
        batch: requests in it.
        context: tokens behind each.
    """

    size: str
    stride: int
    rows: int | None = None
    batch: int
    context: int

    @property
    def name(self) -> str:
        rows = "" if self.rows is None else f"r{self.rows}"
        return f"{self.size}_n{self.stride}{rows}_b{self.batch}_{self.context}"

    @property
    def method(self) -> AR | ISD:
        return ISD(stride=self.stride, rows=self.rows) if self.stride > 1 else AR()


DRY = tuple(
    ServeCase(size="tiny", stride=stride, rows=rows, batch=2, context=128) for stride, rows in ((1, None), (2, 3))
)
# The most telling first; AR before what is compared with it.
CASES = tuple(
    ServeCase(size="Qwen3-8B", stride=stride, rows=rows, batch=batch, context=context)
    for batch, context in ((1, 2048), (32, 2048), (8, 2048), (64, 2048), (1, 16_384))
    for stride, rows in ((1, None), (4, None), (4, 7), (8, 15), (2, None), (8, None))
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeSpeed:
    """What one case did.

    Attributes:
        case: its name.
        median_ms: of a decode step, several in flight as in the server; None where it was not timed.
        iqr_ms: distance between the quartiles.
        break_even: tokens that a forward must commit to be as fast as AR at this batch and context.
        trace_tokens_per_s: of the whole batch, if drafts were accepted as those of the tiny adapter are.
        note: why there is no figure.
    """

    case: str
    median_ms: float | None = None
    iqr_ms: float | None = None
    break_even: float | None = None
    trace_tokens_per_s: float | None = None
    note: str = ""


def time_serving(cases: Sequence[ServeCase], budget: Budget, platform: str, *, is_dry: bool) -> list[ServeSpeed]:
    """Times one case after the other; a dry run does the same and keeps no figure."""
    results: list[ServeSpeed] = []
    ar_ms: dict[tuple[str, int, int], float] = {}
    models: dict[str, LanguageModel] = {}
    for case in cases:
        if not budget.allows(NEEDS_S):
            results.append(ServeSpeed(case=case.name, note=SKIPPED))
            continue
        try:
            if case.size not in models:
                models.clear()  # two do not fit a device together
                models[case.size] = random_model(case.size, platform)
            samples = [seconds * 1e3 for seconds in time_decode(models[case.size], case)]
        except Exception as error:  # out of memory, a kernel's refusal: the next case may still run
            results.append(ServeSpeed(case=case.name, note=describe(error)))
            continue
        if is_dry:
            results.append(ServeSpeed(case=case.name, note="dry"))
            continue
        median, quartiles = statistics.median(samples), statistics.quantiles(samples, n=4)
        key = case.size, case.batch, case.context
        if case.stride == 1:
            ar_ms[key] = median
        results.append(
            ServeSpeed(
                case=case.name,
                median_ms=median,
                iqr_ms=quartiles[2] - quartiles[0],
                break_even=median / ar_ms[key] if key in ar_ms else None,
                trace_tokens_per_s=TRACE[case.stride, case.rows] * case.batch / median * 1e3,
            )
        )
    return results


def random_model(size: str, platform: str) -> LanguageModel:
    """Small random bfloat16 weights, drawn on the device leaf by leaf."""
    config = TINY if size == "tiny" else QWEN3_SIZES[size]
    config = dataclasses.replace(
        config,
        kernels=choose_kernels("auto", platform=platform),
        param_dtype="bfloat16",
        compute_dtype="bfloat16",
        mask_token_id=config.vocab_size - 1,
    )
    graph, params = nnx.split(nnx.eval_shape(lambda: Qwen3(config, rngs=nnx.Rngs(0))))
    leaves, structure = jax.tree.flatten(params)
    drawn = []
    for number, leaf in enumerate(leaves):
        draw = jax.jit(
            lambda key, leaf=leaf: (0.02 * jax.random.normal(key, leaf.shape, jnp.float32)).astype(leaf.dtype)
        )
        drawn.append(draw(jax.random.key(number)))
    return from_module(nnx.merge(graph, jax.tree.unflatten(structure, drawn)))


def time_decode(lm: LanguageModel, case: ServeCase) -> Iterator[float]:
    """Yields seconds per step, of `STEPS_EACH` launched in a row and awaited together, for a full batch."""
    num_steps = (WARM_UP + SAMPLES) * STEPS_EACH
    end = case.context + num_steps * case.stride + 1
    size = EngineConfig.page_size
    config = EngineConfig(
        method=case.method,
        max_running=case.batch,
        max_len=end,
        num_pages=case.batch * (-(-(end + case.method.window_len) // size)) + 1,
        decode_batches=(case.batch,),
        prefill_shapes=((1, CHUNK),),
    )
    device = Device(lm, config)
    layout = layout_of(config.limits(lm.config), config.max_stop_ids, config.num_biases)
    greedy, windows = SamplingParams(max_tokens=end - case.context), []
    for slot in range(case.batch):
        request = Request([slot % 7] * case.context, greedy.max_tokens)
        pages = (config.num_pages - 1) // case.batch
        request.slot, request.pages = slot, list(range(1 + slot * pages, 1 + (slot + 1) * pages))
        # Nothing is read of what comes before the last stretch: its keys are zeros, and as many.
        chunk = Chunk(request, 0, case.context - CHUNK, CHUNK, is_last=True, restored=None)
        fixed = sampling_words(layout, greedy, case.context, request.end, ())
        np.asarray(device.prefill(pack_chunks(layout, [chunk], [fixed], (1, CHUNK))))
        windows.append(Window(request, 0, 0, []))
    words = pack_windows(layout, windows, [None] * case.batch, case.batch)
    for sample in range(WARM_UP + SAMPLES):
        start = time.perf_counter()
        for _ in range(STEPS_EACH - 1):
            device.decode(words, Draws.GREEDY)
        np.asarray(device.decode(words, Draws.GREEDY))
        if sample >= WARM_UP:
            yield (time.perf_counter() - start) / STEPS_EACH
