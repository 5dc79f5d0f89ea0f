"""The committed pictures of the concepts page are what the code draws today (`make pictures`)."""

import jax
import numpy as np
import pytest

from benchmarks.pictures import IMAGES, draw_pictures, draw_training_mask, draw_windows, training_mask
from idlm_jax.cli.plots import save
from tests.docs.blocks import ROOT
from tests.train.dense_definition import dense_layout, packed_batch, settings
from train.layout import LabelRows, lay_out


@pytest.mark.parametrize("block_length", [1, 3])
def test_the_drawn_mask_is_the_definition(block_length):
    row = jax.tree.map(lambda array: array[:1], packed_batch())
    wanted = dense_layout(block_length, LabelRows.MASK_ROWS)[0][0]
    np.testing.assert_array_equal(training_mask(lay_out(row, settings(block_length))), wanted)


@pytest.mark.parametrize(("name", "draw"), [("window", draw_windows), ("training_mask", draw_training_mask)])
def test_a_committed_picture_is_what_the_code_draws(name, draw, tmp_path):
    save(draw(), tmp_path / "drawn.svg")
    assert (tmp_path / "drawn.svg").read_bytes() == (ROOT / IMAGES / f"{name}.svg").read_bytes(), "run: make pictures"


@pytest.mark.proof
def test_the_committed_traces_are_what_the_tiny_model_does(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    draw_pictures(tmp_path)
    for drawn in tmp_path.iterdir():
        assert drawn.read_bytes() == (ROOT / IMAGES / drawn.name).read_bytes(), "run: make pictures"
