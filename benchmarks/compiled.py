"""What the compilers make of every kernel, without a device: `make compiled` writes `benchmarks/results/compiled/`.

For sm_90 the kernels are read from XLA's thunk sequence, for TPU the memory of each kernel from the optimised HLO.
Nothing runs; nothing here says anything about speed.
"""

import datetime
import functools
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax.stages import Compiled
from tqdm import tqdm

from benchmarks.device.case import KERNEL_BODY, Case, setting_of
from benchmarks.device.cases import cases_of
from idlm_jax.deviceless import compile_and_list, compile_for, h200_mesh, on_mesh, tpu_mesh

FOLDER = Path(__file__).parent / "results" / "compiled"
# The ops that have kernels; gradients of two_stream_attention take TPU compilers longest.
BY_COST = ("quantized_matmul", "paged_attention", "verify", "two_stream_attention")
TPUS = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "v5p": "v5p:2x2x1"}
_VMEM = re.compile(r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"0","size":"(\d+)"\}\]')


class OnGpu(NamedTuple):
    """A case compiled for sm_90."""

    launches: int  # kernels of the whole program
    shared_memory_bytes: int  # of the kernel that takes most
    temp_bytes: int


class OnTpu(NamedTuple):
    """A case compiled for a TPU."""

    vmem_bytes: int  # of the kernel that takes most
    temp_bytes: int


def arguments_of(case: Case) -> tuple[Any, ...]:
    """The inputs of a case as shapes."""
    return jax.eval_shape(functools.partial(case.make_inputs, 0))


def compile_for_gpu(case: Case, mesh: Mesh) -> OnGpu:
    """Raises whatever the compiler raises."""
    program, arguments = case.programs[KERNEL_BODY["gpu"].value], on_mesh(arguments_of(case), mesh, P())
    compiled, launches = compile_and_list(mesh, program, *arguments, donate_argnums=_donated(case))
    return OnGpu(len(launches), max(each.shared_memory_bytes for each in launches), _temp_bytes(compiled))


def compile_for_tpu(case: Case, mesh: Mesh) -> OnTpu:
    """Raises whatever the compiler raises."""
    program, arguments = case.programs[KERNEL_BODY["tpu"].value], on_mesh(arguments_of(case), mesh, P())
    compiled = compile_for(mesh, program, *arguments, donate_argnums=_donated(case))
    kernels = [
        line for line in (compiled.as_text() or "").splitlines() if 'custom_call_target="tpu_custom_call"' in line
    ]
    sizes = [int(size) for line in kernels for size in _VMEM.findall(line)]
    return OnTpu(max(sizes, default=0), _temp_bytes(compiled))


def _donated(case: Case) -> tuple[int, ...]:
    return (0,) if case.donates_first else ()


def _temp_bytes(compiled: Compiled) -> int:
    memory = compiled.memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes


def main() -> int:
    """Compiles everything and writes a table per op; returns 1 if a compiler refused something."""
    num_refused = sum(report(op) for op in BY_COST)
    return 1 if num_refused else 0


def report(op: str) -> int:
    """Compiles the timed cases of one op for every target, writes its table, and returns how many were refused."""
    kernels: dict[str, dict[str, Case]] = {}
    for platform, body in KERNEL_BODY.items():
        cases = cases_of(op, setting_of(platform, is_dry=False))
        kernels[platform] = {case.name: case for case in cases if body.value in case.programs and case.is_timed}
    targets: dict[str, Callable[[str], OnGpu | OnTpu]] = {
        "h200": lambda name: compile_for_gpu(kernels["gpu"][name], h200_mesh())
    }
    for kind, topology in TPUS.items():
        mesh = tpu_mesh(topology, (1,), ("data",))
        targets[kind] = lambda name, mesh=mesh: compile_for_tpu(kernels["tpu"][name], mesh)
    rows, refusals = [], []
    for name in tqdm([name for name in kernels["gpu"] if name in kernels["tpu"]], desc=op, unit="case"):
        results: dict[str, OnGpu | OnTpu | None] = {}
        for kind, compile_case in targets.items():
            try:
                results[kind] = compile_case(name)
            # Compilers, lowering rules and our own contracts raise unrelated families; the table must hold them all.
            except Exception as error:
                results[kind] = None
                refusals.append(f"- `{name}` on {kind}: {type(error).__name__}: {str(error).splitlines()[0][:200]}")
        rows.append(_row(name, results))
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / f"{op}.md").write_text(_page(op, rows, refusals))
    return len(refusals)


def _row(name: str, results: dict[str, OnGpu | OnTpu | None]) -> str:
    gpu = results["h200"]
    assert not isinstance(gpu, OnTpu)
    cells = ["refused"] * 3
    if gpu is not None:
        cells = [str(gpu.launches), f"{gpu.shared_memory_bytes / 1024:.1f}", f"{gpu.temp_bytes / 1e6:.1f}"]
    for kind in TPUS:
        tpu = results[kind]
        assert not isinstance(tpu, OnGpu)
        cells.append("refused" if tpu is None else f"{tpu.vmem_bytes / 2**20:.2f} / {tpu.temp_bytes / 1e6:.1f}")
    return f"| {name} | {' | '.join(cells)} |"


def _page(op: str, rows: list[str], refusals: list[str]) -> str:
    heads = "".join(f" {kind}: VMEM MiB / temp MB |" for kind in TPUS)
    return (
        f"""# {op}, compiled for hardware that is not here

{datetime.date.today()}, jax {jax.__version__}, `make compiled`. Compiled, not run. Launches are the kernels of the
whole program, small XLA ones included; shared memory and VMEM are those of the kernel that takes most; temporaries are
the program's. An H200 block may have 227 KiB of shared memory.

| case | H200: launches | shared KiB | temp MB |{heads}
|---|---|---|---|{"---|" * len(TPUS)}
{chr(10).join(rows)}

{"Refused:" if refusals else "Nothing was refused."}

{chr(10).join(refusals)}
""".rstrip()
        + "\n"
    )


if __name__ == "__main__":
    sys.exit(main())
