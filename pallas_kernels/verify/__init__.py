"""Acceptance and draws over the vocabulary, from raw logits and without dense probabilities: the contract of the op.

A row of logits is read once for its statistics (`row_stats`); from then on p(v) costs one logit. Whole rows are read
again only where a token is drawn: a draft, or the one token per request that ends a verification.

p(v) = exp((logit_v - top_logit) / T) / mass if logit_v >= threshold, else 0; a point mass on top_id where T = 0.

Every random number is threefry's at (seed, position, purpose, id), see `threefry`: tokens depend on no batch neighbour,
and the reference draws what jax.random.categorical would with the same key.
"""

from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.bodies import Body, refuse
from pallas_kernels.verify import maths, reference, threefry, tpu, triton
from pallas_kernels.verify.accept import accept
from pallas_kernels.verify.checks import check_array, check_logits, check_sampling, check_tiles
from pallas_kernels.verify.rows import Refused, RowStats, Sampling, Verdict
from pallas_kernels.verify.threefry import Purpose
from pallas_kernels.verify.tiles import TpuTiles, TritonTiles

__all__ = [
    "Purpose",
    "RowStats",
    "Sampling",
    "TpuTiles",
    "TritonTiles",
    "Verdict",
    "draft",
    "row_stats",
    "verify",
    "verify_coupled",
]

BODIES = (Body.REFERENCE, Body.TRITON, Body.TPU)
Tiles = TritonTiles | TpuTiles
Tree = TypeVar("Tree")


def row_stats(
    logits: Float[Array, "R V"],
    temperature: Float[Array, " R"],
    top_k: Int[Array, " R"],
    top_p: Float[Array, " R"],
    *,
    filtered: bool,
    excluded_id: int = -1,
    body: Body = Body.REFERENCE,
    interpret: bool = False,
    tiles: Tiles | None = None,
) -> RowStats:
    """Everything needed to evaluate p(v) of any v without another pass over the row.

    Sums are float32. Top-k is exact; a set whose mass is within rounding (about 1e-6) of top_p may differ by an id
    between bodies, never between calls. The Pallas bodies find thresholds by counting, not by sorting, and sum in an
    order that V and `tiles` fix: a row's bits are the same in any batch. XLA promises no such thing for the reference.

    Args:
        logits: raw scores, float32 or bfloat16; -inf entries are impossible. A row needs one finite entry, or its
            statistics are garbage, which harms no other row.
        temperature: of each row; 0 is greedy.
        top_k: of each row; 0 keeps all.
        top_p: of each row, in (0, 1].
        filtered: whether any row uses top-k or top-p; False skips the search and ignores both. A row that uses neither
            has the same bits either way.
        excluded_id: an id that is impossible in every row; -1 for none.
        body: which implementation runs.
        interpret: run a Pallas body in its interpreter; for tests.
        tiles: tile sizes of the chosen Pallas body; measured or default ones when None.

    Raises:
        ValueError: shapes disagree, or `tiles` belongs to another body.
        TypeError: a dtype is none of those named.
        NotImplementedError: the op has no such body, or the body refuses the vocabulary (see its file).
    """
    if logits.ndim != 2:
        raise ValueError(f"{logits.shape=} must be [R, V]")
    check_logits("logits", logits, logits.shape)
    for name, values, kind in (
        ("temperature", temperature, jnp.floating),
        ("top_k", top_k, jnp.integer),
        ("top_p", top_p, jnp.floating),
    ):
        check_array(name, values, logits.shape[:1], kind)
    check_tiles(body, tiles)
    # Keeping every id is no filter; so the bodies need not count what a k above the vocabulary would want.
    args = (logits, temperature, jnp.where(top_k < logits.shape[1], top_k, 0), top_p)
    if logits.shape[0] == 0:
        body = Body.REFERENCE  # no grid can be empty
    match body:
        case Body.REFERENCE:
            return reference.row_stats(*args, filtered=filtered, excluded_id=excluded_id)
        case Body.TRITON:
            assert tiles is None or isinstance(tiles, TritonTiles)
            return triton.row_stats(*args, filtered=filtered, excluded_id=excluded_id, tiles=tiles, interpret=interpret)
        case Body.TPU:
            assert tiles is None or isinstance(tiles, TpuTiles)
            return tpu.row_stats(*args, filtered=filtered, excluded_id=excluded_id, tiles=tiles, interpret=interpret)
        case _:
            raise refuse("verify", body, "does not exist", BODIES)


