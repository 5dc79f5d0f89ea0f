"""A whole run: from text to an exported model, with everything written down and every refusal explained."""

import fcntl
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from idlm_jax.model.language_model import LanguageModel
from idlm_jax.weights import load
from tests.support.tiny_run import TINY_MODEL, tiny_dataset, tiny_run
from train.config import ConfigError
from train.guard import TrainingDiverged
from train.loop import export_checkpoint, run_training
from train.metrics import read_metrics


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_dataset(tmp_path_factory.mktemp("loop"))


@pytest.fixture(scope="module")
def ar_run(dataset, tmp_path_factory: pytest.TempPathFactory):
    lines, seen = [], []
    config = tiny_run(dataset, tmp_path_factory.mktemp("runs"), run_name="ar", steps=9, log_every=4, eval_every=5)
    result = run_training(config, on_step=lambda step, metrics: seen.append((step, metrics)), echo=lines.append)
    return config, result, lines, seen


def test_a_run_exports_what_it_trained(ar_run):
    config, result, _, _ = ar_run
    assert result.is_finished and result.step == 9 and result.export_dir == config.run_dir / "hf"
    lm = load(result.export_dir, dtype="float32")
    assert lm.tokenizer is not None and lm.config.mask_token_id == lm.tokenizer.mask_token_id
    assert lm.config.eos_token_ids == (lm.tokenizer.eos_token_id,)
    exported = export_checkpoint(config, echo=lambda line: None)
    again = load(exported, dtype="float32")
    ids = np.arange(12, dtype=np.int32)[None]
    np.testing.assert_array_equal(lm.logits(ids), again.logits(ids))
    assert float(jnp.std(lm.logits(ids))) > 0.1


def test_every_step_is_reported_once_and_in_order(ar_run):
    _, _, _, seen = ar_run
    assert [step for step, _ in seen] == list(range(1, 10))
    assert seen[-1][1]["loss"] < seen[0][1]["loss"]


def test_metrics_have_a_line_per_logged_step_and_per_evaluation(ar_run):
    config, result, _, seen = ar_run
    records = read_metrics(config.run_dir)
    assert [(record["kind"], record["step"]) for record in records] == [
        ("train", 1),
        ("train", 4),
        ("eval", 5),
        ("train", 8),
        ("train", 9),
        ("eval", 9),
    ]
    by_step = dict(seen)
    for record in records:
        if record["kind"] == "train":
            assert record["loss"] == by_step[record["step"]]["loss"]
            assert {
                "lr",
                "grad_norm",
                "ms_per_step",
                "tokens_per_s",
                "supervised_tokens_per_s",
                "eta_s",
            } <= record.keys()
    assert records[-1]["loss"] == result.last_eval["loss"]


def test_tensorboard_receives_the_same_numbers(ar_run):
    config, *_ = ar_run
    scalars = {}
    for path in (config.run_dir / "tb").iterdir():
        data = path.read_bytes()
        while data:  # a record: length (8 bytes), its CRC (4), the event, its CRC (4)
            length = int.from_bytes(data[:8], "little")
            event = event_pb2.Event.FromString(data[12 : 12 + length])
            scalars |= {(event.step, value.tag): value.simple_value for value in event.summary.value}
            data = data[16 + length :]
    for record in read_metrics(config.run_dir):
        for name, value in record.items():
            if name not in ("step", "kind"):
                assert scalars[record["step"], f"{record['kind']}/{name}"] == np.float32(value)


def test_the_plan_comes_first_and_names_sizes(ar_run):
    _, _, lines, _ = ar_run
    plan = "\n".join(lines[:7])
    assert lines[0].startswith("run") and lines[7].startswith("step 1/9")
    assert "9 steps x 4 rows = 1,152 tokens" in plan
    # 300 x 16 embedding, two layers of 2 x 16 x 16 + 2 x 16 x 8 attention, 3 x 16 x 24 mlp and norms, final norm.
    assert f"parameters {300 * 16 + 2 * (768 + 1152 + 48) + 16:,}" in plan
    tokens, weights, pairs = 4 * 32, 2 * (768 + 1152), 4 * 32 * 33
    flops = 6 * weights * tokens + 6 * 300 * 16 * tokens + 6 * 2 * 16 * pairs
    assert f"6 M T + 6 V D clean + 6 layers N H attended = {flops:.3g} FLOP a full step" in plan


def test_a_finished_run_trains_no_further(ar_run):
    config, result, _, _ = ar_run
    before = read_metrics(config.run_dir)
    again = run_training(config, on_step=lambda step, metrics: pytest.fail("a step ran"), echo=lambda line: None)
    assert (again.step, again.export_dir) == (result.step, result.export_dir)
    assert read_metrics(config.run_dir) == before


def test_a_trained_model_is_converted_and_its_acceptance_measured_by_depth(ar_run, dataset, tmp_path):
    base = ar_run[1].export_dir
    config = tiny_run(
        dataset, tmp_path, objective="introspective", init_from=str(base), model=None, block_length=2, steps=2
    )
    result = run_training(config, echo=lambda line: None)
    assert {"loss", "ce_noisy", "ce_clean", "acceptance", "acceptance/depth_0", "acceptance/depth_1"} <= (
        result.last_eval.keys()
    )
    assert 0 < result.last_eval["acceptance"] < 1
    assert load(result.export_dir, dtype="float32").config.mask_token_id == load(base).config.mask_token_id


