"""What a run is about to do, in a few lines for people."""

from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from idlm_jax.config import ModelConfig
from train.config import TrainConfig
from train.curriculum import describe_span
from train.data import DatasetReport
from train.flops import formula, full_rows, step_flops
from train.step import TrainState
from train.targets import find_device


def describe_plan(
    config: TrainConfig,
    report: DatasetReport,
    model: ModelConfig,
    state: TrainState,
    memory: Any,
    mesh: Mesh | None,
) -> Iterator[str]:
    """Yields the lines that a run prints before its first step.

    Args:
        config: the run.
        report: of its dataset.
        model: what it trains.
        state: its arrays, wherever they lie.
        memory: the compiled step's own analysis.
        mesh: None on one device.
    """

    def count(tree: Any) -> int:
        return sum(x.size for x in jax.tree.leaves(tree))

    def megabytes(tree: Any) -> float:
        return sum(x.nbytes for x in jax.tree.leaves(tree)) / 1e6

    row_len, num_trainable = report.settings.max_seq_len, count(state.params)
    tokens = config.batch_size * row_len
    epochs = config.steps * config.batch_size / report.train.rows
    devices = jax.devices()
    yield f"run        {config.run_name}: {config.objective}, in {config.run_dir}"
    kind = f"{devices[0].device_kind} ({devices[0].platform})"
    used = "the run uses the first (mesh.fsdp=-1 would use all)" if len(devices) > 1 else "the run uses it"
    if mesh is not None:
        used = "mesh " + " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    over = f" over {jax.process_count()} processes" if jax.process_count() > 1 else ""
    yield f"devices    {len(devices)} x {kind}{over}; {used}"
    yield f"parameters {num_trainable + count(state.frozen):,}, of which {num_trainable:,} are trained"
    yield (
        f"memory     {megabytes((state.params, state.frozen)):,.0f} MB parameters, "
        f"{megabytes(state.opt_state):,.0f} MB optimizer, "
        f"{memory.temp_size_in_bytes / 1e6:,.0f} MB gradients and activations (from the compiled step)"
    )
    yield (
        f"data       {report.train.rows:,} rows of {row_len} tokens, {report.train.fill:.1%} full; "
        f"held out: {report.heldout.rows:,} rows"
    )
    yield (
        f"plan       {config.steps:,} steps x {config.batch_size} rows = {config.steps * tokens:,} tokens "
        f"({tokens:,} per step, {epochs:.2f} epochs)"
    )
    is_ar, span, device = config.objective == "ar", config.spans[-1], find_device(devices[0].device_kind)
    flops = step_flops(
        model,
        full_rows(config.batch_size, row_len),
        is_ar=is_ar,
        has_divergence=span.has_divergence,
    )
    peak = f"MFU is of {device.flops / 1e12:.0f} TFLOP/s a device" if device else "no peak is known, hence no MFU"
    yield f"work       {formula(model, is_ar=is_ar)} = {flops:.3g} FLOP a full step (train/flops.py); {peak}"
    if config.objective == "introspective":
        for span in config.spans:
            yield f"stage {span.number}    {describe_span(span)}"
