"""The quantised product through Pallas' Triton backend (NVIDIA sm_80 and newer), bound by the bytes of the weight.

Grid (column tiles, row blocks). A program owns `columns` columns of up to 64 rows and walks D in steps of `depth`: it
loads depth x columns bytes of weight once, converts them to x's dtype in registers and multiplies them with each of
its groups of 16 rows. Shared memory holds `num_stages` tiles of weight and of x, num_stages * depth * (columns + 2 *
rows) bytes for bfloat16; accumulators are 4 * rows * columns bytes of registers over its warps.

Rows come in groups of 16 whatever M is, and nothing splits D. So every row is summed by the same instructions in the
same order, and its bits depend neither on M nor on its neighbours. A wider tile of rows would use other tensor-core
instructions.

The weight is one of a stack, which the program is told by number: no layer is copied out of it. An exception are stacks
of 2 to 4 GiB (the MLP of Qwen3-14B): Pallas-Triton counts bytes in 32 bits up to 2^32, and Triton reads that as signed.

Any M, D and F: edges are masked. Many more than 64 rows re-read the weight per block of 64 and are better served by a
plain product of the dequantised weight.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float, Int

from pallas_kernels.bodies import device_kind
from pallas_kernels.quantized_matmul.maths import finish, tile_product
from pallas_kernels.quantized_matmul.tiles import TritonTiles, triton_tiles
from pallas_kernels.quantized_matmul.weights import QuantizedWeight, as_stack, layer_of

# jax/_src/pallas/triton/lowering.py, `_compute_offsets_from_indices`: 64-bit offsets above this many bytes.
WIDE_OFFSETS = 2**32
GROUP_ROWS = 16  # the least a tensor core takes
MAX_GROUPS = 4


def quantized_matmul(
    x: Float[Array, "M D"],
    weight: QuantizedWeight,
    layer: Int[Array, ""] | None,
    *,
    tiles: TritonTiles | None,
    interpret: bool,
) -> Float[Array, "M F"]:
    """The op as its contract states it; see the package for arguments and rules."""
    if layer is not None and 2**31 < weight.values.size <= WIDE_OFFSETS:
        weight, layer = layer_of(weight, layer), None
    weight, layer = as_stack(weight, layer)
    (num_rows, width), num_columns = x.shape, weight.values.shape[2]
    if 0 in (num_rows, width, num_columns):
        return jnp.zeros((num_rows, num_columns), x.dtype)
    tiles = tiles or triton_tiles(device_kind(), (width, num_columns))
    columns = min(tiles.columns, max(16, pl.next_power_of_2(num_columns)))
    depth = min(tiles.depth, max(16, pl.next_power_of_2(width)))
    num_groups = min(MAX_GROUPS, pl.cdiv(num_rows, GROUP_ROWS))
    block_rows = num_groups * GROUP_ROWS
    padded_rows = pl.cdiv(num_rows, block_rows) * block_rows
    out = pl.pallas_call(
        functools.partial(_multiply, num_groups=num_groups, columns=columns, depth=depth),
        grid=(pl.cdiv(num_columns, columns), padded_rows // block_rows),
        out_shape=jax.ShapeDtypeStruct((padded_rows, num_columns), x.dtype),
        compiler_params=pltriton.CompilerParams(num_warps=tiles.num_warps, num_stages=tiles.num_stages),
        interpret=interpret,
        name="quantized_matmul",
    )(layer.reshape(1), jnp.pad(x, ((0, padded_rows - num_rows), (0, 0))), weight.values, weight.scale)
    return out[:num_rows]


def _multiply(layer_ref, x_ref, values_ref, scale_ref, out_ref, *, num_groups: int, columns: int, depth: int) -> None:
    _, width, num_columns = values_ref.shape
    layer = layer_ref[0]
    first_column = pl.program_id(0) * columns
    first_row = pl.program_id(1) * num_groups * GROUP_ROWS
    own_columns = pl.ds(first_column, columns)
    groups = [pl.ds(first_row + group * GROUP_ROWS, GROUP_ROWS) for group in range(num_groups)]
    is_column = first_column + jax.lax.broadcasted_iota(jnp.int32, (1, columns), 1) < num_columns
    has_ragged_columns, has_ragged_depth = num_columns % columns != 0, width % depth != 0

    def step(number: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        own_depth = pl.ds(number * depth, depth)
        below = width - number * depth
        is_x = is_values = None
        if has_ragged_depth:
            is_x = jax.lax.broadcasted_iota(jnp.int32, (GROUP_ROWS, depth), 1) < below
            is_values = jax.lax.broadcasted_iota(jnp.int32, (depth, columns), 0) < below
        if has_ragged_columns:  # for memory's sake: what lies past F reaches no column that is stored
            in_columns = jnp.broadcast_to(is_column, (depth, columns))
            is_values = in_columns if is_values is None else is_values & in_columns
        values = _load(values_ref.at[layer, own_depth, own_columns], is_values)
        tiles = (_load(x_ref.at[rows, own_depth], is_x) for rows in groups)
        return tuple(total + tile_product(x, values) for total, x in zip(sums, tiles, strict=True))

    zeros = (jnp.zeros((GROUP_ROWS, columns), jnp.float32),) * num_groups
    sums = jax.lax.fori_loop(0, pl.cdiv(width, depth), step, zeros)
    scale = pltriton.load(scale_ref.at[layer, own_columns], mask=is_column.reshape(columns), other=0.0)
    out_mask = jnp.broadcast_to(is_column, (GROUP_ROWS, columns)) if has_ragged_columns else None
    for rows, total in zip(groups, sums, strict=True):
        out = finish(total, scale.reshape(1, columns), out_ref.dtype)
        pltriton.store(out_ref.at[rows, own_columns], out, mask=out_mask)


def _load(ref, mask: Array | None) -> Array:
    """Zeros where the mask is off: it is padding, and multiplies as nothing."""
    if mask is None:
        return pltriton.load(ref)
    return pltriton.load(ref, mask=mask, other=jnp.zeros((), ref.dtype))
