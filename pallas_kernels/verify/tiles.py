"""Tile sizes of the vocabulary kernels, per kind of device."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class TritonTiles:
    """Tiles of the Triton body.

    Attributes:
        vocab: ids per program, a power of two of at least 128. Part of the order of summation.
        num_warps: warps per program.
    """

    vocab: int = 4096
    num_warps: int = 4

    def __post_init__(self) -> None:
        if self.vocab < 128 or self.vocab & (self.vocab - 1):
            raise ValueError(f"vocab={self.vocab} must be a power of two of at least 128")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TpuTiles:
    """Tiles of the TPU body.

    Attributes:
        chunk: ids per step of the loop over a resident row, a multiple of 128. Part of the order of summation.
        draw: ids per grid step of a draw, a multiple of 128.
    """

    chunk: int = 1024
    draw: int = 2048

    def __post_init__(self) -> None:
        for name in ("chunk", "draw"):
            size = getattr(self, name)
            if size < 128 or size % 128:
                raise ValueError(f"{name}={size} must be a multiple of 128")


# Measured winners by device kind. Kinds that are not listed take the defaults above, which were chosen by reasoning and
# not measured. On GPU 4,096 ids make 38 programs of a row of Qwen3's 151,936, so the four anchors of one request at
# stride 4 already occupy an H200's 132 multiprocessors, and are 32 float32 registers of a thread. On TPU 1,024 ids of
# eight rows are 8 of 64 vector registers, of which a step keeps several values; a draw takes twice as many to have
# fewer grid steps.
TRITON: dict[str, TritonTiles] = {}
TPU: dict[str, TpuTiles] = {}


def triton_tiles(kind: str) -> TritonTiles:
    """Measured tiles of a kind of device, or tiles chosen by reasoning."""
    return TRITON.get(kind, TritonTiles())


def tpu_tiles(kind: str) -> TpuTiles:
    """Measured tiles of a kind of device, or tiles chosen by reasoning."""
    return TPU.get(kind, TpuTiles())
