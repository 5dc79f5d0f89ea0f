"""Kinds of accelerators: what a device holds and how fast it can be at most. Used by MFU and by `--plan`."""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """Published limits of one device.

    Attributes:
        name: as in the name of a target.
        kinds: how JAX spells it (`device.device_kind`), beginnings of it.
        memory: bytes.
        flops: dense bfloat16 operations a second.
        link: bytes a second that a device sends over its interconnect in one direction, in a ring.
    """

    name: str
    kinds: tuple[str, ...]
    memory: int
    flops: float
    link: float


# NVIDIA data sheets (SXM, without sparsity; NVLink 4); cloud.google.com/tpu/docs/system-architecture-tpu-vm, and
# jax-ml.github.io/scaling-book for the links of a bidirectional ring.
DEVICES = (
    Device(name="h100", kinds=("NVIDIA H100",), memory=80_000_000_000, flops=989e12, link=450e9),
    Device(name="h200", kinds=("NVIDIA H200",), memory=141_000_000_000, flops=989e12, link=450e9),
    Device(name="v5e", kinds=("TPU v5 lite", "TPU v5e"), memory=16 * 2**30, flops=197e12, link=90e9),
    Device(name="v5p", kinds=("TPU v5p", "TPU v5"), memory=95 * 2**30, flops=459e12, link=180e9),
    Device(name="v6e", kinds=("TPU v6 lite", "TPU v6e"), memory=32 * 2**30, flops=918e12, link=180e9),
)

# Chips of a slice -> its topology; cloud.google.com/tpu/docs. A number under v5p counts two cores per chip.
_FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CUBE = {
    4: "2x2x1",
    8: "2x2x2",
    16: "2x2x4",
    32: "2x4x4",
    64: "4x4x4",
    128: "4x4x8",
    256: "4x8x8",
    512: "8x8x8",
    1024: "8x8x16",
    2048: "8x16x16",
    4096: "16x16x16",
}
GPUS_PER_HOST = 8


def find_device(kind: str) -> Device | None:
    """The entry of a `device_kind`; None for one that is not in the table, such as a CPU."""
    return next((device for device in DEVICES if kind.startswith(device.kinds)), None)


def named_devices(target: str) -> tuple[Device, Sequence[Any]]:
    """Devices that exist only for the compiler.

    Args:
        target: "h100x8" (GPUs; whole hosts of 8 beyond that), "v5e-16", "v6e-64" (chips) or "v5p-64" (cores, two a
            chip, as Google counts them).

    Raises:
        ValueError: no such target; the message lists those that there are.
        RuntimeError: the compiler for it is not installed.
    """
    from idlm_jax.deviceless import gpu_devices, tpu_devices

    match = re.fullmatch(r"(h100|h200)x(\d+)|(v5e|v6e|v5p)-(\d+)", target)
    if match is None:
        raise ValueError(f"{target!r} is no target: h100x8, h200x1, ... (GPUs), v5e-16, v6e-64, ... or v5p-64, ...")
    device = next(device for device in DEVICES if device.name in match.group(1, 3))
    number = int(match[2] or match[4])
    if match[1]:
        if number < 1 or (number > GPUS_PER_HOST and number % GPUS_PER_HOST):
            raise ValueError(f"{target!r}: up to {GPUS_PER_HOST} GPUs, or whole hosts of {GPUS_PER_HOST}")
        hosts = math.ceil(number / GPUS_PER_HOST)
        return device, gpu_devices(device.kinds[0], device.memory, hosts, number // hosts)
    topologies = _CUBE if device.name == "v5p" else _FLAT
    chips = number // 2 if device.name == "v5p" else number
    if chips not in topologies:
        known = [f"{device.name}-{chips * (2 if device.name == 'v5p' else 1)}" for chips in topologies]
        raise ValueError(f"{target!r} is no slice: {', '.join(known)}")
    return device, tpu_devices(f"{device.name}:{topologies[chips]}")
