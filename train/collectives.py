"""What a compiled step sends between devices, read from its HLO: which collectives, how often, how many bytes.

Counted are the bytes that one device sends if every collective of n devices is a ring: (n - 1) / n of what is gathered,
scattered or exchanged, twice that of what is reduced everywhere. Loops count as often as they run. Where the data
decides that, they count once: in a training step only the head's loop over scored rows, which sends some numbers a row
where the vocabulary is cut.
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
_CALLED = re.compile(r"(?:calls|to_apply|called_computations)=\{?(%?[\w.\-]+(?:, ?%?[\w.\-]+)*)")
_BRANCHES = re.compile(r"(?:branch_computations=\{|true_computation=|false_computation=)([%\w.\-, ]+)")
_PARTITIONS = re.compile(r"^HloModule .*num_partitions=(\d+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONDITION, _BODY = (re.compile(rf"\b{part}=%?([\w.\-]+)") for part in ("condition", "body"))
_NAME = re.compile(r"%[\w.\-]+")
_LESS = re.compile(r"compare\((%[\w.\-]+), (%[\w.\-]+)\), direction=LT")
_ELEMENT = re.compile(r"(%[\w.\-]+) = [su]32\[\]\S* get-tuple-element\(.*?\), index=(\d+)")
_ADD = re.compile(r"(%[\w.\-]+) = [su]32\[\]\S* add\((%[\w.\-]+), (%[\w.\-]+)\)")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_CONSTANT = re.compile(r"(%\S+) = [su]32\[\]\S* constant\((\d+)\)")
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
        ValueError: who takes part in a collective is written in a way that is not known here.
    """
    return _Program(hlo).sent()


class _Program:
    """Computations by name, as lines of text."""

    def __init__(self, hlo: str):
        self._lines, self._entry = _computations(hlo)
        partitions = _PARTITIONS.search(hlo)
        self._num_devices = int(partitions[1]) if partitions else 1
        self._sent: dict[str, dict[str, float]] = {}

    def sent(self, name: str | None = None) -> dict[str, float]:
        """By kind, of one run of the computation; of the program, if it is not named."""
        name = self._entry if name is None else name
        if name not in self._sent:
            # TPUs start, continue and end a collective in fusions, which share its channel.
            fused: dict[str, tuple[str, float]] = {}
            total: dict[str, float] = defaultdict(float)
            for where, line in self._flat(name):
                for kind, size in self._of_loop(line).items():
                    total[kind] += size
                sent = _sent(line, self._num_devices, keeps_part=where.startswith("all-reduce-scatter"))
                channel = _CHANNEL.search(line)
                if sent is not None and where != name and channel:
                    fused[channel[1]] = sent
                elif sent is not None:
                    total[sent[0]] += sent[1]
            for kind, size in fused.values():
                total[kind] += size
            self._sent[name] = dict(sorted(total.items()))
        return self._sent[name]

    def _of_loop(self, line: str) -> dict[str, float]:
        """What all runs of a loop send; nothing, if the operation is none."""
        operation, body = _OPERATION.search(line), _BODY.search(line)
        if operation is None or operation[2] != "while" or body is None:
            return {}
        times = _trips(line, self._lines)
        return {kind: (1 if times is None else times) * size for kind, size in self.sent(body[1]).items()}

    def _flat(self, name: str) -> Iterator[tuple[str, str]]:
        """The computation's name and each of its lines, then those of what it calls, except as a loop."""
        for line in self._lines.get(name, []):
            yield name, line
            for called in _calls(line):
                yield from self._flat(called)


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


def _calls(line: str) -> Iterator[str]:
    """Computations that the operation runs once."""
    operation = _OPERATION.search(line)
    # The computation of a reduction is the sum of two numbers; what has ended was counted where it started.
    if operation is None or operation[2] == "while" or operation[2].startswith(("all-reduce", "reduce")):
        return
    if operation[2].endswith(("-done", "-update")):
        return
    for pattern in (_CALLED, _BRANCHES):
        for names in pattern.findall(line):
            yield from (name.strip().lstrip("%") for name in names.split(","))


def _trips(line: str, computations: dict[str, list[str]]) -> int | None:
    """How often a loop runs: as it is annotated, or, as TPUs' are not, from its counter, its bound and its step."""
    annotated, condition, body = _TRIPS.search(line), _CONDITION.search(line), _BODY.search(line)
    if annotated:
        return int(annotated[1])
    if condition is None or body is None:
        return None
    test, steps = computations[condition[1]], computations[body[1]]
    bound = _LESS.search("\n".join(test))
    constants = _constants(test)
    if bound is None or bound[2] not in constants:
        return None
    counter = next((int(index) for text in test for name, index in _ELEMENT.findall(text) if name == bound[1]), None)
    root = next((text.rpartition(" tuple(")[2] for text in steps if "ROOT" in text and " tuple(" in text), None)
    if counter is None or root is None:
        return None
    after = _NAME.findall(root)[counter]
    added = next((names for text in steps for name, *names in _ADD.findall(text) if name == after), [])
    by = [value for name, value in _constants(steps).items() if name in added]
    return math.ceil(constants[bound[2]] / by[0]) if len(by) == 1 else None


def _constants(lines: list[str]) -> dict[str, int]:
    return {name: int(value) for text in lines for name, value in _CONSTANT.findall(text)}


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


def _sent(line: str, everyone: int, *, keeps_part: bool) -> tuple[str, float] | None:
    """Kind and bytes, if the operation sends; `keeps_part`: what TPUs write as a sum of which each keeps a part."""
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
    if kind == "all-reduce" and keeps_part:
        return "reduce-scatter", share * sum(sizes)
    factor = {"all-reduce": 2 * share, "reduce-scatter": num - 1.0}.get(kind, share)
    return kind, factor * sum(sizes)
