"""Times what a PyTorch user would run, in a process of its own: a JSON list of specs on stdin, JSON lines on stdout.

Imports neither jax nor the packages. torch is optional, hence imported by name when the process runs.
"""

import importlib
import importlib.util
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from benchmarks.device.budget import SKIPPED

WORKING_SET_BYTES = 256 * 2**20
MAX_SETS = 16
REPEATS = 15
SAMPLE_MS = 5.0


def run_in_subprocess(specs: list[dict[str, Any]], timeout_s: float) -> list[dict[str, Any]]:
    """The lines of `specs`, or one line that says why there are none."""
    if importlib.util.find_spec("torch") is None:
        return [{"note": "torch is not installed"}]
    if timeout_s < 1:
        return [{"note": SKIPPED}]
    command = [sys.executable, "-m", "benchmarks.device.torch_rivals"]
    try:
        done = subprocess.run(
            command, input=json.dumps(specs), capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired as late:
        return [*_lines(late.stdout or b""), {"note": f"{SKIPPED}: the rest"}]
    lines = _lines(done.stdout)
    if done.returncode:
        error = done.stderr.strip().splitlines()[-1:] or ["no message"]
        lines.append({"note": f"the process ended with {done.returncode}: {error[0][:300]}"})
    return lines


def _lines(output: str | bytes) -> list[dict[str, Any]]:
    text = output.decode() if isinstance(output, bytes) else output
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def attention(torch: Any, spec: dict[str, Any], device: str) -> dict[str, tuple[Callable[[], Any], ...]]:
    """`scaled_dot_product_attention` over contiguous keys; causal or every key visible."""
    functional = importlib.import_module("torch.nn.functional")

    def one() -> Callable[[], Any]:
        q, k, v = _streams(torch, spec, device)

        def forward() -> Any:
            return functional.scaled_dot_product_attention(q, k, v, is_causal=spec["is_causal"], enable_gqa=True)

        return _with_backward(torch, forward, (q, k, v)) if spec["backward"] else forward

    return {"torch SDPA": tuple(one() for _ in range(_num_sets(spec)))}


def two_stream(torch: Any, spec: dict[str, Any], device: str) -> dict[str, tuple[Callable[[], Any], ...]]:
    """`flex_attention`, compiled, over the concatenation of both streams under the same mask."""
    flex = importlib.import_module("torch.nn.attention.flex_attention")
    length = spec["queries"] // 2
    segment, position, start = (
        torch.tensor(spec["indices"][name], device=device) for name in ("segment_ids", "positions", "block_start")
    )

    def mask(batch: Any, head: Any, query: Any, key: Any) -> Any:
        i, j = query % length, key % length
        is_same = (segment[i] == segment[j]) & (segment[i] != 0)
        is_past = position[j] <= position[i]
        from_clean = (query >= length) & (key >= length) & is_past
        to_clean = (query < length) & (key >= length) & (position[j] < start[i])
        in_block = (query < length) & (key < length) & (start[i] == start[j]) & is_past
        return is_same & (from_clean | to_clean | in_block)

    block_mask = flex.create_block_mask(mask, None, None, 2 * length, 2 * length, device=device)
    attend = torch.compile(flex.flex_attention)

    def one() -> Callable[[], Any]:
        q, k, v = _streams(torch, spec, device)

        def forward() -> Any:
            return attend(q, k, v, block_mask=block_mask, enable_gqa=True)

        return _with_backward(torch, forward, (q, k, v)) if spec["backward"] else forward

    return {"torch flex_attention": tuple(one() for _ in range(_num_sets(spec)))}


def matmul(torch: Any, spec: dict[str, Any], device: str) -> dict[str, tuple[Callable[[], Any], ...]]:
    """bfloat16 rows times a bfloat16 weight."""

    def one() -> Callable[[], Any]:
        x = torch.randn(spec["rows"], spec["width"], device=device, dtype=torch.bfloat16)
        weight = torch.randn(spec["width"], spec["columns"], device=device, dtype=torch.bfloat16)
        return lambda: x @ weight

    return {"torch bfloat16 matmul": tuple(one() for _ in range(_num_sets(spec)))}


def linear_cross_entropy(torch: Any, spec: dict[str, Any], device: str) -> dict[str, tuple[Callable[[], Any], ...]]:
    """Head and cross-entropy over labelled rows, forward and backward, logits materialised."""
    functional = importlib.import_module("torch.nn.functional")
    hidden = torch.randn(spec["rows"], spec["width"], device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(spec["vocab_size"], spec["width"], device=device, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(spec["vocab_size"], (spec["rows"],), device=device)

    def step() -> Any:
        loss = functional.cross_entropy(functional.linear(hidden, weight).float(), labels)
        return torch.autograd.grad(loss, (hidden, weight))

    return {"torch materialised logits": (step,)}


KINDS = {
    "attention": attention,
    "two_stream": two_stream,
    "matmul": matmul,
    "linear_cross_entropy": linear_cross_entropy,
}


def time_spec(torch: Any, spec: dict[str, Any]) -> list[dict[str, Any]]:
    """Lines of one spec: milliseconds of one call, or why it could not run."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        programs = KINDS[spec["kind"]](torch, spec, device)
        return [
            {"case": spec["case"], "program": name, **_time(torch, calls, device)} for name, calls in programs.items()
        ]
    except Exception as error:  # a rival that cannot run is a result
        note = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        return [{"case": spec["case"], "program": spec["kind"], "note": note[:300]}]


def _time(torch: Any, calls: tuple[Callable[[], Any], ...], device: str) -> dict[str, Any]:
    if device == "cpu":
        for call in calls[:1]:
            call()
        return {"note": "dry"}
    for call in calls * 2:
        call()
    rounds = max(1, round(SAMPLE_MS / max(1e-3, _sample(torch, calls, 1) * len(calls))))
    samples = [_sample(torch, calls, rounds) for _ in range(REPEATS)]
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return {"median_ms": statistics.median(samples), "iqr_ms": high - low, "sets": len(calls), "note": ""}


def _sample(torch: Any, calls: tuple[Callable[[], Any], ...], rounds: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(rounds):
        for call in calls:
            call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / (rounds * len(calls))


def _streams(torch: Any, spec: dict[str, Any], device: str) -> tuple[Any, Any, Any]:
    def random(heads: int, rows: int) -> Any:
        shape = (spec["batch"], heads, rows, spec["head_dim"])
        return torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=spec["backward"])

    return (
        random(spec["heads"], spec["queries"]),
        random(spec["kv_heads"], spec["keys"]),
        random(spec["kv_heads"], spec["keys"]),
    )


def _with_backward(torch: Any, forward: Callable[[], Any], inputs: tuple[Any, ...]) -> Callable[[], Any]:
    cotangent = torch.randn_like(forward())

    def both() -> Any:
        return torch.autograd.grad(forward(), inputs, cotangent)

    return both


def _num_sets(spec: dict[str, Any]) -> int:
    return max(1, min(MAX_SETS, -(-WORKING_SET_BYTES // max(1, spec["set_bytes"]))))


def main() -> None:
    """Answers the specs on stdin, a line as soon as it is known."""
    torch = importlib.import_module("torch")
    for spec in json.load(sys.stdin):
        for line in time_spec(torch, spec):
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
