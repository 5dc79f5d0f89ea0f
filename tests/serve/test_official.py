"""The reference server's configuration file is read, or refused by the key that does not fit."""

import pytest

from serve.official import Defaults, read_official


def test_stride_and_sampling_are_taken_from_the_reference_file(tmp_path):
    file = tmp_path / "idlm_blockN4_config.yaml"
    file.write_text(
        "block_size: 7\ngen_block_size: 4\ntemperature: 0.7\ntop_p: 0.95\ntop_k: 50\n"
        "use_spec_verify: true\nverify_alpha: 1.0\nverify_num_specs: 3\nfast_verify: true\n"
        "draft_conf_file: /tmp/drafts.jsonl\nstats_file: null\n"
    )
    assert read_official(file) == (4, Defaults(temperature=0.7, top_k=50, top_p=0.95))


def test_a_file_without_a_stride_leaves_it_open(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("temperature: 0\n")
    assert read_official(file) == (None, Defaults(temperature=0.0))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("use_spec_verify: false", "use_spec_verify"),
        ("verify_alpha: 1.3", "verify_alpha"),
        ("block_size: 7\ngen_block_size: 3", "block_size=7, .*do not fit together|gen_block_size=3, block_size=7"),
        ("block_size: 8", "must be odd"),
        ("blok_size: 7", "blok_size: Extra inputs are not permitted"),
        ("- 1", "holds no keys"),
    ],
)
def test_what_would_not_be_exact_or_is_not_known_is_refused_by_name(tmp_path, content, message):
    file = tmp_path / "config.yaml"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_official(file)
