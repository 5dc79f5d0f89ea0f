"""What the kit knows of one op at one shape: inputs, programs, the truth, and the least work it takes."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from pallas_kernels.bodies import Body

# Takes the inputs of a case, returns a pytree of arrays; may be traced.
Program = Callable[..., Any]
MakeInputs = Callable[[int], tuple[Any, ...]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """Which bodies a platform runs.

    Attributes:
        bodies: what is checked and timed.
        is_dry: on a CPU, with tiny shapes and the Pallas body in its interpreter; no figure is published.
    """

    bodies: tuple[Body, ...]
    is_dry: bool


KERNEL_BODY = {"gpu": Body.TRITON, "tpu": Body.TPU}


def setting_of(platform: str, *, is_dry: bool) -> Setting:
    """The setting of a jax backend, or of one that a dry run pretends to be.

    Raises:
        ValueError: `platform` runs no kernel body.
    """
    if platform not in KERNEL_BODY:
        raise ValueError(f"{platform=} has no kernel body; on a machine without an accelerator add --dry")
    return Setting(bodies=(Body.REFERENCE, KERNEL_BODY[platform]), is_dry=is_dry)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tolerance:
    """How far floating outputs may be from the truth; integers must be equal.

    Attributes:
        relative: largest |out - truth| / |truth|, as Euclidean norms over a whole array.
        largest: largest max |out - truth| / max |truth|.
        reason: where the error comes from.
        mismatches: fraction of an integer array that may differ.
    """

    relative: float
    largest: float
    reason: str
    mismatches: float = 0.0


ONE_BF16_ROUNDING = Tolerance(
    relative=3e-3, largest=6e-3, reason="float32 sums, one rounding to bfloat16 (2^-9 of a value at most)"
)
TF32 = Tolerance(relative=1e-3, largest=2e-3, reason="XLA multiplies float32 in TF32 on NVIDIA unless told otherwise")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """The least an op must do, whatever its implementation.

    Attributes:
        num_bytes: bytes that must cross device memory, each input read once, each output written once.
        num_flops: floating-point operations of its matrix products.
        formula: how both were counted.
    """

    num_bytes: int
    num_flops: int
    formula: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rival:
    """What a user would run instead.

    Attributes:
        program: takes the case's inputs, or those of `make_inputs`.
        make_inputs: its own inputs, when they differ.
        note: in what it is not the same computation.
    """

    program: Program
    make_inputs: MakeInputs | None = None
    note: str = ""


def entry_per_kind(kind: str, winners: Mapping[str, str]) -> str:
    """Winners as an entry of a table keyed by kind of device: the tiles, or tiles per place."""
    if set(winners) == {""}:
        return f'"{kind}": {winners[""]},'
    body = "".join(f"    {place}: {tiles},\n" for place, tiles in winners.items())
    return f'"{kind}": {{\n{body}}},'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One op at one shape.

    Attributes:
        op: folder of the op, with a suffix where it has several programs.
        shape: name in the op's `shapes.py`.
        rank: 0 for the headline; higher ranks come later and are the first to be skipped for time.
        is_for_dry: small enough for an interpreter; a dry run takes these alone.
        is_timed: whether its speed means anything.
        make_inputs: random inputs from a seed, on the default device; never zeros, which can run faster.
        programs: name of a body -> program.
        truth: the result in float32, from the same inputs.
        tolerance: of kernel bodies.
        reference_tolerance: of the reference body under XLA; `tolerance` when None.
        work: bytes and FLOP.
        rivals: timed beside the bodies, not checked.
        torch: the same computation for `torch_rivals.py`; None for nothing comparable.
        same_bits: claims, each two programs of the case's inputs whose outputs must be bitwise equal.
        donates_first: the program consumes its first input, and its output takes that place in the next call.
        tunings: where the winner belongs in `tiles.py` -> candidate, as Python text -> program.
        table_entry: (kind of device, place -> winner) -> text for `tiles.py`.
    """

    op: str
    shape: str
    rank: int
    is_for_dry: bool = False
    is_timed: bool = True
    make_inputs: MakeInputs
    programs: Mapping[str, Program]
    truth: Program
    tolerance: Tolerance
    reference_tolerance: Tolerance | None = None
    work: Work
    rivals: Mapping[str, Rival] = dataclasses.field(default_factory=dict)
    torch: Mapping[str, Any] | None = None
    same_bits: Mapping[str, tuple[Program, Program]] = dataclasses.field(default_factory=dict)
    donates_first: bool = False
    tunings: Mapping[str, Mapping[str, Program]] = dataclasses.field(default_factory=dict)
    table_entry: Callable[[str, Mapping[str, str]], str] = entry_per_kind

    @property
    def name(self) -> str:
        return f"{self.op}/{self.shape}"

    def tolerance_of(self, program: str) -> Tolerance:
        is_reference = program == Body.REFERENCE.value and self.reference_tolerance is not None
        return self.reference_tolerance if is_reference and self.reference_tolerance else self.tolerance


def sliced(program: Program, index: slice) -> Program:
    """Some rows of all outputs; the barrier keeps XLA from computing only those."""

    def rows(*inputs: Any) -> Any:
        outputs = jax.lax.optimization_barrier(program(*inputs))
        return jax.tree.map(lambda leaf: leaf[index], outputs)

    return rows


def in_float32(program: Program) -> Program:
    """The program on float32 copies of its floating inputs, with full float32 products: the truth of a case."""

    def truth(*inputs: Any) -> Any:
        def widen(leaf: Any) -> Any:
            return leaf.astype(jax.numpy.float32) if jax.numpy.issubdtype(leaf.dtype, jax.numpy.floating) else leaf

        with jax.default_matmul_precision("highest"):
            return program(*jax.tree.map(widen, inputs))

    return truth
