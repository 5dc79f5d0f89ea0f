"""`python -m train CONFIG --plan`: compiles a run's step for devices that need not be there, and says whether it fits.

Nothing is loaded, downloaded or trained. What a device holds is the compiler's own account of the step; the times are
bounds from published peaks, not measurements.
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from idlm_jax.config import ModelConfig, from_hf_config
from idlm_jax.deviceless import compile_for
from idlm_jax.qwen3_sizes import QWEN3_SIZES
from pallas_kernels.bodies import choose_kernels
from train.collectives import sent_bytes
from train.config import TrainConfig
from train.data import read_report
from train.flops import full_rows, recomputed_flops, step_flops
from train.initialize import abstract_start, trained_config
from train.mesh import AXES, check_mesh, make_mesh, on_host, state_sharding
from train.rows import abstract_batch
from train.step import TrainState, make_train_step
from train.targets import Device, find_device, named_devices

# XLA keeps some of a device for itself, and a GPU's allocator fragments. On GPUs set
# XLA_PYTHON_CLIENT_MEM_FRACTION=.92: JAX's default takes 75 %.
USABLE = 0.92


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run's step would take, per device where bytes are meant.

    Attributes:
        target: the devices, for people.
        mesh: devices per axis.
        num_params: of the whole model, and how many of them are trained.
        num_trained: those.
        param_bytes: parameters, as they are stored.
        optimizer_bytes: moments; 0 where they are offloaded.
        temporary_bytes: gradients, activations and gathered weights at the worst moment.
        device: limits of one device; None when they are not known.
        flops: of one step over all devices (`train.flops`).
        recomputed: run again on top of that, for `remat`.
        sent: bytes that a device sends in a step, by kind of collective (`train.collectives`).
        tokens: data tokens of one step, full rows.
        row_len: of one row.
    """

    target: str
    mesh: dict[str, int]
    num_params: int
    num_trained: int
    param_bytes: int
    optimizer_bytes: int
    temporary_bytes: int
    device: Device | None
    flops: float
    recomputed: float
    sent: dict[str, float]
    tokens: int
    row_len: int

    @property
    def bytes_per_device(self) -> int:
        return self.param_bytes + self.optimizer_bytes + self.temporary_bytes

    @property
    def sent_bytes(self) -> float:
        return float(sum(self.sent.values()))

    @property
    def fits(self) -> bool:
        """True where the memory is unknown."""
        return self.device is None or self.bytes_per_device <= USABLE * self.device.memory

    @property
    def num_devices(self) -> int:
        return math.prod(self.mesh.values())

    @property
    def compute_s(self) -> float:
        """Seconds of a step at the peak of all devices, recomputation included; 0 where the peak is unknown."""
        return (self.flops + self.recomputed) / (self.num_devices * self.device.flops) if self.device else 0.0

    @property
    def links_s(self) -> float:
        """Seconds that what is sent spends on the interconnect at its peak."""
        return self.sent_bytes / self.device.link if self.device else 0.0

    @property
    def bound_s(self) -> float:
        """Least seconds of a step: arithmetic and links overlapped."""
        return max(self.compute_s, self.links_s)

    def seconds_at(self, mfu: float) -> float:
        """Seconds of a step at that share of the peak; 0 where the peak is unknown."""
        return self.flops / (mfu * self.num_devices * self.device.flops) if self.device else 0.0


def make_plan(config: TrainConfig, target: str | None = None) -> Plan:
    """Compiles the step of the run's last stage.

    Args:
        config: the run. The shape of the model comes from `model`, from `init_from` where it is a folder, or by the
            name of a released Qwen3; the length of rows from the dataset, or from `dataset.build`.
        target: name of devices (`named_devices`); None for those of this machine.

    Raises:
        ValueError: unknown target, model or row length; sizes that do not divide over the mesh.
        RuntimeError: the compiler for the target is not installed; or the step does not fit, by that compiler.
    """
    if target is None:
        devices: Sequence[Any] = jax.devices()
        device, where = find_device(devices[0].device_kind), f"{len(devices)} x {devices[0].device_kind}"
    else:
        device, devices = named_devices(target)
        where = f"{target} ({len(devices)} x {devices[0].device_kind})"
    platform = {"cuda": "gpu"}.get(devices[0].platform, devices[0].platform)
    cut = make_mesh(config.mesh, devices)
    base = dataclasses.replace(_base_config(config), kernels=choose_kernels(config.kernels, platform=platform))
    model, row_len = trained_config(config, base), _row_len(config)
    if cut is not None:
        check_mesh(cut, config, model, row_len)
    mesh = cut or Mesh([[[[devices[0]]]]], AXES, axis_types=(AxisType.Auto,) * len(AXES))
    graph, state = abstract_start(config, model)
    placed = _place_state(state, config, mesh)
    batch = abstract_batch(config.batch_size, row_len, mesh)
    everywhere = NamedSharding(mesh, PartitionSpec())
    step = make_train_step(graph, config)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, placed)
    if target is None:
        with jax.set_mesh(mesh):
            jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, everywhere))
            compiled = jitted.lower(placed, batch).compile()
    else:
        compiled = compile_for(mesh, step, placed, batch, donate_argnums=0, out_shardings=(shardings, everywhere))
    memory: Any = compiled.memory_analysis()
    tokens = config.batch_size * row_len
    work = full_rows(config.batch_size, row_len)
    span = config.spans[-1]
    is_ar = config.objective == "ar"
    return Plan(
        target=where,
        mesh=dict(mesh.shape),
        num_params=_count((state.params, state.frozen)),
        num_trained=_count(state.params),
        param_bytes=_held((placed.params, placed.frozen)),
        optimizer_bytes=0 if config.offload_optimizer else _held(placed.opt_state),
        temporary_bytes=memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes,
        device=device,
        flops=step_flops(model, work, is_ar=is_ar, has_divergence=span.has_divergence),
        recomputed=recomputed_flops(model, work, is_ar=is_ar),
        sent=sent_bytes(compiled.as_text() or ""),
        tokens=tokens,
        row_len=row_len,
    )