def draft(
    logits: Float[Array, "B M V"],
    sampling: Sampling,
    first_position: Int[Array, " B"],
    *,
    argmax: bool,
    filtered: bool,
    excluded_id: int = -1,
    all_greedy: bool = False,
    purpose: Purpose = Purpose.PROPOSE,
    body: Body = Body.REFERENCE,
    interpret: bool = False,
    tiles: Tiles | None = None,
) -> tuple[Int[Array, "B M"], RowStats]:
    """Proposes one token per MASK row, drawn from q, or the likeliest.

    Args:
        logits: raw scores of the MASK rows, float32 or bfloat16.
        sampling: of each request.
        first_position: position whose key the first row's draw takes; row m takes the m-th after it.
        argmax: propose the likeliest id whatever the temperature; no random bits.
        filtered: as in `row_stats`.
        excluded_id: as in `row_stats`.
        all_greedy: the caller knows that every temperature is 0; no random bits.
        purpose: of the draws; COMMIT takes the noise of a committed token, for `verify_coupled`.
        body: which implementation runs.
        interpret: run a Pallas body in its interpreter; for tests.
        tiles: tile sizes of the chosen Pallas body.

    Returns:
        Proposals, and the statistics [B, M] of their rows. `verify` wants `logits` and statistics back if the proposals
        were drawn; argmax proposals, and all of a greedy batch, are point masses and need neither.

    Raises:
        ValueError, TypeError, NotImplementedError: as `row_stats`.
    """
    check_logits("logits", logits, logits.shape)
    check_sampling(sampling, first_position, logits.shape[0])
    batch, num_rows, _ = logits.shape
    options = {"excluded_id": excluded_id, "body": body, "interpret": interpret, "tiles": tiles}
    stats = _batch_stats(logits, sampling, filtered=filtered and not all_greedy, **options)
    if argmax or all_greedy or num_rows == 0:
        return stats.top_id, stats
    positions = first_position[:, None] + jnp.arange(num_rows, dtype=first_position.dtype)[None]
    key = threefry.request_key(sampling.seed[:, None], positions, purpose)
    flat = batch * num_rows
    tokens = _draw(
        logits.reshape(flat, 1, -1),
        jnp.zeros((flat,), jnp.int32),
        jnp.repeat(sampling.temperature, num_rows),
        jax.tree.map(jnp.ravel, stats),
        jax.tree.map(jnp.ravel, key),
        None,
        **options,
    )
    return tokens.reshape(batch, num_rows), stats


