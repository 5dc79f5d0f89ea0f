"""A folder that appears whole or not at all."""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_folder(target: str | Path, *, overwrite: bool, marker: str) -> Iterator[Path]:
    """Yields a new folder beside `target`, renamed to `target` once the block has ended without an error.

    Files are flushed to disk before the rename. On any error the new folder is removed and whatever was at
    `target` is still there. A process that is killed outright can leave a `.<name>.<id>.partial` folder
    behind, never a half `target`; between the two renames of an overwrite, the old one as `.<name>.<id>.old`.

    Args:
        target: folder to create; missing parents are created too.
        overwrite: replace a folder that is not empty.
        marker: file that a folder must hold to be replaced, so that a mistyped path deletes nothing else.

    Raises:
        FileExistsError: `target` is a file, or is not empty and may not be replaced.
        OSError: the disk is full or not writable.
    """
    target = Path(target).expanduser().resolve()
    if target.exists():
        if not target.is_dir():
            raise FileExistsError(f"{target} is a file, not a folder")
        if any(target.iterdir()) and not overwrite:
            raise FileExistsError(f"{target} is not empty: choose another folder or pass overwrite=True")
        if any(target.iterdir()) and not (target / marker).is_file():
            raise FileExistsError(f"{target} holds no {marker}: it is no earlier export and is left alone")
    unique = uuid.uuid4().hex[:8]
    partial = target.with_name(f".{target.name}.{unique}.partial")
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in (*partial.rglob("*"), partial):
            _flush(path)
        _swap(partial, target, target.with_name(f".{target.name}.{unique}.old"))
        _flush(target.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _swap(new: Path, target: Path, aside: Path) -> None:
    if not target.exists() or not any(target.iterdir()):
        new.rename(target)
        return
    target.rename(aside)
    try:
        new.rename(target)
    except BaseException:
        aside.rename(target)
        raise
    shutil.rmtree(aside)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
