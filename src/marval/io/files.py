"""Files written so that a reader, or a crash, never meets half of one; and their hashes."""

import contextlib
import errno
import hashlib
import os
import secrets
import tempfile
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS}  # what network disks without locks answer


def asset(name: str) -> Path:
    """Find a file or folder that ships with the package."""
    return Path(str(files("marval"))) / "assets" / name


def cache_folder() -> Path:
    """Make and return `$XDG_CACHE_HOME/marval`, else `~/.cache/marval`; where nobody may write, a temporary folder."""
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: there is no home
        folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "marval"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    return Path(tempfile.mkdtemp(prefix="marval-"))


@contextlib.contextmanager
def _writing(target: Path | str) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"cannot write {target}: {reason}; free some space or choose another place") from error


@contextlib.contextmanager
def atomic_path(target: Path | str) -> Iterator[Path]:
    """Give a path beside `target`; what is written there becomes `target` when the block ends, or goes if it raises.

    Raises:
        ValueError: the folder cannot be made or written to, or the disk is full.
    """
    target = Path(target)
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    with _writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(target: Path | str) -> Iterator[Path]:
    """Give a folder inside `target`; its files move into `target` when the block ends, none if it raises.

    Files of the same names are replaced, others stay.

    Raises:
        ValueError: the folder cannot be made or written to, or the disk is full.
    """
    target = Path(target)
    with _writing(target):
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", dir=target) as partial:
            yield Path(partial)
            for file in Path(partial).iterdir():
                file.replace(target / file.name)


def write_tensors(target: Path | str, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file, whole or not at all (see `atomic_path`)."""
    with atomic_path(target) as partial:
        partial.touch()
        mode = partial.stat().st_mode
        save_file({name: t.contiguous() for name, t in tensors.items()}, partial, metadata=metadata)
        partial.chmod(mode)  # safetensors makes files that nobody else may read
        with partial.open("rb+") as written:
            os.fsync(written.fileno())  # before it takes an older file's place


def write_text(target: Path | str, text: str) -> None:
    """Write a text file, whole or not at all (see `atomic_path`)."""
    with atomic_path(target) as partial:
        partial.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def locked(path: Path | str, wait: bool) -> Iterator[None]:
    """Hold an exclusive lock on the file `path`, which is made for it and removed afterwards.

    It keeps out only those who ask for it, and nobody on disks without locks. A killed process loses its lock.

    Raises:
        ValueError: another process or block holds it and `wait` is off, or the file cannot be made.
    """
    path, lock = Path(path), FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=wait)
    except Timeout:
        raise ValueError(f"{path} is held by another command: wait for it to end") from None
    except (OSError, NotImplementedError) as error:  # filelock's of a system without locks
        if isinstance(error, OSError) and error.errno not in NO_LOCKS:
            raise ValueError(f"cannot write {path}: {error.strerror or error}; choose another place") from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held: who waits then makes it anew
        lock.release()


def check_output(path: Path | str, *, folder: bool) -> None:
    """Raise a ValueError unless `path`, a folder or a file, can be written later; nothing is made."""
    path = Path(path)
    try:
        if path.exists() and path.is_dir() != folder:
            kind, expected = ("file", "folder") if folder else ("folder", "file")
            raise ValueError(f"{path} is a {kind}: expected a {expected}; choose another place")
        there = next(place for place in (path if folder else path.parent, *path.absolute().parents) if place.exists())
        with tempfile.TemporaryFile(dir=there):  # asking for permission alone misses much
            pass
    except OSError as error:  # a file in a folder's place, a name that is too long, a folder that may not be entered
        raise ValueError(f"cannot write {path}: {error.strerror or error}; choose another place") from error


def check_replace(target: Path, *, source: Path, folder: bool, force: bool) -> None:
    """Check an output as `check_output`; refuse one that is there already (without `force`), or its own `source`."""
    if target.exists() and (target.samefile(source) or target.samefile(source.parent)):
        raise ValueError(f"{target} is what it would be made from ({source}): choose another place")
    if os.path.lexists(target) and not force:
        raise ValueError(f"{target} exists already: choose another place, or write over it with --force")
    check_output(target, folder=folder)


def sha256_of(file: Path) -> str:
    """Compute a file's SHA-256, in hexadecimal digits."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def one_line(error: BaseException) -> str:
    """Say what an error says, in one line of at most 200 characters."""
    return " ".join(str(error).split())[:200]
