"""Files written so that a reader, or a crash, never meets half of one; and their hashes."""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # no such locks on this system
    fcntl = None


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


@contextlib.contextmanager
def locked(path: Path | str, wait: bool) -> Iterator[None]:
    """Hold an exclusive lock on the file `path`, which is made for it and removed afterwards.

    Advisory: it keeps out only those who ask. A killed process loses its lock. On systems and disks without such locks
    nobody is kept out.

    Args:
        wait: for another holder to end.

    Raises:
        ValueError: another process or block holds it and `wait` is off, or the file cannot be made.
    """
    path, held = Path(path), False
    while not held:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise ValueError(f"cannot write {path}: {error.strerror or error}; choose another place") from error
        try:
            if fcntl is not None:
                fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(handle)
            raise ValueError(f"{path} is held by another command: wait for it to end") from None
        except OSError:  # the disk has no locks
            held = True
        with contextlib.suppress(FileNotFoundError):  # the one who held it may just have removed it
            held = held or os.path.samestat(os.fstat(handle), os.stat(path))
        if not held:
            os.close(handle)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def check_writable(target: Path | str) -> None:
    """Make a file's folder and see that the file could be written, before hours are spent on what goes into it.

    Raises:
        ValueError: as `atomic_path`, or `target` is a folder.
    """
    target = Path(target)
    if target.is_dir():
        raise ValueError(f"cannot write {target}: it is a folder; name a file")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise ValueError(f"cannot write {target}: {error.strerror or error}; choose another place") from error


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
