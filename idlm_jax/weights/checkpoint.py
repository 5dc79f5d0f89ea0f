"""A folder of safetensors files: what it holds, whether that is what a model needs, and lazy reads of it."""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from idlm_jax.weights.hf_names import TensorSpec

# Anything else is quantised, integer or float64, and would need more than a cast.
READABLE_DTYPES = {"F32", "BF16", "F16"}

# Rows compared at a time when a tied head is checked against the embedding: 64 MiB at 4,096 columns of
# float32.
_COMPARED_ROWS = 4_096


class WeightsError(ValueError):
    """A checkpoint that is not the model it claims to be; the message has one line per fault."""

    def __init__(self, folder: Path, problems: Iterable[str]):
        self.problems = tuple(problems)
        super().__init__("\n  ".join((f"{folder}: {len(self.problems)} problem(s)", *self.problems)))


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Header entry of one tensor: file, shape and safetensors dtype name."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Tensors found in a folder; only headers have been read.

    Attributes:
        folder: where the files are.
        tensors: header entry by name.
        problems: what was wrong with the files themselves; raised by `check`, together with the rest.
    """

    folder: Path
    tensors: Mapping[str, StoredTensor]
    problems: tuple[str, ...] = ()

    def read(self, name: str, index: Any = ...) -> np.ndarray:
        """One tensor, or the part of it that `index` selects, in its stored dtype."""
        with safe_open(self.tensors[name].file, "numpy") as file:
            # A slice, not `get_tensor`: a process of a larger mesh reads only its own part of the file.
            return file.get_slice(name)[index]

    def check(self, specs: Iterable[TensorSpec], *, aliases: Mapping[str, str] | None = None) -> None:
        """Compares names, shapes and dtypes with what the model needs.

        Args:
            specs: every tensor that the model needs.
            aliases: extra names that may be present when their content equals the tensor they point to.

        Raises:
            WeightsError: lists every missing, unexpected, mis-shaped, non-float and duplicate tensor, every
                unreadable file and every alias that differs.
        """
        aliases = aliases or {}
        wanted = {spec.name: spec.hf_shape for spec in specs}
        problems = list(self.problems)
        for name, shape in wanted.items():
            stored = self.tensors.get(name)
            if stored is None:
                problems.append(f"missing: {name}, wanted shape {shape}")
                continue
            if stored.shape != shape:
                problems.append(f"shape: {name} is {stored.shape}, wanted {shape}")
            if stored.dtype not in READABLE_DTYPES:
                problems.append(f"dtype: {name} is {stored.dtype}, wanted one of {sorted(READABLE_DTYPES)}")
        for name, stored in self.tensors.items():
            if name not in wanted and name not in aliases:
                problems.append(f"unexpected: {name} of shape {stored.shape} in {stored.file.name}")
            elif name in aliases and aliases[name] in self.tensors and not self._equal(name, aliases[name]):
                problems.append(f"tied: {name} {stored.shape} differs from {aliases[name]}, which it must equal")
        if problems:
            raise WeightsError(self.folder, problems)

    def _equal(self, first: str, second: str) -> bool:
        """Value equality of two tensors, a block of rows at a time."""
        one, other = self.tensors[first], self.tensors[second]
        if one.shape != other.shape or not {one.dtype, other.dtype} <= READABLE_DTYPES:
            return False
        blocks = (
            slice(start, min(start + _COMPARED_ROWS, one.shape[0])) for start in range(0, one.shape[0], _COMPARED_ROWS)
        )
        return all(
            np.array_equal(self.read(first, rows).astype(np.float32), self.read(second, rows).astype(np.float32))
            for rows in blocks
        )


def open_checkpoint(folder: Path, stem: str = "model") -> Checkpoint:
    """Reads the headers of `<stem>.safetensors`, or of the shards that `<stem>.safetensors.index.json` lists.

    The single file wins when both exist, as in transformers. Nothing raises here: faults of the files are
    kept for `Checkpoint.check`, so that the reader sees all of them at once.
    """
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if single.exists():
        return _read_headers(folder, [single])
    if not index.exists():
        return Checkpoint(folder, {}, (f"file: neither {single.name} nor {index.name} exists",))
    try:
        file_of = dict(json.loads(index.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        return Checkpoint(folder, {}, (f"file: {index.name} has no readable weight_map: {error!r}",))
    outside = sorted({file for file in file_of.values() if Path(file).name != file})
    if outside:
        return Checkpoint(folder, {}, (f"file: {index.name} points outside its folder: {outside}",))
    found = _read_headers(folder, [folder / file for file in sorted(set(file_of.values()))])
    misplaced = [
        f"index: {name} is in {found.tensors[name].file.name}, but {index.name} says {file}"
        for name, file in file_of.items()
        if name in found.tensors and found.tensors[name].file.name != file
    ]
    return dataclasses.replace(found, problems=(*found.problems, *misplaced))


def _read_headers(folder: Path, files: list[Path]) -> Checkpoint:
    tensors: dict[str, StoredTensor] = {}
    problems = []
    for path in files:
        try:
            with safe_open(path, "numpy") as file:
                for name in file.keys():
                    entry = file.get_slice(name)
                    stored = StoredTensor(path, tuple(entry.get_shape()), entry.get_dtype())
                    if name in tensors:
                        problems.append(
                            f"duplicate: {name} is in {tensors[name].file.name} {tensors[name].shape} "
                            f"and in {path.name} {stored.shape}"
                        )
                    tensors[name] = stored
        except (SafetensorError, OSError) as error:
            problems.append(f"file: {path.name} is missing, truncated or corrupt: {error}")
    return Checkpoint(folder, tensors, tuple(problems))
