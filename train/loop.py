"""The only training loop: data -> step -> metrics -> checkpoint -> export, resumable at any step."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from transformers import AutoTokenizer

from idlm_jax import cluster
from idlm_jax.weights import export_adapter, export_hf
from train import hosts
from train.checkpoint import Checkpoints
from train.config import ConfigError, TrainConfig
from train.curriculum import Span, describe_span
from train.data import (
    DatasetReport,
    DatasetSettings,
    build_dataset,
    check_vocabulary,
    make_train_iterator,
    read_report,
)
from train.evaluation import Evaluator, SamplesLog, score_of
from train.flops import Work, step_flops
from train.guard import RecentBatches, TrainingDiverged
from train.initialize import StartingPoint, initialize
from train.mesh import check_mesh, make_mesh, on_host, state_sharding
from train.metrics import MetricsLog, OnStep, Speed, StepReporter, format_eval, open_wandb
from train.plan_report import describe_plan
from train.profile_window import ProfileWindow
from train.rows import abstract_batch, local_rows, place
from train.run_folder import exclusive, open_checkpoints
from train.samples import format_sample
from train.step import TrainState, init_state, make_train_step
from train.targets import find_device

Echo = Callable[[str], None]


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

    After `cluster.join` every process makes this same call, on one shared folder. Process 0 alone echoes, and writes
    all but the checkpoints.

    Args:
        config: the run.
        on_step: called after every step with its number, from 1, and its metrics.
        should_stop: asked after every step; once it says True, in any process, the run is saved and ends early.
        echo: takes the lines meant for people.

    Raises:
        ConfigError: the run folder belongs to a run with other settings, or to a running process.
        TrainingDiverged: a loss or gradient norm is NaN or infinite, or a loss a spike; the last checkpoint is from
            before, and the batch is saved in the run folder.
        ValueError: dataset, checkpoint and config do not fit together.
    """
    if not cluster.is_first():
        echo = _ignore
    with exclusive(config), open_checkpoints(config) as checkpoints:
        report = _prepare_dataset(config)
        mesh = make_mesh(config.mesh, jax.devices())
        start = _start(config, report, mesh)
        rows = local_rows(mesh, config.batch_size)
        state, done = _initial_state(config, start, mesh), 0
        if checkpoints.latest_step:
            state, done = _restore(checkpoints, state, None, echo)
            echo(f"resuming {config.run_dir} after step {done}")
        if done == config.steps:
            return TrainResult(done, True, _export(config, start, state, echo, overwrite=False), {})

        span = config.span_of(done)
        compiled = _compile_step(config, span, start, state, report, mesh)
        for line in describe_plan(config, report, start.config, state, compiled.memory_analysis(), mesh):
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
        evaluator, last_eval = Evaluator(config, start, mesh, rows), {}
        vote, profile, recent = hosts.StopVote(), ProfileWindow(config), RecentBatches()
        samples_log = SamplesLog(config.run_dir, done)
        wandb_run = open_wandb(config) if cluster.is_first() else None
        with (
            MetricsLog(config.run_dir, done, is_mute=not cluster.is_first(), wandb_run=wandb_run) as log,
            contextlib.closing(profile),
            _keeping_what_diverged(recent, config.run_dir),
        ):
            reporter = StepReporter(log, config, _speed(config, start, mesh), on_step, echo)
            for step in range(done + 1, config.steps + 1):
                if step > span.stop:
                    # Compiling is no part of any step's time.
                    reporter.flush()
                    span = config.span_of(step - 1)
                    compiled = _compile_step(config, span, start, state, report, mesh)
                    echo(f"stage {span.number} of {len(config.spans)} begins: {describe_span(span)}")
                    reporter.restart_clock()
                profile.before(step)
                batch = next(data)
                recent.push(step, batch)
                state, metrics = compiled(state, place(batch, mesh, config.batch_size))
                profile.after(step, metrics)
                reporter.push(step, metrics)
                is_last, is_stopping, score = step == config.steps, vote.cast(should_stop()), None
                if config.eval_batches and (is_last or (config.eval_every and step % config.eval_every == 0)):
                    reporter.flush()
                    last_eval, samples = evaluator.measure(state), evaluator.draw(state)
                    score = score_of(config, last_eval)
                    if samples:
                        rates = [sample.tokens_per_forward for sample in samples]
                        last_eval["tokens_per_forward"] = sum(rates) / len(rates)
                    log.write(step, "eval", last_eval)
                    samples_log.write(step, samples)
                    for line in (format_eval(step, last_eval), *map(format_sample, samples)):
                        echo(line)
                    reporter.restart_clock()
                is_best = config.keep_best and score is not None and checkpoints.is_best(score)
                if is_last or is_stopping or is_best or checkpoints.is_due(step):
                    # A checkpoint vouches for the steps before it: their metrics are checked and on disk
                    # first.
                    reporter.flush()
                    log.sync()
                    checkpoints.save(step, _saved(state), score if config.keep_best else None)
                    reporter.restart_clock()
                if is_stopping and not is_last:
                    checkpoints.wait()
                    echo(f"stopped after step {step}, saved; the same command resumes")
                    return TrainResult(step, False, None, last_eval)
        checkpoints.wait()
        return TrainResult(config.steps, True, _export(config, start, state, echo, overwrite=True), last_eval)


