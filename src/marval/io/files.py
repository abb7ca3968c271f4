"""Files written so that a reader, or a crash, never meets half of one; and their hashes."""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


@contextlib.contextmanager
def atomic_path(target: Path | str) -> Iterator[Path]:
    """A temporary path beside `target`; it is renamed to `target` when the block ends, and removed if it raises.

    Raises:
        ValueError: the folder cannot be made or written to, or the disk is full.
    """
    target = Path(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        os.close(handle)
        partial = Path(name)
        try:
            yield partial
            os.chmod(partial, 0o666 & ~_umask())
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(
            f"cannot write {target}: {error.strerror or error}; free some space or choose another place"
        ) from error


def write_tensors(target: Path | str, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file, whole or not at all.

    Raises:
        ValueError: as `atomic_path`.
    """
    with atomic_path(target) as partial:
        try:
            save_file({name: t.contiguous() for name, t in tensors.items()}, partial, metadata=metadata)
        except SafetensorError as error:
            raise ValueError(f"cannot write {target}: {error}; free some space or choose another place") from error


@contextlib.contextmanager
def atomic_folder(target: Path | str) -> Iterator[Path]:
    """A temporary folder beside `target`; its files move into `target` when the block ends, none if it raises.

    Files of the same names are replaced, others stay.

    Raises:
        ValueError: the folder cannot be made or written to, or the disk is full.
    """
    target = Path(target).absolute()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as name:
            partial = Path(name) / target.name
            partial.mkdir()
            yield partial
            if not target.exists():
                partial.replace(target)
                return
            for file in partial.iterdir():
                file.replace(target / file.name)
    except OSError as error:
        raise ValueError(
            f"cannot write {target}: {error.strerror or error}; free some space or choose another place"
        ) from error


def check_output(target: Path, writes: Sequence[Path], *, read: Path, force: bool) -> None:
    """Refuse, before costly work, an output that is there already or cannot be written.

    Args:
        writes: the files that will be written: `target` itself, or those in it.
        read: the file that they are made from, which nothing may write over.
        force: write over what is there.

    Raises:
        ValueError: says what to do instead.
    """
    try:
        if any(path.exists() and path.samefile(read) for path in writes):
            raise ValueError(f"{target} is what it would be made from ({read}): choose another place")
        if os.path.lexists(target) and not force:
            raise ValueError(f"{target} exists already: choose another place, or write over it with --force")
        above = next(path for path in target.absolute().parents if path.exists())
        if not (above.is_dir() and os.access(above, os.W_OK | os.X_OK)):
            raise ValueError(f"cannot write {target}: {above} is no folder to write to; choose another place")
    except OSError as error:
        raise ValueError(f"cannot write {target}: {error.strerror or error}; choose another place") from error


def write_text(target: Path | str, text: str) -> None:
    """Write `text` to `target`, whole or not at all."""
    with atomic_path(target) as partial:
        partial.write_text(text)


def sha256_of(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
