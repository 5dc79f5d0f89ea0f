"""How many queries and keys a program of each kernel works on, per kind of device.

Entries named "default" were chosen by reasoning, not measured: see their comments.
"""

import dataclasses

from pallas_kernels.bodies import Body

# Below this, Triton does not lower a matrix product.
SMALLEST = 16
# Row statistics lie along the lanes of a TPU, so that its tiles come in multiples of these.
LANES = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class PassTiles:
    """One kernel's tiles; all of its sizes are powers of two.

    Attributes:
        rows: queries.
        keys: keys and values.
        num_warps: of a Triton program; not read elsewhere.
        num_stages: tiles in flight in a Triton loop; not read elsewhere.
    """

    rows: int
    keys: int
    num_warps: int = 4
    num_stages: int = 2

    def __post_init__(self) -> None:
        for name, size in (("rows", self.rows), ("keys", self.keys), ("num_warps", self.num_warps)):
            if size < 1 or size & (size - 1):
                raise ValueError(f"{name}={size} must be a power of two")
        if min(self.rows, self.keys) < SMALLEST:
            raise ValueError(f"{self.rows=} and {self.keys=} must be at least {SMALLEST}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """Tiles of the three passes.

    Attributes:
        forward: a program holds a tile of queries of either stream and loops over keys.
        query_grads: the same.
        key_grads: a program holds a tile of keys and loops over queries.
    """

    forward: PassTiles
    query_grads: PassTiles
    key_grads: PassTiles

    @property
    def largest(self) -> int:
        """What a length is padded to a multiple of: every tile divides it."""
        return max(max(each.rows, each.keys) for each in (self.forward, self.query_grads, self.key_grads))

    def at_most(self, size: int) -> "Tiles":
        """The same with no tile above `size`: a short input is not padded to a long tile."""

        def shrink(each: PassTiles) -> PassTiles:
            return dataclasses.replace(each, rows=min(each.rows, size), keys=min(each.keys, size))

        return Tiles(
            forward=shrink(self.forward), query_grads=shrink(self.query_grads), key_grads=shrink(self.key_grads)
        )


# Keyed by kind of device and bytes per element.
TRITON: dict[tuple[str, int], Tiles] = {
    # Not measured. 64 rows of two streams hold 64 KiB of float32 sums at H = 128, what one warpgroup has in registers
    # beside the scores; 128 rows on two warpgroups load every K/V tile half as often. Chosen among tiles for which
    # ptxas (sm_90a, CUDA 13) spills at most 28 bytes; 64 x 64 on 4 warps spills 256 in the gradients of keys.
    ("default", 2): Tiles(
        forward=PassTiles(rows=128, keys=64, num_warps=8, num_stages=2),
        query_grads=PassTiles(rows=128, keys=64, num_warps=8, num_stages=2),
        key_grads=PassTiles(rows=32, keys=64, num_warps=4, num_stages=3),
    ),
    # For parity runs, not for speed: float32 products without tensor cores.
    ("default", 4): Tiles(
        forward=PassTiles(rows=32, keys=32, num_warps=4, num_stages=1),
        query_grads=PassTiles(rows=32, keys=32, num_warps=4, num_stages=1),
        key_grads=PassTiles(rows=32, keys=32, num_warps=4, num_stages=1),
    ),
}
TPU: dict[tuple[str, int], Tiles] = {
    # The float32 scores of a tile are 1 MiB, and a grid step's matrix products outlast its 0.3 us of overhead.
    ("default", 2): Tiles(
        forward=PassTiles(rows=512, keys=512),
        query_grads=PassTiles(rows=512, keys=512),
        key_grads=PassTiles(rows=512, keys=512),
    ),
    ("default", 4): Tiles(
        forward=PassTiles(rows=256, keys=256),
        query_grads=PassTiles(rows=256, keys=256),
        key_grads=PassTiles(rows=256, keys=256),
    ),
}


def for_length(body: Body, kind: str, itemsize: int, length: int) -> Tiles:
    """The measured tiles of this kind of device, else the default ones; none much longer than the input."""
    table, smallest = (TRITON, SMALLEST) if body is Body.TRITON else (TPU, LANES)
    tiles = table.get((kind, itemsize), table["default", itemsize])
    return tiles.at_most(max(smallest, 1 << (length - 1).bit_length()))
