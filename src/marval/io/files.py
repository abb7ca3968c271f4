"""Files written so that a reader, or a crash, never meets half of one; and their hashes."""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
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


def cache_folder() -> Path:
    """Make and return the folder where downloads and figures that were costly to compute are kept.

    It is the user's cache; where that cannot be written to, a folder of the user's own among the temporary files.
    """
    user = user_cache()
    if user is not None:
        with contextlib.suppress(OSError):
            user.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=user):  # asking for permission alone misses much
                return user
    owner = os.getuid() if hasattr(os, "getuid") else None
    folder = Path(tempfile.gettempdir()) / f"marval-{'user' if owner is None else owner}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if owner is not None and folder.lstat().st_uid != owner:  # a stranger was there first
        return Path(tempfile.mkdtemp(prefix="marval-"))
    return folder


def user_cache() -> Path | None:
    """`$XDG_CACHE_HOME/marval`, else `~/.cache/marval`; None without a home (a container's user may have none)."""
    chosen = os.environ.get("XDG_CACHE_HOME", "")
    root = os.path.expanduser(chosen if os.path.isabs(chosen) else "~/.cache")  # XDG says to ignore relative paths
    return Path(root) / "marval" if os.path.isabs(root) else None


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


def check_output(path: Path | str, *, folder: bool) -> None:
    """Whether `path`, a folder or a file, can be written later; nothing is made.

    Raises:
        ValueError: it is of the other kind, lies inside a file, or where one may not write.
    """
    path = Path(path)
    try:
        if path.exists() and path.is_dir() != folder:
            kinds = ("file", "folder") if folder else ("folder", "file")
            raise ValueError(f"{path} is a {kinds[0]}: expected a {kinds[1]}; choose another place")
        there = next(place for place in (path if folder else path.parent, *path.absolute().parents) if place.exists())
        if not there.is_dir():
            raise ValueError(f"{path}: {there} is a file, expected a folder; choose another place")
        with tempfile.TemporaryFile(dir=there):  # asking for permission alone misses much
            pass
    except OSError as error:  # a name that is too long, a folder that may not be entered or written to
        raise ValueError(f"cannot write {path}: {error.strerror or error}; choose another place") from error


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


def check_replace(target: Path, writes: Sequence[Path], *, read: Path, force: bool) -> None:
    """Refuse, before costly work, an output that is there already or cannot be written.

    Args:
        writes: the files that will be written: `target` itself, or those in it.
        read: the file that they are made from, which nothing may write over.
        force: write over what is there.

    Raises:
        ValueError: says what to do instead.
    """
    if any(path.exists() and path.samefile(read) for path in writes):
        raise ValueError(f"{target} is what it would be made from ({read}): choose another place")
    if os.path.lexists(target) and not force:
        raise ValueError(f"{target} exists already: choose another place, or write over it with --force")
    check_output(target, folder=list(writes) != [target])


def write_text(target: Path | str, text: str) -> None:
    """Write `text` to `target`, whole or not at all."""
    with atomic_path(target) as partial:
        partial.write_text(text, encoding="utf-8")


def sha256_of(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
