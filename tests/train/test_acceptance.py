"""Expected acceptance against materialised distributions."""

import jax
import numpy as np
import pytest

from tests.support.tiny_model import tiny_module
from tests.train.dense_definition import (
    MASK,
    dense_hidden,
    dense_layout,
    packed_batch,
    settings,
)
from train.batch import Batch
from train.objective import (
    LabelRows,
    measure_acceptance,
)


@pytest.mark.parametrize("tile_rows", [7, 512])
def test_acceptance_equals_materialised_distributions(tile_rows):
    module, block_length = tiny_module(), 3
    mask, labels, scored, _ = dense_layout(block_length, LabelRows.MASK_ROWS)
    noisy, clean = np.split(np.asarray(module.logits(dense_hidden(module, mask)), np.float64), 2, axis=1)
    length = labels.shape[1]
    depth = (mask[:, :length, :length] & packed_batch().is_response[:, None]).sum(-1) - 1
    rows = {}
    for b, i in zip(*np.nonzero(scored), strict=True):
        z = {"q": noisy[b, i], "p": clean[b, i]}
        full = {name: np.exp(x) / np.exp(x).sum() for name, x in z.items()}
        p, q = (np.delete(full[name], MASK) / np.delete(full[name], MASK).sum() for name in "pq")
        for name, value in {
            "acceptance": np.minimum(p, q).sum(),
            "greedy_acceptance": float(p.argmax() == q.argmax()),
            "argmax_acceptance": p[q.argmax()],
            "ce_noisy": -np.log(full["q"][labels[b, i]]),
            "ce_clean": -np.log(full["p"][labels[b, i]]),
        }.items():
            rows.setdefault(name, []).append(value)
            rows.setdefault(f"{name}/depth_{depth[b, i]}", []).append(value)
    other_rows = settings(block_length, label_rows=LabelRows.OFFICIAL)
    metrics = jax.jit(lambda: measure_acceptance(module, packed_batch(), other_rows, tile_rows=tile_rows))()
    assert metrics.keys() == rows.keys()
    for name, values in rows.items():
        assert metrics[name].num_rows == len(values)
        np.testing.assert_allclose(metrics[name].mean, np.mean(values), rtol=1e-4, atol=1e-6)


def test_acceptance_never_holds_the_logits_of_all_rows():
    module = tiny_module(vocab_size=4001)
    batch = Batch(*(np.tile(array, (128, 1)) for array in packed_batch()))
    jitted = jax.jit(lambda: measure_acceptance(module, batch, settings(3), tile_rows=32))
    # 6,400 rows of one stream: 102 MB if materialised.
    assert jitted.lower().compile().memory_analysis().temp_size_in_bytes < 0.5 * batch.tokens.size * 4001 * 4
