"""What a compiled step sends between devices, read from its HLO: which collectives, how often, how many bytes.

Counted are the bytes that one device sends if every collective of n devices is a ring: (n - 1) / n of what is gathered,
scattered or exchanged, twice that of what is reduced everywhere. Loops count as often as the compiler says they run.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator

ITEMSIZE = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2} | {
    f"{kind}{bits}": bits // 8 for kind in "suf" for bits in (8, 16, 32, 64)
}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
# A layout such as {1,0:T(8,128)} stands between a shape and the operation.
_OPERATION = re.compile(r" = (.+?)\s([a-z][a-z0-9\-]*)\(")
_SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|body|to_apply|called_computations)=\{?(%?[\w.\-]+(?:, ?%?[\w.\-]+)*)")
_BRANCHES = re.compile(r"(?:branch_computations=\{|true_computation=|false_computation=)([%\w.\-, ]+)")
_PARTITIONS = re.compile(r"^HloModule .*num_partitions=(\d+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_CONSTANT = re.compile(r"(%\S+) = s32\[\]\S* constant\((\d+)\)")
# {{0,1},{2,3}}, [2,2]<=[4], or axes of a mesh: mesh['data'=2,'fsdp'=2] {'fsdp'}. {} is everyone.
_GROUPS = re.compile(
    r"replica_groups=(?:\{\{(?P<first>[\d,]+)\}|\[\d+,(?P<size>\d+)\]<="
    r"|mesh\[(?P<mesh>[^\]]+)\] \{(?P<axes>[^}]+)\}|(?P<all>\{\}))"
)


def sent_bytes(hlo: str) -> dict[str, float]:
    """Bytes that a device sends, by kind of collective; kinds that do not occur are left out.

    Args:
        hlo: of the compiled program, for one of its devices (`Compiled.as_text`).

    Raises:
        ValueError: a loop that the compiler does not know the length of communicates.
    """
    computations, entry = _computations(hlo)
    partitions = _PARTITIONS.search(hlo)
    everyone = int(partitions[1]) if partitions else 1
    known: dict[str, dict[str, float]] = {}

    def count(name: str) -> dict[str, float]:
        if name not in known:
            total: dict[str, float] = defaultdict(float)
            for line in computations.get(name, []):
                for called, times in _calls(line, computations):
                    inside = count(called)
                    if times is None and inside:
                        raise ValueError(f"how often the loop {called} runs is unknown, and it has {dict(inside)}")
                    for kind, size in inside.items():
                        total[kind] += size * (times or 1)
                sent = _sent(line, everyone)
                if sent is not None:
                    total[sent[0]] += sent[1]
            if name.startswith("all-reduce-scatter"):  # as TPUs write it: a sum of which each keeps a part
                total = {"reduce-scatter": total["all-reduce"] / 2}
            known[name] = total
        return known[name]

    return dict(sorted(count(entry).items()))


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    found: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in hlo.splitlines():
        start = _COMPUTATION.match(line)
        if start:
            lines = found.setdefault(start[2], [])
            entry = start[2] if start[1] else entry
        else:
            lines.append(line)
    return found, entry


def _calls(line: str, computations: dict[str, list[str]]) -> Iterator[tuple[str, int | None]]:
    """Computations that the operation runs, and how often; None if nobody knows."""
    operation = _OPERATION.search(line)
    if operation is None or operation[2].startswith(("all-reduce", "reduce")):
        return  # their computation is the sum of two numbers
    if operation[2].endswith(("-done", "-update")):
        return  # counted where it starts
    times = _trips(line, computations) if operation[2] == "while" else 1
    for pattern in (_CALLED, _BRANCHES):
        for names in pattern.findall(line):
            for name in names.split(","):
                yield name.strip().lstrip("%"), times


def _trips(line: str, computations: dict[str, list[str]]) -> int | None:
    """How often a loop runs: as it is annotated, or, as TPUs' are not, by a condition that compares with a constant."""
    annotated, condition = _TRIPS.search(line), _CONDITION.search(line)
    if annotated:
        return int(annotated[1])
    body = computations[condition[1]] if condition else []
    constants = {name: int(value) for text in body for name, value in _CONSTANT.findall(text)}
    bounds = [
        value for text in body if "direction=LT" in text for name, value in constants.items() if f"{name})" in text
    ]
    return bounds[0] if len(bounds) == 1 else None


def _group_size(line: str, everyone: int) -> int:
    found = _GROUPS.search(line)
    if found is None:
        raise ValueError(f"unknown groups: {line.strip()[:200]}")
    if found["first"]:
        return len(found["first"].split(","))
    if found["size"]:
        return int(found["size"])
    if found["mesh"]:
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", found["mesh"]))
        return math.prod(int(sizes[axis.strip(" '")]) for axis in found["axes"].split(","))
    return everyone


def _sent(line: str, everyone: int) -> tuple[str, float] | None:
    operation = _OPERATION.search(line)
    if operation is None:
        return None
    kind = operation[2].removesuffix("-start")
    if kind not in COLLECTIVES:
        return None
    shapes = [(kind_, dims) for kind_, dims in _SHAPE.findall(operation[1]) if kind_ in ITEMSIZE]
    sizes = [ITEMSIZE[of] * math.prod(int(dim) for dim in dims.split(",") if dim) for of, dims in shapes]
    if kind == "collective-permute":
        return kind, float(sizes[0])
    if operation[2].endswith("-start") and (kind != "all-reduce" or operation[1].startswith("((")):
        sizes = sizes[len(sizes) // 2 :]  # what goes in is listed before what comes out
    num = _group_size(line, everyone)
    share = (num - 1) / num
    factor = {"all-reduce": 2 * share, "reduce-scatter": num - 1.0}.get(kind, share)
    return kind, factor * sum(sizes)
