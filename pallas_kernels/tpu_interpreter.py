"""How the tests run TPU kernels on a CPU: with race detection, and strict about memory that nobody wrote."""

from jax.experimental.pallas import tpu as pltpu

STRICT = pltpu.InterpretParams(detect_races=True, out_of_bounds_reads="raise", uninitialized_memory="nan")


def interpreter(is_on: bool) -> pltpu.InterpretParams | bool:
    """The `interpret` argument of `pallas_call`."""
    return STRICT if is_on else False