def export_checkpoint(config: TrainConfig, step: int | Literal["best"] | None = None, *, echo: Echo = print) -> Path:
    """Exports a checkpoint of a run, finished or not.

    Args:
        config: the run.
        step: which; None for the newest, "best" for the one that `keep_best` kept.
        echo: takes the lines meant for people.

    Raises:
        ConfigError: the run has no such checkpoint, or the folder belongs to a run with other settings.
    """
    if not cluster.is_first():
        echo = _ignore
    with exclusive(config), open_checkpoints(config) as checkpoints:
        if not checkpoints.latest_step:
            raise ConfigError(f"{config.run_dir} holds no checkpoint to export")
        if step == "best":
            if checkpoints.best is None:
                raise ConfigError(f"{config.run_dir} holds no checkpoint with a score: keep_best was off")
            step = checkpoints.best[0]
        if step is not None and step not in checkpoints.steps:
            raise ConfigError(f"{config.run_dir} holds checkpoints of steps {checkpoints.steps}, not of {step}")
        mesh = make_mesh(config.mesh, jax.devices())
        start = _start(config, read_report(config.dataset.path), mesh)
        state, step = _restore(checkpoints, _initial_state(config, start, mesh), step, echo)
        echo(f"step {step} of {config.steps}")
        return _export(config, start, state, echo, overwrite=True)


@contextlib.contextmanager
def _keeping_what_diverged(recent: RecentBatches, folder: Path) -> Iterator[None]:
    try:
        yield
    except TrainingDiverged as error:
        path = recent.save(error.step, folder, jax.process_index())
        raise TrainingDiverged(error.step, f"{error.reason}, on the batch in {path}") from None


def _speed(config: TrainConfig, start: StartingPoint, mesh: Mesh | None) -> Speed:
    model, device = start.config, find_device(jax.devices()[0].device_kind)

    def flops_of(step: int, metrics: Mapping[str, float]) -> float:
        span = config.span_of(step - 1)
        work = Work(metrics["tokens"], metrics["supervised_tokens"], metrics["clean_rows"], metrics["attended"])
        return step_flops(model, work, is_ar=config.objective == "ar", has_divergence=span.has_divergence)

    return Speed(flops_of=flops_of, num_devices=mesh.size if mesh else 1, peak=device and device.flops)


def _ignore(line: str) -> None:
    del line


def _prepare_dataset(config: TrainConfig) -> DatasetReport:
    def fingerprint_of_built() -> str:
        if config.dataset.build is None:
            return read_report(config.dataset.path).fingerprint
        settings = DatasetSettings(**dataclasses.asdict(config.dataset.build))
        return build_dataset(settings, config.dataset.path, show_progress=True).fingerprint

    wanted = cluster.from_first("dataset", fingerprint_of_built)
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
        state = init_state(config, start.trainable, start.frozen)
    else:
        init = functools.partial(init_state, config)
        sharding = state_sharding(jax.eval_shape(init, start.trainable, start.frozen), mesh)
        # Donated: parameters are taken over, not copied.
        state = jax.jit(init, out_shardings=sharding, donate_argnums=(0, 1))(start.trainable, start.frozen)
    if config.offload_optimizer:
        sharding = on_host(jax.tree.map(lambda x: x.sharding, state.opt_state))
        state = state._replace(opt_state=jax.device_put(state.opt_state, sharding))
    return state


def _saved(state: TrainState) -> dict[str, Any]:
    # The frozen base comes from `init_from` again: an adapter's checkpoint stays a few megabytes.
    return {"step": state.step, "params": state.params, "opt_state": state.opt_state}


def _restore(checkpoints: Checkpoints, state: TrainState, step: int | None, echo: Echo) -> tuple[TrainState, int]:
    restored, step = checkpoints.restore(_saved(state), step=step, tell=echo)
    return state._replace(**restored), step


def _compile_step(
    config: TrainConfig,
    span: Span,
    start: StartingPoint,
    state: TrainState,
    report: DatasetReport,
    mesh: Mesh | None,
) -> jax.stages.Compiled:
    step = make_train_step(start.graph, config, span)
    batch = abstract_batch(config.batch_size, report.settings.max_seq_len, mesh)
    # The state comes back as it went in, or it could not be donated; metrics are on every device.
    returned = jax.tree.map(lambda x: x.sharding, state), None if mesh is None else NamedSharding(mesh, PartitionSpec())
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        return jax.jit(step, donate_argnums=0, out_shardings=returned).lower(state, batch).compile()


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
        cluster.from_first("export", write)
    echo(f"exported   {folder}")
    return folder
