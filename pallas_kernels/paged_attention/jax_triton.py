"""Paged attention in the Triton language, called through jax-triton (NVIDIA sm_80 and newer): the twin of `triton.py`.

The same launches, tiles and order of operations as the Pallas body, which explains them; the arithmetic is that of
`maths.py`, spelled in Triton's language. Triton compiles the kernels in this process, XLA only launches them.

`attend`: grid (B * K, row tiles, splits). A program holds `tile_rows` query rows of one key head (q, mixed: 2 *
tile_rows * H elements in registers) and walks the keys of its split; each key and value tile (tile_keys * H elements)
is staged `num_stages` deep in shared memory.
`combine`: grid (B * K, row tiles). Adds the partial results of the splits that hold a key, first to last.
`write`: grid (B, T). Copies one token's keys and values of all heads into its page, in place.

Nothing is atomic and every order of summation is fixed by absolute position. No gradients, no vmap.

Refuses: head sizes other than powers of two from 16, page sizes other than powers of two from 16 (a tile of keys lies
in one page, and a matrix product takes 16 of them), the interpreter of Pallas, and to run without jax-triton.
"""

import functools
import importlib
import math
import typing
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.bodies import Body, device_kind, refuse
from pallas_kernels.paged_attention.checks import check_triton_pages
from pallas_kernels.paged_attention.maths import LOWEST
from pallas_kernels.paged_attention.rows import pack_limits
from pallas_kernels.paged_attention.tiles import TRITON, TritonTiles

BODIES = tuple(Body)


def check_supported(k_pages: Float[Array, "P K page H"], interpret: bool) -> None:
    """Raises NotImplementedError for what these kernels cannot address or run."""
    check_triton_pages(k_pages, Body.JAX_TRITON)
    if interpret:
        raise _refusal("has no interpreter that JAX can call (TRITON_INTERPRET=1 takes torch tensors)")


