"""The quantised product on TPU, bound by the bytes of the weight.

Grid (row tiles, column tiles, D tiles), D innermost. A step multiplies one tile of rows with one tile of weight
(depth x columns bytes, converted to x's dtype in VMEM) and adds to a float32 accumulator of 4 * rows * columns bytes,
which the last step scales and writes. VMEM: two buffers each of weight, x and output tile, the accumulator and the
converted tile: about 6 MiB with the default tiles and 64 rows of bfloat16.

The weight is one of a stack, whose number is prefetched and picks the blocks: no layer is copied out of it.

Any M, D and F: rows are padded to a multiple of 16, what lies past D is masked, what lies past F is not written.
The order of summation does not depend on M.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.bodies import device_kind
from pallas_kernels.quantized_matmul.maths import finish, tile_product
from pallas_kernels.quantized_matmul.tiles import TpuTiles, tpu_tiles
from pallas_kernels.quantized_matmul.weights import QuantizedWeight, as_stack
from pallas_kernels.tpu_interpreter import interpreter

ROW_MULTIPLE = 16  # rows of one packed register of bfloat16


def quantized_matmul(
    x: Float[Array, "M D"],
    weight: QuantizedWeight,
    layer: Int[Array, ""] | None,
    *,
    tiles: TpuTiles | None,
    interpret: bool,
) -> Float[Array, "M F"]:
    """The op as its contract states it; see the package for arguments and rules."""
    weight, layer = as_stack(weight, layer)
    (num_rows, width), num_columns = x.shape, weight.values.shape[2]
    if 0 in (num_rows, width, num_columns):
        return jnp.zeros((num_rows, num_columns), x.dtype)
    tiles = tiles or tpu_tiles(device_kind(), (width, num_columns))
    rows = min(tiles.rows, pl.cdiv(num_rows, ROW_MULTIPLE) * ROW_MULTIPLE)
    # A block may be narrower than a multiple of 128 only when it is the whole axis.
    columns, depth = min(tiles.columns, num_columns), min(tiles.depth, width)
    padded_rows = pl.cdiv(num_rows, rows) * rows
    out = pl.pallas_call(
        functools.partial(_multiply, width=width),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(padded_rows // rows, pl.cdiv(num_columns, columns), pl.cdiv(width, depth)),
            in_specs=[
                pl.BlockSpec((rows, depth), lambda m, f, d, layer: (m, d)),
                pl.BlockSpec((None, depth, columns), lambda m, f, d, layer: (layer[0], d, f)),
                pl.BlockSpec((None, 1, columns), lambda m, f, d, layer: (layer[0], 0, f)),
            ],
            out_specs=pl.BlockSpec((rows, columns), lambda m, f, d, layer: (m, f)),
            scratch_shapes=[pltpu.VMEM((rows, columns), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((padded_rows, num_columns), x.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpreter(interpret),
        name="quantized_matmul",
    )(layer.reshape(1), jnp.pad(x, ((0, padded_rows - num_rows), (0, 0))), weight.values, weight.scale[:, None])
    return out[:num_rows]


def _multiply(layer_ref, x_ref, values_ref, scale_ref, out_ref, sums_ref, *, width: int) -> None:
    del layer_ref  # the blocks were picked by it
    number, depth = pl.program_id(2), x_ref.shape[1]

    @pl.when(number == 0)
    def _():
        sums_ref[...] = jnp.zeros_like(sums_ref)

    x, values = x_ref[...], values_ref[...].astype(x_ref.dtype)
    if width % depth:  # the last tiles hold anything past D, even NaN
        below = width - number * depth
        x = jnp.where(jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) < below, x, jnp.zeros_like(x))
        is_values = jax.lax.broadcasted_iota(jnp.int32, values.shape, 0) < below
        values = jnp.where(is_values, values, jnp.zeros_like(values))
    sums_ref[...] += tile_product(x, values)

    @pl.when(number == pl.num_programs(2) - 1)
    def _():
        out_ref[...] = finish(sums_ref[...], scale_ref[...], out_ref.dtype)