def describe(plan: Plan, config: TrainConfig) -> Iterator[str]:
    """The plan in lines for people."""
    giga = 1e9
    yield f"target     {plan.target}; mesh " + " x ".join(f"{name} {size}" for name, size in plan.mesh.items())
    yield f"parameters {plan.num_params:,}, of which {plan.num_trained:,} are trained"
    yield (
        f"a device   {plan.param_bytes / giga:.2f} GB parameters + {plan.optimizer_bytes / giga:.2f} GB optimizer + "
        f"{plan.temporary_bytes / giga:.2f} GB gradients and activations = {plan.bytes_per_device / giga:.2f} GB"
    )
    yield (
        f"a step     {plan.tokens:,} tokens ({config.batch_size} full rows of {plan.row_len}), {plan.flops:.3g} FLOP"
        + (f" and {plan.recomputed:.3g} again for remat={config.remat}" if plan.recomputed else "")
    )
    sent = ", ".join(f"{kind} {size / giga:.2f} GB" for kind, size in plan.sent.items())
    yield f"it sends   {plan.sent_bytes / giga:.2f} GB a device: {sent or 'nothing'}"
    if plan.device is None:
        yield "limits     unknown for these devices: no times, no verdict on memory"
        return
    yield (
        f"at best    {plan.bound_s:.3g} s a step: {plan.compute_s:.3g} s of arithmetic at peak, "
        f"{plan.links_s:.3g} s over links, overlapped; "
        f"{plan.tokens / plan.bound_s:,.0f} tokens/s"
    )
    at_40 = plan.seconds_at(0.4)
    yield f"at 40% MFU {at_40:.3g} s a step, {config.steps:,} steps in {at_40 * config.steps / 3600:,.1f} h"
    share = plan.bytes_per_device / plan.device.memory
    verdict = "fits" if plan.fits else f"DOES NOT FIT: {USABLE:.0%} are usable"
    yield f"memory     {share:.0%} of {plan.device.memory / giga:.0f} GB: {verdict}"


def _base_config(config: TrainConfig) -> ModelConfig:
    if config.model is not None:
        return ModelConfig(**dataclasses.asdict(config.model))
    assert config.init_from is not None  # TrainConfig admits exactly one of the two
    file = Path(config.init_from) / "config.json"
    if file.is_file():
        return from_hf_config(json.loads(file.read_text(encoding="utf-8")), mask_token_id=config.mask_token_id)
    name = Path(config.init_from).name
    if name not in QWEN3_SIZES:
        raise ValueError(
            f"init_from={config.init_from!r} is no folder with a config.json, and {name!r} is none of "
            f"{', '.join(QWEN3_SIZES)}: the shape of the model is unknown"
        )
    return QWEN3_SIZES[name]


def _row_len(config: TrainConfig) -> int:
    if config.dataset.build is not None:
        return config.dataset.build.max_seq_len
    try:
        return read_report(config.dataset.path).settings.max_seq_len
    except ValueError as error:
        raise ValueError(
            f"{error}; to plan without the dataset, give dataset.build.max_seq_len and dataset.build.tokenizer"
        ) from None


def _place_state(state: TrainState, config: TrainConfig, mesh: Mesh) -> TrainState:
    sharding = state_sharding(state, mesh)
    if config.offload_optimizer:
        sharding = sharding._replace(opt_state=on_host(sharding.opt_state))
    return jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), state, sharding)


def _held(tree: Any) -> int:
    """Bytes of one device's part."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _count(tree: Any) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))