def paged_attention(
    q: Float[Array, "B T N H"],
    k_pages: Float[Array, "P K page H"],
    v_pages: Float[Array, "P K page H"],
    page_table: Int[Array, "B pages"],
    context_len: Int[Array, " B"],
    visible: Bool[Array, "B T T"] | None,
    *,
    tiles: TritonTiles | None,
    interpret: bool,
    compute_capability: int | None = None,
) -> Float[Array, "B T N H"]:
    """The op as its contract states it; see the package for arguments and rules.

    `compute_capability` is 90 for sm_90, for compiling without a device; that of the device by default.
    """
    check_supported(k_pages, interpret)
    tiles = tiles or TRITON.get(device_kind(), TritonTiles())
    batch, tokens, heads, head_dim = q.shape
    kv_heads, page_size = k_pages.shape[1:3]
    groups = heads // kv_heads
    num_rows = tokens * groups
    tile_rows = min(tiles.rows, max(16, 1 << (num_rows - 1).bit_length()))
    padded_rows = num_rows + -num_rows % tile_rows
    num_splits = -(-page_table.shape[1] * page_size // tiles.split)
    pairs = batch * kv_heads
    geometry = dict(
        tokens=tokens, groups=groups, kv_heads=kv_heads, head_dim=head_dim, split=tiles.split, lowest=LOWEST
    )
    one_per_row = jax.ShapeDtypeStruct((pairs, num_splits, padded_rows), jnp.float32)
    partials = launch(
        "paged_attention",
        kernels().attend,
        (context_len, page_table, *pack_limits(visible, batch, tokens), q, k_pages, v_pages),
        outputs=(one_per_row, one_per_row, jax.ShapeDtypeStruct((*one_per_row.shape, head_dim), jnp.float32)),
        grid=(pairs, padded_rows // tile_rows, num_splits),
        constants=geometry
        | dict(
            pages_per_request=page_table.shape[1],
            page_size=page_size,
            tile_rows=tile_rows,
            tile_keys=min(tiles.keys, page_size),  # a tile lies in one page
            scale=math.log2(math.e) / math.sqrt(head_dim),
        ),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        compute_capability=compute_capability,
    )
    # Rows of a request are independent here, so narrower tiles only add programs: 16 rows keep a batch of one busy.
    combine_rows = min(tile_rows, 16)
    (mixed,) = launch(
        "paged_attention_combine",
        kernels().combine,
        (context_len, *partials),
        outputs=(jax.ShapeDtypeStruct(q.shape, q.dtype),),
        grid=(pairs, padded_rows // combine_rows),
        constants=geometry | dict(num_splits=num_splits, padded_rows=padded_rows, tile_rows=combine_rows),
        num_warps=2,
        num_stages=2,
        compute_capability=compute_capability,
    )
    return mixed


def write_pages(
    pages: tuple[Float[Array, "P K page H"], Float[Array, "P K page H"]],
    new: tuple[Float[Array, "B T K H"], Float[Array, "B T K H"]],
    page_table: Int[Array, "B pages"],
    start: Int[Array, " B"],
    *,
    interpret: bool,
    compute_capability: int | None = None,
) -> tuple[Float[Array, "P K page H"], Float[Array, "P K page H"]]:
    """Writes keys and values in one launch; `pages` are aliased to the result."""
    check_supported(pages[0], interpret)
    batch, tokens, kv_heads, head_dim = new[0].shape
    k_pages, v_pages = launch(
        "write_pages",
        kernels().write,
        (start, page_table, *new),
        in_place=pages,
        grid=(batch, tokens),
        constants=dict(
            tokens=tokens,
            kv_heads=kv_heads,
            head_dim=head_dim,
            pages_per_request=page_table.shape[1],
            page_size=pages[0].shape[2],
        ),
        num_warps=4,
        num_stages=1,
        compute_capability=compute_capability,
    )
    return k_pages, v_pages


class Kernels(NamedTuple):
    """Triton's compilable functions."""

    attend: Any
    combine: Any
    write: Any


@functools.cache
def kernels() -> Kernels:
    """The kernels, defined on the first call: only then Triton has to be installed.

    `launch` states the order of their parameters. Offsets into pools and partial results are 64 bits wide.
    """
    triton, tl = _package("triton"), _package("triton.language")

    # Triton compiles their source text: hints on parameters are Triton's, and nothing may be wrapped around them.

    @triton.jit
    @typing.no_type_check
    def attend(
        context_len_ptr,
        page_table_ptr,
        last_row_ptr,
        low_bits_ptr,
        high_bits_ptr,
        q_ptr,
        k_ptr,
        v_ptr,
        top_ptr,
        total_ptr,
        mixed_ptr,
        tokens: tl.constexpr,
        groups: tl.constexpr,
        kv_heads: tl.constexpr,
        head_dim: tl.constexpr,
        split: tl.constexpr,
        lowest: tl.constexpr,
        pages_per_request: tl.constexpr,
        page_size: tl.constexpr,
        tile_rows: tl.constexpr,
        tile_keys: tl.constexpr,
        scale: tl.constexpr,
    ):
        request = tl.program_id(0) // kv_heads
        head = tl.program_id(0) % kv_heads
        first_key = tl.program_id(2) * split
        context_len = tl.load(context_len_ptr + request)
        # New tokens that some row of this tile may see, as `rows.num_new_seen`.
        seen = tl.minimum(((tl.program_id(1) + 1) * tile_rows + groups - 1) // groups, tokens)
        end = tl.minimum(context_len + seen, first_key + split)
        if first_key < end:
            # Rows past the last repeat it: they load valid memory, compute the same bits and store them once more.
            row = tl.minimum(tl.program_id(1) * tile_rows + tl.arange(0, tile_rows), tokens * groups - 1)
            token = request * tokens + row // groups
            columns = tl.arange(0, head_dim)[None, :]
            q_row = ((token * kv_heads + head) * groups + row % groups).to(tl.int64)
            q = tl.load(q_ptr + q_row[:, None] * head_dim + columns)
            last_row = tl.load(last_row_ptr + token)[:, None]
            low_bits = tl.load(low_bits_ptr + token)[:, None]
            high_bits = tl.load(high_bits_ptr + token)[:, None]
            top = tl.full((tile_rows, 1), lowest, tl.float32)
            total = tl.zeros((tile_rows, 1), tl.float32)
            mixed = tl.zeros((tile_rows, head_dim), tl.float32)
            for number in range((end - first_key + tile_keys - 1) // tile_keys):
                first = first_key + number * tile_keys
                keys = first + tl.arange(0, tile_keys)
                page = tl.load(page_table_ptr + request * pages_per_request + first // page_size).to(tl.int64)
                pool_row = (page * kv_heads + head) * page_size + (keys % page_size)[:, None]
                # Nobody may have written the slots behind the end, and 0 * NaN is NaN.
                is_used = (keys < end)[:, None]
                k = tl.load(k_ptr + pool_row * head_dim + columns, mask=is_used, other=0.0)
                v = tl.load(v_ptr + pool_row * head_dim + columns, mask=is_used, other=0.0)
                # `maths.is_visible`; the lowest bit is the same after a logical and an arithmetic shift. Committed
                # tiles are masked too: without it the compiler may contract other operations into FMAs, and a token
                # would get other bits when a tile in front of it becomes wholly committed.
                new_row = keys[None, :] - context_len
                bit = (tl.where(new_row < 32, low_bits, high_bits) >> (new_row & 31)) & 1
                visible = (new_row < 0) | ((new_row <= last_row) & ((new_row >= 64) | (bit == 1)))
                # `maths.attend_tile`; "ieee" keeps float32 out of tf32.
                scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
                scores = tl.where(visible, scores, float("-inf"))
                new_top = tl.maximum(top, tl.max(scores, axis=1, keep_dims=True))
                weights = tl.exp2(scores - new_top)
                keep = tl.exp2(top - new_top)
                total = total * keep + tl.sum(weights, axis=1, keep_dims=True)
                mixed = mixed * keep + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
                top = new_top
            padded_rows = tl.num_programs(1) * tile_rows
            first_row = (tl.program_id(0) * tl.num_programs(2) + tl.program_id(2)).to(tl.int64) * padded_rows
            rows = first_row + tl.program_id(1) * tile_rows + tl.arange(0, tile_rows)[:, None]
            tl.store(top_ptr + rows, top)
            tl.store(total_ptr + rows, total)
            tl.store(mixed_ptr + rows * head_dim + columns, mixed)

    @triton.jit
    @typing.no_type_check
    def combine(
        context_len_ptr,
        top_ptr,
        total_ptr,
        mixed_ptr,
        out_ptr,
        tokens: tl.constexpr,
        groups: tl.constexpr,
        kv_heads: tl.constexpr,
        head_dim: tl.constexpr,
        split: tl.constexpr,
        lowest: tl.constexpr,
        num_splits: tl.constexpr,
        padded_rows: tl.constexpr,
        tile_rows: tl.constexpr,
    ):
        request = tl.program_id(0) // kv_heads
        head = tl.program_id(0) % kv_heads
        seen = tl.minimum(((tl.program_id(1) + 1) * tile_rows + groups - 1) // groups, tokens)
        end = tl.load(context_len_ptr + request) + seen
        tile_row = tl.program_id(1) * tile_rows + tl.arange(0, tile_rows)
        columns = tl.arange(0, head_dim)[None, :]
        top = tl.full((tile_rows, 1), lowest, tl.float32)
        total = tl.zeros((tile_rows, 1), tl.float32)
        mixed = tl.zeros((tile_rows, head_dim), tl.float32)
        for number in range((end + split - 1) // split):
            rows = (tl.program_id(0) * num_splits + number).to(tl.int64) * padded_rows + tile_row[:, None]
            split_top = tl.load(top_ptr + rows)
            new_top = tl.maximum(top, split_top)
            keep = tl.exp2(top - new_top)
            keep_split = tl.exp2(split_top - new_top)
            total = total * keep + tl.load(total_ptr + rows) * keep_split
            mixed = mixed * keep + tl.load(mixed_ptr + rows * head_dim + columns) * keep_split
            top = new_top
        out = mixed / tl.where(total > 0, total, 1.0)
        row = tl.minimum(tile_row, tokens * groups - 1)
        out_row = (((request * tokens + row // groups) * kv_heads + head) * groups + row % groups).to(tl.int64)
        tl.store(out_ptr + out_row[:, None] * head_dim + columns, out.to(out_ptr.dtype.element_ty))

    @triton.jit
    @typing.no_type_check
    def write(
        start_ptr,
        page_table_ptr,
        new_k_ptr,
        new_v_ptr,
        old_k_ptr,  # the same memory as the outputs
        old_v_ptr,
        k_ptr,
        v_ptr,
        tokens: tl.constexpr,
        kv_heads: tl.constexpr,
        head_dim: tl.constexpr,
        pages_per_request: tl.constexpr,
        page_size: tl.constexpr,
    ):
        request = tl.program_id(0)
        slot = tl.load(start_ptr + request) + tl.program_id(1)
        page = tl.load(page_table_ptr + request * pages_per_request + slot // page_size).to(tl.int64)
        columns = tl.arange(0, head_dim)
        for head in range(kv_heads):  # one row of H at a time: K need not be a power of two
            source = ((request * tokens + tl.program_id(1)) * kv_heads + head).to(tl.int64) * head_dim + columns
            target = ((page * kv_heads + head) * page_size + slot % page_size) * head_dim + columns
            tl.store(k_ptr + target, tl.load(new_k_ptr + source).to(k_ptr.dtype.element_ty))
            tl.store(v_ptr + target, tl.load(new_v_ptr + source).to(v_ptr.dtype.element_ty))

    return Kernels(attend, combine, write)


def launch(
    name: str,
    kernel: Any,
    inputs: Sequence[Array],
    *,
    outputs: Sequence[jax.ShapeDtypeStruct] = (),
    in_place: Sequence[Array] = (),
    grid: tuple[int, ...],
    constants: dict[str, Any],
    **compiler: int | None,
) -> tuple[Array, ...]:
    """Calls a kernel whose parameters are `*inputs, *in_place, *outputs, *in_place, *constants`.

    What is changed in place comes twice because jax-triton 0.3 passes the pointers of an aliased input and of its
    output; from 0.4 on it is a Ref, passed once, and in the first place stands a number that nobody reads.

    Returns:
        The outputs and what was changed in place.
    """
    jax_triton = _package("jax_triton")
    options = dict(kernel=kernel, name=name, grid=grid, **compiler, **constants)
    if jax_triton.__version_info__ >= (0, 4):
        # Said aloud because the default depends on Triton's version: which products fuse decides the last bits.
        options["backend_options"] = {"enable_fp_fusion": True}
        refs = [jax.new_ref(array) for array in in_place]
        results = jax_triton.triton_call(*inputs, *[0 for _ in refs], *refs, out_type=tuple(outputs), **options)
        return *results, *(jax.freeze(ref) for ref in refs)
    shapes = [*outputs, *(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in in_place)]
    aliases = {len(inputs) + i: len(outputs) + i for i in range(len(in_place))}
    options |= dict(enable_fp_fusion=True, input_output_aliases=aliases)
    return tuple(jax_triton.triton_call(*inputs, *in_place, out_shape=shapes, **options))


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise _refusal('needs jax-triton, Triton and CUDA (pip install "idlm-jax[gpu]")') from error


def _refusal(reason: str) -> NotImplementedError:
    return refuse("paged_attention", Body.JAX_TRITON, reason, BODIES)
