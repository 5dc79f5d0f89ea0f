"""R-ISD against AR on the tiny model and this device: how many tokens and logit checksums differ."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import idlm_jax
from benchmarks.bit_identity import Mode, cuts, differences
from benchmarks.device.budget import SKIPPED, Budget
from benchmarks.device.compiling import describe
from idlm_jax.config import DType
from idlm_jax.decoding.generate import Completion
from idlm_jax.decoding.method import AR, ISD
from idlm_jax.model.language_model import LanguageModel

ROOT = Path(__file__).parents[2]
MODEL, ADAPTER = ROOT / "assets" / "tiny-qwen3-py", ROOT / "assets" / "tiny-qwen3-py-isd"
# All cases see one portion before any sees the next. 224 = 32 * 7: whole batches of every size.
PORTION, NUM_PORTIONS, MAX_TOKENS = 224, 5, 8
# A portion of one case and of what it is compared with, on a slow day: for the first time, and with all compiled.
COMPILES_S, RUNS_S = 75.0, 25.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExactCase:
    """Completions that must be those of AR on the base model, one prompt at a time.

    Attributes:
        dtype: of weights and products.
        mode: of `generate(deterministic=)`.
        stride: 1 is AR of the base model itself, which shows what the batch does.
        batch: prompts at a time.
    """

    dtype: DType
    mode: Mode
    stride: int
    batch: int

    @property
    def name(self) -> str:
        return f"{self.dtype}_{self.mode or 'default'}_n{self.stride}_b{self.batch}"


BOTH: tuple[DType, ...] = ("bfloat16", "float32")
MODES: tuple[Mode, ...] = ("bitwise", None)
# The most telling first: R-ISD at every batch, what the batch alone does to AR, other strides.
_SIZES: tuple[tuple[Mode, int, int], ...] = (
    *((mode, 4, batch) for mode in MODES for batch in (1, 7, 32)),
    *((mode, 1, batch) for mode in MODES for batch in (7, 32)),
    ("bitwise", 8, 7),
    ("bitwise", 2, 7),
)
CASES = tuple(
    ExactCase(dtype=dtype, mode=mode, stride=stride, batch=batch) for mode, stride, batch in _SIZES for dtype in BOTH
)
DRY = tuple(ExactCase(dtype="bfloat16", mode=mode, stride=4, batch=2) for mode in MODES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExactLine:
    """What is known of one case.

    Attributes:
        case: its name.
        portions: of the prompts, compared so far.
        prompts: in them.
        tokens: of their completions.
        differing_tokens: places at which another token stands than AR's.
        differing_checksums: places with other logits behind them; None in the default mode, which reports none.
        differing_prompts: with any differing token.
        verified: drafts that decided a token.
        accepted: how many of those were accepted.
        note: why there is no more.
    """

    case: str
    portions: int = 0
    prompts: int = 0
    tokens: int = 0
    differing_tokens: int = 0
    differing_checksums: int | None = None
    differing_prompts: int = 0
    verified: int = 0
    accepted: int = 0
    note: str = ""

    @property
    def has_failed(self) -> bool:
        """Whether the mode that promises the bits has not kept them, or anything has raised."""
        is_promised = self.differing_checksums is not None
        differs = bool(self.differing_tokens or self.differing_checksums)
        return (is_promised and differs) or self.note not in ("", SKIPPED)

    def plus(self, found: Sequence[Completion], wanted: Sequence[Completion]) -> "ExactLine":
        """The line with one portion more."""
        new = differences(found, wanted)
        sums = new.pop("differing_checksums")
        if sums is not None:
            sums += self.differing_checksums or 0
        counts = {name: getattr(self, name) + count for name, count in new.items()}
        return dataclasses.replace(
            self,
            portions=self.portions + 1,
            prompts=self.prompts + len(found),
            differing_checksums=sums,
            verified=self.verified + sum(sum(each.verified_by_depth) for each in found),
            accepted=self.accepted + sum(sum(each.accepted_by_depth) for each in found),
            note="",
            **counts,
        )


def compare(
    cases: Sequence[ExactCase], before: Mapping[str, ExactLine], budget: Budget, *, is_dry: bool
) -> Iterator[dict[str, ExactLine]]:
    """Yields the lines after each portion of each case; what no longer fits the time says so.

    Args:
        cases: to compare, the most telling first.
        before: lines of an earlier run on the same device, by case: their portions are not run again.
        budget: of the whole run.
        is_dry: one portion of two prompts.
    """
    lines = {case.name: before.get(case.name, ExactLine(case=case.name)) for case in cases}
    models = Models()
    portion, num_portions = (2, 1) if is_dry else (PORTION, NUM_PORTIONS)
    compiled: set[ExactCase] = set()
    for number in range(num_portions):
        wanted: dict[tuple[DType, Mode], list[Completion]] = {}
        for case in cases:
            line = lines[case.name]
            if line.portions > number or line.note not in ("", SKIPPED):
                continue
            if not budget.allows(RUNS_S if case in compiled else COMPILES_S):
                lines[case.name] = dataclasses.replace(line, note=SKIPPED)
                continue
            try:
                prompts = models.prompts(portion * num_portions)[portion * number : portion * (number + 1)]
                alone = dataclasses.replace(case, stride=1, batch=1)
                if (case.dtype, case.mode) not in wanted:
                    wanted[case.dtype, case.mode] = models.complete(alone, prompts)
                lines[case.name] = line.plus(models.complete(case, prompts), wanted[case.dtype, case.mode])
                compiled.add(case)
            except Exception as error:  # a kernel's refusal, say: the next case may still run
                lines[case.name] = dataclasses.replace(line, note=describe(error))
            yield lines
    yield lines


class Models:
    """The tiny model in every dtype, with and without its adapter, loaded when first used."""

    def __init__(self) -> None:
        self._loaded: dict[tuple[DType, Literal["base", "adapted"]], LanguageModel] = {}

    def prompts(self, num_prompts: int) -> list[list[int]]:
        """Stretches of this repository's Python: the model has read the standard library and nothing else."""
        files = sorted(path for folder in ("idlm_jax", "pallas_kernels") for path in (ROOT / folder).rglob("*.py"))
        return cuts([path.read_text() for path in files], self._get("bfloat16", "base").tokenizer, num_prompts)

    def complete(self, case: ExactCase, prompts: Sequence[list[int]]) -> list[Completion]:
        """The completions of a case."""
        lm = self._get(case.dtype, "base" if case.stride == 1 else "adapted")
        method = AR() if case.stride == 1 else ISD(stride=case.stride)
        params = idlm_jax.SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True)
        return idlm_jax.generate(lm, prompts, method, params, batch_size=case.batch, deterministic=case.mode)

    def _get(self, dtype: DType, kind: Literal["base", "adapted"]) -> LanguageModel:
        if (dtype, kind) not in self._loaded:
            adapter = ADAPTER if kind == "adapted" else None
            self._loaded[dtype, kind] = idlm_jax.load(str(MODEL), dtype=dtype, adapter=adapter)
        return self._loaded[dtype, kind]
