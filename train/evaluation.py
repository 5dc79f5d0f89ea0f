"""Held-out measures of a run, and completions of fixed held-out prompts."""

import contextlib
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from idlm_jax.decoding.method import AR, ISD, BlockDiffusion, Method
from train.config import TrainConfig
from train.data import heldout_batches, heldout_prompts
from train.initialize import StartingPoint
from train.metrics import drop_lines_after
from train.row_means import Metrics
from train.rows import place
from train.samples import PROMPT_TOKENS, Sample, draw_samples
from train.step import TrainState, make_eval_step


class Evaluator:
    """Measures a run's state on the same held-out rows each time; compiled at the first."""

    def __init__(self, config: TrainConfig, start: StartingPoint, mesh: Mesh | None, rows: Sequence[int]):
        self._config, self._start, self._mesh, self._rows = config, start, mesh, rows
        evaluate = make_eval_step(start.graph, config)
        # On every device, as the metrics of a step: each process reads them.
        self._evaluate: Callable[..., Metrics] = (
            evaluate if mesh is None else jax.jit(evaluate, out_shardings=NamedSharding(mesh, PartitionSpec()))
        )

    def measure(self, state: TrainState) -> dict[str, float]:
        """Means over the held-out rows: `loss`, its terms, and acceptance by depth unless next tokens are all."""
        config, mesh = self._config, self._mesh
        total: Metrics | None = None
        for batch in heldout_batches(config.dataset.path, config.batch_size, config.eval_batches, self._rows):
            with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
                terms = self._evaluate(state.params, state.frozen, place(batch, mesh, config.batch_size))
            total = terms if total is None else jax.tree.map(jnp.add, total, terms)
        assert total is not None  # a dataset always has held-out rows, and eval_batches is positive
        result = {name: float(term.mean) for name, term in total.items()}
        loss = result["ce_clean"]
        if config.objective == "introspective":
            loss = result["loss_noisy"] + result["alpha"] * result["ce_clean"]
        return {"loss": loss, **result}

    def draw(self, state: TrainState) -> list[Sample]:
        """Greedy completions, as the run trains for; none where several processes hold the model."""
        if not self._config.eval_samples or jax.process_count() > 1:
            return []
        lm = self._start.language_model(state.params, state.frozen)
        return list(draw_samples(lm, self._prompts, self._method(), self._mesh))

    def _method(self) -> Method:
        config = self._config
        match config.objective:
            case "ar":
                return AR()
            case "introspective":
                return ISD(stride=config.block_length + 1)
            case "block_diffusion":
                return BlockDiffusion(config.block_length, predicts_next=config.predicts_next)

    @functools.cached_property
    def _prompts(self) -> list[list[int]]:
        return heldout_prompts(self._config.dataset.path, self._config.eval_samples, PROMPT_TOKENS)


class SamplesLog:
    """`samples.jsonl`: a line per completion, cut back to the step that training restarts from."""

    def __init__(self, run_dir: Path, start_step: int):
        self._path = run_dir / "samples.jsonl"
        drop_lines_after(self._path, start_step)

    def write(self, step: int, samples: Sequence[Sample]) -> None:
        if samples:
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps({"step": step, **sample._asdict()}) + "\n" for sample in samples)


def score_of(config: TrainConfig, measured: Mapping[str, float]) -> float:
    """What `keep_best` compares, higher is better: acceptance; for a plain language model the loss, negated."""
    return -measured["loss"] if config.objective == "ar" else measured["acceptance"]
