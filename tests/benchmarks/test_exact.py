"""The kit's comparison bit for bit: its dry run, its sums, and how it goes on after it was cut off."""

import itertools
import json
from pathlib import Path

import pytest

from benchmarks.device.__main__ import main
from benchmarks.device.budget import SKIPPED, Budget
from benchmarks.device.exact import CASES, ExactLine, compare
from benchmarks.device.report import Report
from idlm_jax.decoding.generate import Completion

AMPLE = 600.0


@pytest.mark.slow
@pytest.mark.proof
def test_dry_comparison_bit_for_bit_finds_no_difference(tmp_path: Path):
    assert main(["exact", "--dry", "--out", str(tmp_path)]) == 0
    lines = json.loads((tmp_path / "exact.json").read_text())["exact"]
    assert [line["case"] for line in lines] == ["bfloat16_bitwise_n4_b2", "bfloat16_default_n4_b2"]
    assert [(line["prompts"], line["tokens"], line["note"]) for line in lines] == [(2, 16, "")] * 2
    assert [line["differing_checksums"] for line in lines] == [0, None]
    assert lines[0]["differing_tokens"] == 0 < lines[0]["verified"]


def completion(token: int, checksum: int | None) -> Completion:
    sums = None if checksum is None else [7, checksum]
    return Completion([5, token], "", "length", 2, 0, (3,), (1,), (1.5,), 0.5, None, sums)


@pytest.fixture
def completed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Takes note of what was completed, by a model whose batches of 7 get one token and one checksum wrong."""
    calls: list[tuple[str, int]] = []

    def complete(models, case, prompts):
        if case.stride == 8:
            raise NotImplementedError("no such kernel")
        calls.append((case.name, prompts[0]))
        wrong = case.batch == 7
        return [completion(6 + (wrong and prompt == 0), 8 + wrong if case.mode else None) for prompt in prompts]

    monkeypatch.setattr("benchmarks.device.exact.Models.complete", complete)
    monkeypatch.setattr("benchmarks.device.exact.Models.prompts", lambda models, num: list(range(num)))
    return calls


def test_differences_from_ar_add_up_over_portions_and_fail_only_where_bits_are_promised(completed):
    *_, lines = compare(CASES, {}, Budget(AMPLE), is_dry=False)
    fine, wrong = lines["bfloat16_bitwise_n4_b32"], lines["bfloat16_bitwise_n4_b7"]
    assert (fine.prompts, fine.tokens, fine.verified, fine.accepted) == (1120, 2240, 3360, 1120)
    assert (fine.differing_tokens, fine.differing_checksums, fine.has_failed) == (0, 0, False)
    assert (wrong.differing_tokens, wrong.differing_prompts, wrong.differing_checksums) == (1, 1, 1120)
    assert wrong.has_failed
    default, refused = lines["bfloat16_default_n4_b7"], lines["float32_bitwise_n8_b7"]
    assert (default.differing_tokens, default.differing_checksums, default.has_failed) == (1, None, False)
    assert (refused.note, refused.has_failed) == ("NotImplementedError: no such kernel", True)
    assert completed.count(("float32_default_n1_b1", 0)) == 1  # what several cases are compared with


def test_a_comparison_that_was_cut_off_goes_on_where_it_stopped(completed, tmp_path: Path):
    cases = CASES[:2]
    *_, lines = itertools.islice(compare(cases, {}, Budget(AMPLE), is_dry=False), 3)
    environment = {"device": "d", "date": "1", "command": "c"}
    Report(environment=environment, is_dry=False, exact=list(lines.values())).write(tmp_path, "exact")
    again = Report(environment=environment | {"date": "2"}, is_dry=False)
    before = {line["case"]: ExactLine(**line) for line in again.resumed(tmp_path)}
    assert [line.portions for line in before.values()] == [2, 1]
    completed.clear()
    *_, lines = compare(cases, before, Budget(AMPLE), is_dry=False)
    assert [line.prompts for line in lines.values()] == [1120, 1120]
    assert ("bfloat16_bitwise_n4_b1", 224) not in completed
    assert ("float32_bitwise_n4_b1", 224) in completed
    *_, spent = compare(cases, before, Budget(0.0), is_dry=False)
    assert [(line.prompts, line.note) for line in spent.values()] == [(448, SKIPPED), (224, SKIPPED)]
    for other in ({"device": "e"}, {"revision": "r"}):
        assert Report(environment=environment | other, is_dry=False).resumed(tmp_path) == []
