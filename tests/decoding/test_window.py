"""The window plan against its definition, row by row, with one group and with one behind every prefix."""

import jax.numpy as jnp
import numpy as np
import pytest

from idlm_jax.decoding.window import build_window

MASK = 99


@pytest.mark.parametrize("num_drafts", [0, 1, 2])
@pytest.mark.parametrize("prefixes", [[2], [0, 1, 2], [1, 0]])
def test_rows_have_the_tokens_positions_and_prefixes_of_the_design(num_drafts, prefixes):
    start, num_masks = 7, 2
    clean = [50, 51, 52]
    window = build_window(
        jnp.array([clean], jnp.int32),
        jnp.array([num_drafts + 1], jnp.int32),
        jnp.array([start], jnp.int32),
        jnp.array([prefixes], jnp.int32),
        num_masks,
        MASK,
    )
    rows = [("clean", j, 0) for j in range(3)]
    rows += [("mask", prefix, k) for prefix in prefixes for k in (1, 2)]
    groups = [-1] * 3 + [g for g in range(len(prefixes)) for _ in range(num_masks)]
    assert window.tokens[0].tolist() == clean + [MASK] * (num_masks * len(prefixes))
    # MASK k behind prefix j stands k places after draft j
    assert window.positions[0].tolist() == [start + j + k for _, j, k in rows]
    assert window.is_mask[0].tolist() == [kind == "mask" for kind, _, _ in rows]
    expected = np.zeros((len(rows), len(rows)), bool)
    for query, (_, prefix, depth) in enumerate(rows):
        for key, (kind, index, key_depth) in enumerate(rows):
            if kind == "clean":
                expected[query, key] = index <= prefix and index <= num_drafts
            else:
                expected[query, key] = groups[query] == groups[key] and key_depth <= depth
    np.testing.assert_array_equal(np.asarray(window.visible[0]), expected)


def test_ar_is_the_window_without_drafts_or_groups():
    window = build_window(
        jnp.array([[5]], jnp.int32),
        jnp.array([1], jnp.int32),
        jnp.array([3], jnp.int32),
        jnp.array([[0]], jnp.int32),
        0,
        MASK,
    )
    assert window.tokens.tolist() == [[5]]
    assert window.positions.tolist() == [[3]]
    assert window.visible.tolist() == [[[True]]]
