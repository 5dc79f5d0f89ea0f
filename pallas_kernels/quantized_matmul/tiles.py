"""Tile sizes of the quantised product, per kind of device and [D, F]; M never chooses, so bits do not depend on it."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class TritonTiles:
    """Tiles of the Triton body.

    Attributes:
        columns: output columns per program, a power of two of at least 16.
        depth: elements of D per step of the loop, a power of two of at least 16. Part of the order of summation.
        num_warps: warps per program.
        num_stages: loads in flight.
    """

    columns: int
    depth: int = 128
    num_warps: int = 4
    num_stages: int = 4

    def __post_init__(self) -> None:
        for name in ("columns", "depth"):
            size = getattr(self, name)
            if size < 16 or size & (size - 1):
                raise ValueError(f"{name}={size} must be a power of two of at least 16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TpuTiles:
    """Tiles of the TPU body.

    Attributes:
        rows: most rows per grid step, a multiple of 16.
        columns: output columns per grid step, a multiple of 128.
        depth: elements of D per grid step, a multiple of 128. Part of the order of summation.
    """

    rows: int = 128
    columns: int = 1024
    depth: int = 1024

    def __post_init__(self) -> None:
        for name, multiple in (("rows", 16), ("columns", 128), ("depth", 128)):
            size = getattr(self, name)
            if size < multiple or size % multiple:
                raise ValueError(f"{name}={size} must be a multiple of {multiple}")


# Winners of `benchmarks/device/run.sh tune quantized_matmul`: device kind -> (D, F) -> tiles. None are measured yet.
TRITON: dict[str, dict[tuple[int, int], TritonTiles]] = {}
TPU: dict[str, dict[tuple[int, int], TpuTiles]] = {}


def triton_tiles(kind: str, shape: tuple[int, int]) -> TritonTiles:
    """Measured tiles of a weight of `shape`, or tiles chosen by reasoning.

    The latter: the widest columns that still make 256 programs, about two for each of an H200's 132 multiprocessors,
    and never under 32, one sector of memory per row of the weight. Four stages of 128 x 32 bytes per program and two
    programs per multiprocessor keep 32 KiB in flight on each, which covers 4.8 TB/s at a latency of 0.9 us.
    """
    measured = TRITON.get(kind, {}).get(shape)
    if measured is not None:
        return measured
    columns = next((columns for columns in (128, 64) if shape[1] >= 256 * columns), 32)
    return TritonTiles(columns=columns)


def tpu_tiles(kind: str, shape: tuple[int, int]) -> TpuTiles:
    """Measured tiles of a weight of `shape`, or tiles chosen by reasoning: 1 MiB of weight per grid step."""
    return TPU.get(kind, {}).get(shape, TpuTiles())
