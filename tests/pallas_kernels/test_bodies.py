"""The choice of kernels: by name or platform, never silent."""

import logging

import pytest

from pallas_kernels.bodies import BY_NAME, REFERENCE, Body, choose_kernels, refuse


def test_auto_takes_the_platforms_bodies_and_says_so_once(caplog):
    choose_kernels.cache_clear()
    with caplog.at_level(logging.INFO, logger="pallas_kernels"):
        assert choose_kernels() == REFERENCE  # the tests run on CPU
        assert choose_kernels(platform="gpu").paged_attention is Body.TRITON
        assert choose_kernels(platform="tpu").paged_attention is Body.TPU
        choose_kernels(platform="gpu")
    assert caplog.text.count("kernels for gpu (auto): paged_attention=triton") == 1


def test_a_name_wins_over_the_platform():
    assert choose_kernels("reference", platform="gpu") == REFERENCE
    assert choose_kernels("triton", platform="cpu") == BY_NAME["triton"]


def test_unknown_names_and_platforms_are_refused_with_what_there_is():
    with pytest.raises(
        ValueError, match=r"kernels='cuda' is not one of \['auto', 'jax_triton', 'reference', 'tpu', 'triton'\]"
    ):
        choose_kernels("cuda")
    with pytest.raises(ValueError, match="no kernels are known for platform='metal'"):
        choose_kernels(platform="metal")


def test_a_refusal_names_the_op_the_limit_and_the_other_bodies():
    error = refuse("op", Body.TPU, "needs pages of 16", (Body.REFERENCE, Body.TRITON, Body.TPU))
    assert str(error) == "op: the tpu body needs pages of 16; other bodies: reference, triton"