def verify(
    anchor_logits: Float[Array, "B C V"],
    proposals: Int[Array, "B M"],
    proposal_logits: Float[Array, "B M V"] | None,
    proposal_stats: RowStats | None,
    num_proposals: Int[Array, " B"],
    sampling: Sampling,
    first_position: Int[Array, " B"],
    *,
    filtered: bool,
    excluded_id: int = -1,
    all_greedy: bool = False,
    body: Body = Body.REFERENCE,
    interpret: bool = False,
    tiles: Tiles | None = None,
) -> Verdict:
    """Accepts draft j with probability min(1, p_j/q_j), left to right; corrects the first one refused.

    The correction is drawn from normalise(max(0, p - q)); when no draft is refused, the bonus from p. Rounding can
    leave nothing of a residual of less than 1e-7; it is then drawn from p. Committed tokens are distributed as draws
    from p whatever q is (Leviathan et al. 2023, theorem 3.5; paper section on ISD), provided each draft was drawn from
    the q given here. Drafts taken by argmax were drawn from a point mass: pass no proposal logits. (Logits and
    statistics of an argmax draft make the reference implementation's rule, whose samples are not distributed as p.)

    Acceptance needs two probabilities and one uniform per draft, so only scalars; one row of p and one of q per request
    are read for the final draw.

    Args:
        anchor_logits: raw scores of p, C = M + 1 rows; row j is the causal distribution of the token that draft j
            proposes, row M that of the bonus. Rows past `num_proposals` may hold anything.
        proposals: drafted ids; entries at and past `num_proposals` are ignored.
        proposal_logits: the logits that `draft` drew from; None if every q is a point mass on its draft: argmax
            drafts, a greedy batch, or M = 0. Rows at and past `num_proposals` may hold anything.
        proposal_stats: the statistics that `draft` returned; None with the logits.
        num_proposals: drafts to check, 0..M; 0 is a cold start, which commits one token drawn from p_0.
        sampling: of each request, for p and q alike.
        first_position: position of the token that draft 0 proposes. Draft j is tested with the key of position + j and
            purpose ACCEPT; a final draw there takes purpose COMMIT.
        filtered: whether any request uses top-k or top-p.
        excluded_id: an id that neither p nor q holds; -1 for none.
        all_greedy: the caller knows that every temperature is 0; no random bits, no residual.
        body: which implementation runs.
        interpret: run a Pallas body in its interpreter; for tests.
        tiles: tile sizes of the chosen Pallas body.

    Raises:
        ValueError: shapes disagree, one of `proposal_logits` and `proposal_stats` is missing, or `tiles` belongs to
            another body.
        TypeError: a dtype is none of those named.
        NotImplementedError: as `row_stats`.
    """
    check_logits("anchor_logits", anchor_logits, anchor_logits.shape)
    check_sampling(sampling, first_position, anchor_logits.shape[0])
    batch, num_anchors, vocab_size = anchor_logits.shape
    num_masks = num_anchors - 1
    check_array("proposals", proposals, (batch, num_masks), jnp.integer)
    check_array("num_proposals", num_proposals, (batch,), jnp.integer)
    if (proposal_logits is None) != (proposal_stats is None):
        raise ValueError("proposal_logits and proposal_stats come together: both, or None for point masses")
    if proposal_logits is not None:
        check_logits("proposal_logits", proposal_logits, (batch, num_masks, vocab_size))
    options = {"excluded_id": excluded_id, "body": body, "interpret": interpret, "tiles": tiles}
    stats = _batch_stats(anchor_logits, sampling, filtered=filtered and not all_greedy, **options)
    depths = jnp.arange(num_masks, dtype=num_proposals.dtype)[None]
    is_proposed = depths < num_proposals[:, None]
    temperature = sampling.temperature[:, None]

    def of_draft(logits: Float[Array, "B _ V"], stats: RowStats) -> Float[Array, "B M"]:
        x = jnp.take_along_axis(logits[:, :num_masks], proposals[..., None], axis=2)[..., 0].astype(jnp.float32)
        x = jnp.where(proposals == excluded_id, -jnp.inf, x)
        return maths.probs(x, proposals, temperature, jax.tree.map(lambda stat: stat[:, :num_masks], stats))

    uniforms = None
    q_of_draft = jnp.ones(proposals.shape, jnp.float32)
    if all_greedy:
        p_of_draft = (proposals == stats.top_id[:, :num_masks]).astype(jnp.float32)
    else:
        p_of_draft = of_draft(anchor_logits, stats)
        if proposal_logits is not None and proposal_stats is not None:
            q_of_draft = of_draft(proposal_logits, proposal_stats)
        key = threefry.request_key(sampling.seed[:, None], first_position[:, None] + depths, Purpose.ACCEPT)
        uniforms = threefry.uniform(threefry.bits(key, jnp.zeros_like(key.low)))
    accepted_len, accept_probs = accept(p_of_draft, q_of_draft, is_proposed, uniforms)

    last = _at(stats, accepted_len)
    if all_greedy:
        return Verdict(accepted_len, last.top_id, accept_probs)
    refused = None
    if num_masks:
        q_row = jnp.minimum(accepted_len, num_masks - 1)
        q_stats = None if proposal_stats is None else _at(proposal_stats, q_row)
        token = _at(proposals, q_row)
        refused = Refused(accepted_len < num_proposals, token, proposal_logits, q_row, q_stats)
    key = threefry.request_key(sampling.seed, first_position + accepted_len, Purpose.COMMIT)
    token = _draw(anchor_logits, accepted_len, sampling.temperature, last, key, refused, **options)
    return Verdict(accepted_len, token, accept_probs)


