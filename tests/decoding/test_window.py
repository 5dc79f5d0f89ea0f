"""The window plan against its definition, row by row; and which MASKs get rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idlm_jax.decoding.generate import prepare_batch
from idlm_jax.decoding.method import AR, ISD
from idlm_jax.decoding.placement import rows_of
from idlm_jax.decoding.sampling import SamplingParams
from idlm_jax.decoding.window import Rows, build_window
from idlm_jax.model.language_model import from_module
from tests.support.tiny_model import tiny_module

MASK = 99


@pytest.mark.parametrize("num_drafts", [0, 1, 2])
@pytest.mark.parametrize(
    "masks", [[(2, 1), (2, 2)], [(j, k) for j in (0, 1, 2) for k in (1, 2)], [(1, 1), (0, 1), (1, 2)]]
)
def test_rows_have_the_tokens_positions_and_prefixes_of_the_design(num_drafts, masks):
    start, clean = 7, [50, 51, 52]
    masks = [mask for mask in masks if mask[0] <= num_drafts]
    rows = [("clean", j, 0) for j in range(num_drafts + 1)]
    rows += [("mask", prefix, k) for prefix, k in masks]
    rows += [("padding", index, 0) for index in range(len(rows), 10)]
    window = build_window(
        jnp.array([clean], jnp.int32),
        jnp.array([num_drafts + 1], jnp.int32),
        jnp.array([start], jnp.int32),
        Rows(*(jnp.array([each], jnp.int32) for each in list(zip(*rows, strict=True))[1:])),
        MASK,
    )
    real = num_drafts + 1 + len(masks)
    assert window.tokens[0, :real].tolist() == clean[: num_drafts + 1] + [MASK] * len(masks)
    # MASK k behind prefix j stands k places after draft j
    assert window.positions[0].tolist() == [start + j + k for _, j, k in rows]
    assert window.is_mask[0].tolist() == [kind == "mask" for kind, _, _ in rows]
    expected = np.zeros((len(rows), len(rows)), bool)
    for query, (_, prefix, depth) in enumerate(rows):
        for key, (kind, index, key_depth) in enumerate(rows):
            if kind == "clean":
                expected[query, key] = index <= prefix
            elif kind == "mask":
                expected[query, key] = rows[query][0] == "mask" and index == prefix and key_depth <= depth
    np.testing.assert_array_equal(np.asarray(window.visible[0]), expected)


def chosen(method: AR | ISD, num_drafts: int, confidence: list[float]) -> list[tuple[int, int]]:
    """(prefix, depth) of the rows behind the drafts, until the padding."""
    prepared = prepare_batch(from_module(tiny_module(0)), [[1, 2]], method, [SamplingParams()])
    state = prepared.state._replace(
        num_proposals=jnp.array([num_drafts], jnp.int32),
        confidence=jnp.array([confidence], jnp.float32) if confidence else None,
    )
    prefix, depth = (each[0].tolist() for each in jax.jit(rows_of, static_argnums=0)(prepared.plan, state))
    assert (prefix[: num_drafts + 1], depth[: num_drafts + 1]) == (list(range(num_drafts + 1)), [0] * (num_drafts + 1))
    rest = list(zip(prefix, depth, strict=True))[num_drafts + 1 :]
    num_masks = sum(k > 0 for _, k in rest)
    assert all(k == 0 for _, k in rest[num_masks:]), "MASKs come before padding"
    return rest[:num_masks]


def test_one_group_stands_behind_the_last_draft_and_full_branches_behind_every_one():
    assert chosen(ISD(3), 2, []) == [(2, 1), (2, 2)]
    assert chosen(ISD(3), 0, []) == [(0, 1), (0, 2)]
    assert chosen(ISD(3, branches=3), 2, []) == [(j, k) for j in (0, 1, 2) for k in (1, 2)]
    assert chosen(ISD(3, branches=3), 0, [])[:2] == [(0, 1), (0, 2)]


def test_masks_stand_where_verification_is_likely_to_end():
    # Ends behind no draft with 0.1, one with 0.9 * 0.8 = 0.72, both with 0.18.
    assert chosen(ISD(3, rows=6), 2, [0.9, 0.2]) == [(1, 1), (1, 2), (2, 1)]
    # With 0.5, 0.05 and 0.45; the second MASK of a prefix is worth 0.8 * 0.7 of its first.
    assert chosen(ISD(3, rows=7), 2, [0.5, 0.9]) == [(0, 1), (2, 1), (0, 2), (2, 2)]
    # Fewer drafts leave more rows, and what was not drafted is no prefix.
    assert chosen(ISD(3, rows=6), 1, [0.8, 0.9]) == [(1, 1), (1, 2), (0, 1), (0, 2)]
    assert chosen(ISD(3, rows=6), 0, [0.6, 0.9])[:2] == [(0, 1), (0, 2)]
    # Two groups of MASKs are as many rows.
    assert chosen(ISD(3, branches=2), 2, [0.5, 0.9]) == chosen(ISD(3, rows=7), 2, [0.5, 0.9])


@pytest.mark.parametrize("rows", [6, 9, 17, 25])
def test_no_prefix_has_a_mask_without_those_before_it(rows):
    rng = np.random.default_rng(rows)
    for num_drafts in range(5):
        for confidence in (rng.choice([0.0, 1e-30, 0.5, 1.0], 4), rng.random(4), np.zeros(4)):
            masks = chosen(ISD(5, rows=rows), num_drafts, confidence.tolist())
            assert len(set(masks)) == len(masks) == min(rows - 1 - num_drafts, 20)
            assert all(k == 1 or (j, k - 1) in masks for j, k in masks)


def test_ar_is_the_window_without_drafts_or_masks():
    assert chosen(AR(), 0, []) == []
    nothing = jnp.zeros((1, 1), jnp.int32)
    window = build_window(
        jnp.array([[5]], jnp.int32),
        jnp.array([1], jnp.int32),
        jnp.array([3], jnp.int32),
        Rows(nothing, nothing),
        MASK,
    )
    assert window.tokens.tolist() == [[5]]
    assert window.positions.tolist() == [[3]]
    assert window.visible.tolist() == [[[True]]]
