"""The only training loop: data -> step -> metrics -> checkpoint -> export, resumable at any step."""

import contextlib
import dataclasses
import fcntl
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from transformers import AutoTokenizer

from idlm_jax.weights import export_adapter, export_hf
from train import hosts
from train.batch import Batch
from train.checkpoint import Checkpoints
from train.config import ConfigError, TrainConfig, load_config, to_yaml
from train.curriculum import Span, describe_span
from train.data import (
    DatasetReport,
    DatasetSettings,
    build_dataset,
    check_vocabulary,
    heldout_batches,
    make_train_iterator,
    read_report,
)
from train.initialize import StartingPoint, initialize
from train.mesh import ROWS, check_mesh, make_mesh, state_sharding
from train.metrics import MetricsLog, OnStep, StepReporter, format_eval
from train.objective import Metrics
from train.plan_report import describe_plan
from train.rows import local_rows, place
from train.step import TrainState, init_state, make_eval_step, make_train_step

Echo = Callable[[str], None]

# What may differ when a run is resumed: nothing that changes a parameter, but for rounding on another mesh.
_FREE_KEYS = {"output_dir", "mesh", "save_every", "keep", "eval_every", "eval_batches", "log_every"}


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        step: optimizer steps taken, over all sessions of the run.
        is_finished: all planned steps are done and the model is exported; False after a requested stop.
        export_dir: `hf` or `adapter` inside the run folder; None when not finished.
        last_eval: results of this session's last evaluation; empty without one.
    """

    step: int
    is_finished: bool
    export_dir: Path | None
    last_eval: Mapping[str, float]


def run_training(
    config: TrainConfig,
    *,
    on_step: OnStep | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    echo: Echo = print,
) -> TrainResult:
    """Trains, or goes on training, the run that `config` describes.

    Everything lies in `config.run_dir`: `config.yaml`, `metrics.jsonl`, `tb/`, `checkpoints/<step>/`, and
    at the end `hf/` (or `adapter/`). A run that was stopped or killed continues from its last checkpoint
    and ends with the same bits as an uninterrupted one.

    After `hosts.join` every process makes this same call, on one shared folder. Process 0 alone echoes, and writes
    all but the checkpoints.

    Args:
        config: the run.
        on_step: called after every step with its number, from 1, and its metrics.
        should_stop: asked after every step; once it says True, in any process, the run is saved and ends early.
        echo: takes the lines meant for people.

    Raises:
        ConfigError: the run folder belongs to a run with other settings, or to a running process.
        TrainingDiverged: a loss or gradient norm is NaN or infinite; the last checkpoint is from before.
        ValueError: dataset, checkpoint and config do not fit together.
    """
    if not hosts.is_first():
        echo = _ignore
    with _exclusive(config), _open_checkpoints(config) as checkpoints:
        report = _prepare_dataset(config)
        mesh = make_mesh(config.mesh, jax.devices())
        rows = local_rows(mesh, config.batch_size)
        start = _start(config, report, mesh)
        state = _initial_state(config, start, mesh)
        done = checkpoints.latest_step
        if done:
            state = _restore(checkpoints, state)
            echo(f"resuming {config.run_dir} after step {done}")
        if done == config.steps:
            return TrainResult(done, True, _export(config, start, state, echo, overwrite=False), {})

        span = config.span_of(done)
        compiled = _compile_step(config, span, start, state, report, mesh)
        for line in describe_plan(config, report, state, compiled.memory_analysis(), mesh):
            echo(line)
        data = make_train_iterator(
            config.dataset.path,
            batch_size=config.batch_size,
            seed=config.seed,
            random_block_phase=config.random_block_phase,
            vocab_size=start.config.vocab_size,
            first_batch=done,
            rows=rows,
        )
        evaluate = functools.partial(_evaluate, config, _jit_eval(config, start, mesh), mesh, rows)
        last_eval: Mapping[str, float] = {}
        vote = hosts.StopVote()
        with MetricsLog(config.run_dir, done, is_mute=not hosts.is_first()) as log:
            reporter = StepReporter(log, config, on_step, echo)
            for step in range(done + 1, config.steps + 1):
                if step > span.stop:
                    # Compiling is no part of any step's time.
                    reporter.flush()
                    span = config.span_of(step - 1)
                    compiled = _compile_step(config, span, start, state, report, mesh)
                    echo(f"stage {span.number} of {len(config.spans)} begins: {describe_span(span)}")
                    reporter.restart_clock()
                state, metrics = compiled(state, place(next(data), mesh, config.batch_size))
                reporter.push(step, metrics)
                is_last, is_stopping = step == config.steps, vote.cast(should_stop())
                if config.eval_batches and (is_last or (config.eval_every and step % config.eval_every == 0)):
                    reporter.flush()
                    last_eval = evaluate(state)
                    log.write(step, "eval", last_eval)
                    echo(format_eval(step, last_eval))
                    reporter.restart_clock()
                if is_last or is_stopping or checkpoints.is_due(step):
                    # A checkpoint vouches for the steps before it: their metrics are checked and on disk
                    # first.
                    reporter.flush()
                    log.sync()
                    checkpoints.save(step, _saved(state))
                    reporter.restart_clock()
                if is_stopping and not is_last:
                    checkpoints.wait()
                    echo(f"stopped after step {step}, saved; the same command resumes")
                    return TrainResult(step, False, None, last_eval)
        checkpoints.wait()
        return TrainResult(config.steps, True, _export(config, start, state, echo, overwrite=True), last_eval)


def export_latest(config: TrainConfig, *, echo: Echo = print) -> Path:
    """Exports the newest checkpoint of a run, finished or not.

    Raises:
        ConfigError: the run has no checkpoint, or the folder belongs to a run with other settings.
    """
    if not hosts.is_first():
        echo = _ignore
    with _exclusive(config), _open_checkpoints(config) as checkpoints:
        if not checkpoints.latest_step:
            raise ConfigError(f"{config.run_dir} holds no checkpoint to export")
        mesh = make_mesh(config.mesh, jax.devices())
        start = _start(config, read_report(config.dataset.path), mesh)
        state = _restore(checkpoints, _initial_state(config, start, mesh))
        return _export(config, start, state, echo, overwrite=True)


def _ignore(line: str) -> None:
    del line


@contextlib.contextmanager
def _exclusive(config: TrainConfig) -> Iterator[None]:
    """One run per folder; process 0 holds the lock, which dies with it, however that ends."""
    ours, lock_path = to_yaml(config), config.run_dir / ".lock"
    with contextlib.ExitStack() as held:

        def lock_and_tell() -> str:
            config.run_dir.mkdir(parents=True, exist_ok=True)
            try:
                fcntl.flock(held.enter_context(lock_path.open("w")), fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(f"{config.run_dir} is being trained by another process") from None
            return ours

        if hosts.from_first("lock", lock_and_tell) != ours:
            raise ConfigError(f"process {jax.process_index()} was given another config than process 0")
        if not lock_path.exists():
            raise ConfigError(
                f"process {jax.process_index()} does not see {config.run_dir}, which process 0 has made: output_dir "
                "must be a folder that all hosts share"
            )
        yield


@contextlib.contextmanager
def _open_checkpoints(config: TrainConfig) -> Iterator[Checkpoints]:
    snapshot = config.run_dir / "config.yaml"
    with Checkpoints(config.run_dir, save_every=config.save_every, keep=config.keep) as checkpoints:
        if checkpoints.latest_step and snapshot.exists():
            before, now = dataclasses.asdict(load_config(snapshot)), dataclasses.asdict(config)
            changed = [key for key in now if key not in _FREE_KEYS and now[key] != before[key]]
            if changed:
                raise ConfigError(
                    f"{config.run_dir} was trained for {checkpoints.latest_step} steps with "
                    + ", ".join(f"{key}={before[key]!r} (now {now[key]!r})" for key in changed)
                    + ": choose another run_name, or delete the folder"
                )
        if hosts.is_first():
            # Replaced in one go: a kill in between must not leave half a file, which the next start would refuse.
            partial = snapshot.with_suffix(".partial")
            partial.write_text(to_yaml(config), encoding="utf-8")
            partial.replace(snapshot)
        yield checkpoints


def _prepare_dataset(config: TrainConfig) -> DatasetReport:
    def fingerprint_of_built() -> str:
        if config.dataset.build is None:
            return read_report(config.dataset.path).fingerprint
        settings = DatasetSettings(**dataclasses.asdict(config.dataset.build))
        return build_dataset(settings, config.dataset.path, show_progress=True).fingerprint

    wanted = hosts.from_first("dataset", fingerprint_of_built)
    report = read_report(config.dataset.path)
    if report.fingerprint != wanted:
        raise ValueError(f"process {jax.process_index()} sees another dataset in {config.dataset.path} than process 0")
    return report


def _start(config: TrainConfig, report: DatasetReport, mesh: Mesh | None) -> StartingPoint:
    tokenizer = AutoTokenizer.from_pretrained(Path(config.dataset.path) / "tokenizer", local_files_only=True)
    start = initialize(config, tokenizer, mesh)
    check_vocabulary(config.dataset.path, start.config.vocab_size)
    if report.settings.max_seq_len > start.config.max_position:
        raise ValueError(
            f"rows of {report.settings.max_seq_len} tokens exceed the model's {start.config.max_position=}"
        )
    if mesh is not None:
        check_mesh(mesh, config, start.config, report.settings.max_seq_len)
    return start


def _initial_state(config: TrainConfig, start: StartingPoint, mesh: Mesh | None) -> TrainState:
    if mesh is None:
        return init_state(config, start.trainable, start.frozen)
    init = functools.partial(init_state, config)
    sharding = state_sharding(jax.eval_shape(init, start.trainable, start.frozen), mesh)
    # Donated: parameters are taken over, not copied.
    return jax.jit(init, out_shardings=sharding, donate_argnums=(0, 1))(start.trainable, start.frozen)


def _saved(state: TrainState) -> dict[str, Any]:
    # The frozen base comes from `init_from` again: an adapter's checkpoint stays a few megabytes.
    return {"step": state.step, "params": state.params, "opt_state": state.opt_state}


def _restore(checkpoints: Checkpoints, state: TrainState) -> TrainState:
    return state._replace(**checkpoints.restore(_saved(state)))


def _compile_step(
    config: TrainConfig,
    span: Span,
    start: StartingPoint,
    state: TrainState,
    report: DatasetReport,
    mesh: Mesh | None,
) -> jax.stages.Compiled:
    step, batch = make_train_step(start.graph, config, span), _abstract_batch(config, report, mesh)
    if mesh is None:
        return jax.jit(step, donate_argnums=0).lower(state, batch).compile()
    # The state comes back as it went in, or it could not be donated; metrics are on every device.
    returned = (state_sharding(state, mesh), NamedSharding(mesh, PartitionSpec()))
    with jax.set_mesh(mesh):
        return jax.jit(step, donate_argnums=0, out_shardings=returned).lower(state, batch).compile()


def _abstract_batch(config: TrainConfig, report: DatasetReport, mesh: Mesh | None) -> Batch:
    shape = (config.batch_size, report.settings.max_seq_len)
    sharding = None if mesh is None else NamedSharding(mesh, ROWS)
    ints = np.zeros(shape, np.int32)
    batch = Batch(ints, ints, ints, np.zeros(shape, np.bool_), ints)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), batch)


def _jit_eval(config: TrainConfig, start: StartingPoint, mesh: Mesh | None) -> Callable[..., Metrics]:
    evaluate = make_eval_step(start.graph, config)
    # On every device, as the metrics of a step: each process reads them.
    return evaluate if mesh is None else jax.jit(evaluate, out_shardings=NamedSharding(mesh, PartitionSpec()))


def _evaluate(
    config: TrainConfig,
    eval_step: Callable[..., Metrics],
    mesh: Mesh | None,
    rows: Sequence[int],
    state: TrainState,
) -> dict[str, float]:
    """Means over the held-out rows: `loss`, its terms, and acceptance by depth when introspective."""
    total: Metrics | None = None
    for batch in heldout_batches(config.dataset.path, config.batch_size, config.eval_batches, rows):
        with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
            terms = eval_step(state.params, state.frozen, place(batch, mesh, config.batch_size))
        total = terms if total is None else jax.tree.map(jnp.add, total, terms)
    assert total is not None  # a dataset always has held-out rows, and eval_batches is positive
    result = {name: float(term.mean) for name, term in total.items()}
    loss = result["ce_clean"]
    if config.objective == "introspective":
        loss = result["loss_noisy"] + result["alpha"] * result["ce_clean"]
    return {"loss": loss, **result}


def _export(config: TrainConfig, start: StartingPoint, state: TrainState, echo: Echo, *, overwrite: bool) -> Path:
    folder = config.run_dir / ("adapter" if config.lora else "hf")

    def write() -> str:
        lm = start.language_model(params, state.frozen)
        if config.lora:
            assert config.init_from is not None  # TrainConfig demands it of lora
            export_adapter(lm, folder, base_model_name_or_path=config.init_from, overwrite=True)
        else:
            export_hf(lm, folder, overwrite=True)
        return ""

    # Exports appear whole or not at all, so a folder that is there is complete.
    if overwrite or not folder.exists():
        params = hosts.gather_to_first(state.params)
        hosts.from_first("export", write)
    echo(f"exported   {folder}")
    return folder
