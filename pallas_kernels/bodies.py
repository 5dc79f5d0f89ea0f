"""Which body of an op runs: chosen by name once, at start-up, and logged; an op never falls back to another.

Every op has a `reference` body in plain jnp, which XLA compiles for any platform. Faster bodies stand beside it under
one contract and pass the same tests.
"""

import dataclasses
import enum
import functools
import logging

import jax

logger = logging.getLogger(__name__)


class Body(enum.Enum):
    """An implementation of an op.

    REFERENCE: plain jnp, any platform. TRITON: Pallas through the Triton backend, NVIDIA sm_80 and newer.
    TPU: Pallas through Mosaic. JAX_TRITON: the same maths in the Triton language, for the day when Pallas drops its
    Triton backend (deprecated since jax 0.11). PAGE_WALK: paged attention in plain jnp that
    sums in the kernels' order.
    """

    REFERENCE = "reference"
    TRITON = "triton"
    TPU = "tpu"
    JAX_TRITON = "jax_triton"
    PAGE_WALK = "page_walk"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernels:
    """One body for every op that has a choice; hashable, so that compiled programs may take it as static.

    Attributes:
        paged_attention: attention of a few new tokens over a paged KV cache, and the writes into its pages.
        two_stream_attention: training attention.
        verify: statistics, acceptance and draws over the vocabulary.
        quantized_matmul: int8 and fp8 weights.
        interpret: run Pallas bodies in Pallas' interpreter; for tests, on CPU.
    """

    paged_attention: Body = Body.REFERENCE
    two_stream_attention: Body = Body.REFERENCE
    verify: Body = Body.REFERENCE
    quantized_matmul: Body = Body.REFERENCE
    interpret: bool = False

    def __str__(self) -> str:
        ops = [field.name for field in dataclasses.fields(self) if field.name != "interpret"]
        return ", ".join(f"{op}={getattr(self, op).value}" for op in ops) + ", interpreted" * self.interpret


REFERENCE = Kernels()
# What each name stands for. A kernel that was measured slower than XLA on its platform does not belong here.
BY_NAME = {
    "reference": REFERENCE,
    # 8-bit weights: of a stack of layers, XLA's product would read a copy (docs/decisions/0014-eight-bit-weights.md).
    "triton": Kernels(
        paged_attention=Body.TRITON,
        two_stream_attention=Body.TRITON,
        verify=Body.TRITON,
        quantized_matmul=Body.TRITON,
    ),
    # For the day when Pallas has no Triton backend, as far as it goes.
    "jax_triton": Kernels(paged_attention=Body.JAX_TRITON),
    "tpu": Kernels(paged_attention=Body.TPU, two_stream_attention=Body.TPU, verify=Body.TPU, quantized_matmul=Body.TPU),
}
BY_PLATFORM = {"cpu": "reference", "gpu": "triton", "tpu": "tpu"}


@functools.cache
def choose_kernels(name: str = "auto", *, platform: str | None = None) -> Kernels:
    """Resolves a name to one body per op and logs the choice, once a process.

    Args:
        name: "auto" for the platform's, or a key of `BY_NAME`.
        platform: "cpu", "gpu" or "tpu"; that of jax's default backend by default.

    Raises:
        ValueError: `name` or `platform` is unknown.
    """
    platform = platform or jax.default_backend()
    if name == "auto":
        if platform not in BY_PLATFORM:
            raise ValueError(f"no kernels are known for {platform=}: name them, one of {sorted(BY_NAME)}")
        kernels = BY_NAME[BY_PLATFORM[platform]]
    elif name in BY_NAME:
        kernels = BY_NAME[name]
    else:
        raise ValueError(f"kernels={name!r} is not one of {['auto', *sorted(BY_NAME)]}")
    logger.info("kernels for %s (%s): %s", platform, name, kernels)
    return kernels


def refuse(op: str, body: Body, reason: str, bodies: tuple[Body, ...]) -> NotImplementedError:
    """The error of a body that cannot do what it is asked, which names those that the op has."""
    others = ", ".join(other.value for other in bodies if other is not body)
    return NotImplementedError(f"{op}: the {body.value} body {reason}; other bodies: {others}")


def device_kind() -> str:
    """Kind of the default device, such as "NVIDIA H200" or "TPU v5 lite": the key of measured tile tables."""
    return jax.devices()[0].device_kind
