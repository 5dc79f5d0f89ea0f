"""Tile sizes of the paged attention kernels, per kind of device."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class TritonTiles:
    """Tiles of the Triton body.

    Attributes:
        rows: most query rows per program, a power of two of at least 16; fewer where there are fewer.
        keys: key positions per step of the loop, a power of two of at least 16.
        split: key positions per program, a multiple of `keys`. Splits lie at absolute positions, so a result does not
            depend on the batch or on how long other requests are. It fixes the order of summation: outputs of
            different `split` (or `keys`) differ in the last bits.
        num_warps: warps per program.
        num_stages: loads in flight.
    """

    rows: int = 64
    keys: int = 64
    split: int = 1024
    num_warps: int = 4
    num_stages: int = 3

    def __post_init__(self) -> None:
        for name in ("rows", "keys"):
            size = getattr(self, name)
            if size < 16 or size & (size - 1):
                raise ValueError(f"{name}={size} must be a power of two of at least 16")
        if self.split < self.keys or self.split % self.keys:
            raise ValueError(f"split={self.split} must be a multiple of keys={self.keys}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TpuTiles:
    """Tiles of the TPU body.

    Attributes:
        rows: most query rows per grid step, a multiple of 16.
        pages_per_step: pages that one grid step fetches and attends to; amortises the fixed cost of a step.
    """

    rows: int = 64
    pages_per_step: int = 4

    def __post_init__(self) -> None:
        if self.rows < 16 or self.rows % 16:
            raise ValueError(f"rows={self.rows} must be a multiple of 16")
        if self.pages_per_step < 1:
            raise ValueError(f"pages_per_step={self.pages_per_step} must be at least 1")


# Winners of `benchmarks/device/run.sh tune paged_attention`, by device kind. Kinds that are not listed take the
# defaults above, which were chosen by reasoning and not measured: 1,024 positions make 128 programs of a batch of one
# at 16k context with 8 key heads, about one per multiprocessor of an H200.
TRITON: dict[str, TritonTiles] = {}
TPU: dict[str, TpuTiles] = {}