def test_lora_leaves_the_base_alone_and_exports_an_adapter(ar_run, dataset, tmp_path):
    base = ar_run[1].export_dir
    config = tiny_run(
        dataset,
        tmp_path,
        objective="introspective",
        init_from=str(base),
        model=None,
        lora={"rank": 2, "alpha": 4},
        steps=2,
    )
    result = run_training(config, echo=lambda line: None)
    assert result.export_dir == config.run_dir / "adapter"
    adapted, plain = load(base, dtype="float32", adapter=result.export_dir), load(base, dtype="float32")
    ids = np.arange(12, dtype=np.int32)[None]
    np.testing.assert_array_equal(adapted.logits(ids), plain.logits(ids))
    factors = adapted.module.blocks.attention.q.lora_b[...]
    assert float(jnp.abs(factors).max()) > 0


def test_a_markov_head_is_trained_exported_and_trained_on(ar_run, dataset, tmp_path):
    def run(name: str, **changes) -> LanguageModel:
        config = tiny_run(
            dataset, tmp_path, run_name=name, objective="introspective", model=None, steps=2, block_length=2, **changes
        )
        return load(run_training(config, echo=lambda line: None).export_dir, dtype="float32")

    first = run("first", init_from=str(ar_run[1].export_dir), markov_rank=3)
    assert first.config.markov_rank == 3
    assert float(jnp.abs(first.module.markov.columns[...]).max()) > 0
    # Its rank is the checkpoint's where none is given; a rate of nothing shows where it starts.
    again = run("again", init_from=str(tmp_path / "first" / "hf"), learning_rate=1e-30)
    np.testing.assert_array_equal(again.module.markov.columns[...], first.module.markov.columns[...])
    with pytest.raises(ValueError, match="the head in init_from has rank 3"):
        run("other", init_from=str(tmp_path / "first" / "hf"), markov_rank=4)


def test_a_requested_stop_saves_and_the_same_call_goes_on(dataset, tmp_path):
    config = tiny_run(dataset, tmp_path, save_every=100, eval_batches=0)
    seen = []
    stopped = run_training(
        config, on_step=lambda step, _: seen.append(step), should_stop=lambda: len(seen) >= 2, echo=lambda line: None
    )
    assert not stopped.is_finished and stopped.export_dir is None
    lines = []
    finished = run_training(config, on_step=lambda step, _: seen.append(step), echo=lines.append)
    assert finished.is_finished and seen == [1, 2, 3, 4, 5, 6]
    assert f"after step {stopped.step}" in lines[0]


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_checkpoint(dataset, tmp_path):
    config = tiny_run(dataset, tmp_path, learning_rate=1e30, warmup_ratio=0.0, save_every=1, keep=1, eval_batches=0)
    with pytest.raises(TrainingDiverged, match=r"step \d+: loss="):
        run_training(config, echo=lambda line: None)
    last = max(record["step"] for record in read_metrics(config.run_dir))
    saved = [int(path.name) for path in (config.run_dir / "checkpoints").iterdir()]
    assert saved == [last]
    assert all(np.isfinite(record["loss"]) for record in read_metrics(config.run_dir))


def test_a_run_folder_of_other_settings_is_refused_and_reporting_may_change(ar_run):
    config = ar_run[0]
    with pytest.raises(ConfigError, match=r"seed=0 \(now 5\)"):
        run_training(tiny_run_like(config, seed=5), echo=lambda line: None)
    assert run_training(tiny_run_like(config, log_every=1), echo=lambda line: None).is_finished


def tiny_run_like(config, **changes):
    defaults = {"run_name": "ar", "steps": 9, "log_every": 4, "eval_every": 5}
    return tiny_run(Path(config.dataset.path), Path(config.output_dir), **(defaults | changes))


def test_two_processes_cannot_train_one_run(dataset, tmp_path):
    config = tiny_run(dataset, tmp_path)
    config.run_dir.mkdir()
    with (config.run_dir / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another process"):
            run_training(config)


def test_a_checkpoint_of_another_tokenizer_is_refused(ar_run, tmp_path):
    other = tiny_dataset(tmp_path, word="returns")
    config = tiny_run(other, tmp_path, objective="ar", init_from=str(ar_run[1].export_dir), model=None)
    with pytest.raises(ValueError, match="different tokenizers"):
        run_training(config)


def test_a_model_smaller_than_the_tokenizer_is_refused(dataset, tmp_path):
    config = tiny_run(dataset, tmp_path, model=TINY_MODEL | {"vocab_size": 262})
    with pytest.raises(ValueError, match="smaller than the tokenizer's"):
        run_training(config)


def test_metrics_cut_off_by_a_kill_are_dropped_on_resumption(dataset, tmp_path):
    config = tiny_run(dataset, tmp_path, steps=4, eval_batches=0)
    run_training(config, should_stop=lambda: True, echo=lambda line: None)
    path = config.run_dir / "metrics.jsonl"
    kept = path.read_text()
    path.write_text(kept + json.dumps({"step": 3, "kind": "train", "loss": 1.0}) + "\n" + '{"step": 4, "ki')
    run_training(config, echo=lambda line: None)
    assert [record["step"] for record in read_metrics(config.run_dir)] == [1, 2, 3, 4]
    assert path.read_text().startswith(kept)