def verify_coupled(
    anchor_logits: Float[Array, "B C V"],
    proposals: Int[Array, "B M"],
    num_proposals: Int[Array, " B"],
    sampling: Sampling,
    first_position: Int[Array, " B"],
    **options,
) -> Verdict:
    """Draws every row's token from p as plain sampling would, and accepts the drafts that are those tokens.

    What is committed is then plain sampling's own text for the seed, whatever was drafted. Drafts that `draft` has
    drawn with purpose COMMIT share the noise of the row that checks them, which makes them agree with probability
    (1 - TV) / (1 + TV) at least, TV the total variation between p and q (Daliri et al. 2024, arXiv 2408.07978).

    Args:
        anchor_logits: as in `verify`.
        proposals: drafted ids, however; entries at and past `num_proposals` are ignored.
        num_proposals: drafts to check, 0..M.
        sampling: of each request.
        first_position: as in `verify`; row j draws with the key of position + j and purpose COMMIT.
        **options: `filtered`, `excluded_id`, `all_greedy`, `body`, `interpret` and `tiles`, as in `draft`.

    Returns:
        The verdict; `accept_probs` are 1 or 0, for nothing is left to chance.

    Raises:
        ValueError, TypeError, NotImplementedError: as `verify`.
    """
    batch, num_masks = anchor_logits.shape[0], anchor_logits.shape[1] - 1
    check_array("proposals", proposals, (batch, num_masks), jnp.integer)
    check_array("num_proposals", num_proposals, (batch,), jnp.integer)
    tokens, _ = draft(anchor_logits, sampling, first_position, argmax=False, purpose=Purpose.COMMIT, **options)
    is_proposed = jnp.arange(num_masks, dtype=num_proposals.dtype)[None] < num_proposals[:, None]
    agrees = (tokens[:, :num_masks] == proposals).astype(jnp.float32)
    accepted_len, accept_probs = accept(agrees, jnp.ones_like(agrees), is_proposed, None)
    return Verdict(accepted_len, _at(tokens, accepted_len), accept_probs)


def _batch_stats(logits: Float[Array, "B C V"], sampling: Sampling, **options) -> RowStats:
    """`row_stats` of every row of every request, [B, C]."""
    batch, num_rows, vocab_size = logits.shape
    per_row = (jnp.repeat(values, num_rows) for values in sampling[:3])
    stats = row_stats(logits.reshape(batch * num_rows, vocab_size), *per_row, **options)
    return jax.tree.map(lambda stat: stat.reshape(batch, num_rows), stats)


def _at(tree: Tree, row: Int[Array, " B"]) -> Tree:
    """[B, C] -> [B]: one row's entry of each request."""
    return jax.tree.map(lambda values: jnp.take_along_axis(values, row[:, None], axis=1)[:, 0], tree)


def _draw(*args, excluded_id: int, body: Body, interpret: bool, tiles: Tiles | None) -> Array:
    match body:
        case Body.TRITON:
            assert tiles is None or isinstance(tiles, TritonTiles)
            return triton.draw(*args, excluded_id=excluded_id, tiles=tiles, interpret=interpret)
        case Body.TPU:
            assert tiles is None or isinstance(tiles, TpuTiles)
            return tpu.draw(*args, excluded_id=excluded_id, tiles=tiles, interpret=interpret)
        case _:
            return reference.draw(*args, excluded_id=excluded_id)
