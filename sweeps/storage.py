"""Where a study's trials are kept: a journal file, Postgres, or Optuna's gRPC proxy.

No storage has heartbeats: who holds a trial is told by a lease in its folder, the same way for all.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, parse_qs, urlsplit

from colddiff.schema import closest
from colddiff.uris import absolute_uri, mask_secrets

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

log = logging.getLogger("colddiff.sweeps")
SCHEMES = ("journal", "postgresql", "grpc", "sqlite")
RECORD = b'{"op_code":'
"""How each of the journal's records begins; within strings the quotes would be escaped."""


def check_storage(url: str, *, one_machine: bool = False) -> None:
    """Look at a storage's URL without opening it.

    Raises:
        ValueError: for what is no storage, for SQLite that several machines would share, and for a
            password, which would stand in a file that all users of the folder read.
    """
    scheme, parts = _split(url)
    if scheme == "sqlite" and not one_machine:
        raise ValueError(
            f"storage = {url!r} is not allowed for workers on several machines: SQLite's locks do "
            "not hold on network file systems, where it loses or doubles trials. Take a journal "
            "file on a shared disk (the default), or postgresql://host/database"
        )
    secret = any(name.endswith("password") for name in parse_qs(parts.query))
    if parts.password is not None or secret:
        raise ValueError(
            f"storage = {mask_secrets(url)!r} is not allowed: leave the password out, it would be "
            "written to study.json. PGPASSWORD and ~/.pgpass are read where the workers run"
        )
    if scheme == "grpc" and (parts.hostname is None or parts.port is None):
        raise ValueError(f"storage = {url!r} is not allowed: it must be grpc://host:port")
    if scheme == "journal" and (parts.netloc or not parts.path.startswith("/")):
        raise ValueError(
            f"storage = {url!r} is not allowed: it must be journal:///absolute/path, or a path"
        )


def storage_of(url: str, *, one_machine: bool = False) -> BaseStorage:
    """The storage of a path (a journal file), or of a journal, postgresql, grpc or sqlite URL.

    A journal that a killed writer left torn is mended first.

    Raises:
        ValueError: see :func:`check_storage`; also where the driver is not installed.
    """
    check_storage(url, one_machine=one_machine)
    scheme, parts = _split(url)
    match scheme:
        case "journal":
            return journal_storage(journal_path(url))
        case "grpc":
            return _grpc(str(parts.hostname), int(parts.port or 0))
        case "postgresql":
            return _database(postgres_url(url))
        case _:
            return _database(absolute_uri(url))


def absolute_storage(url: str) -> str:
    """The URL, or path of a journal, so that it means the same in every working folder."""
    if not url or "://" in url:
        return absolute_uri(url)
    return f"journal://{journal_path(url)}"


def journal_path(url: str) -> Path:
    """The file of a journal's URL or path, absolute."""
    return Path(url.removeprefix("journal://")).absolute()


def postgres_url(url: str) -> str:
    """The URL for psycopg 3, whatever SQLAlchemy's default driver is."""
    _need("psycopg", "postgres")
    return f"postgresql+psycopg://{url.partition('://')[2]}"


def journal_storage(path: Path) -> BaseStorage:
    """A journal file, mended, whose every write first makes the file's end whole."""
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    class MendingLock(JournalFileOpenLock):
        """Optuna's lock; a line torn by a killed writer is removed before the next is written.

        Else the two would merge, and whoever loads the journal after that would fail.
        """

        def acquire(self) -> bool:
            """Wait for the lock."""
            held = super().acquire()
            try:
                drop_torn_end(path)
            except BaseException:
                self.release()
                raise
            return held

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = MendingLock(str(path))
    backend = JournalFileBackend(str(path), lock_obj=lock)
    lock.acquire()
    try:
        blank_torn_starts(path)
    finally:
        lock.release()
    return JournalStorage(backend)


def drop_torn_end(path: Path) -> None:
    """Cut off a last line without its newline; the caller holds the journal's lock."""
    with path.open("r+b") as file:
        size = end = file.seek(0, os.SEEK_END)
        while end and not _ends_line(file.fileno(), end):
            end = max(0, end - 1)
        if end < size:
            log.warning("%s: dropped a torn last line of %d bytes", path, size - end)
            file.truncate(end)
            os.fsync(file.fileno())


def blank_torn_starts(path: Path) -> None:
    """Overwrite what was torn and then written on by spaces; the caller holds the journal's lock.

    Nothing moves: other processes remember at which byte they stopped reading.

    Raises:
        ValueError: naming a line that holds no record at all.
    """
    offset = 0
    with path.open("r+b") as file:
        for number, line in enumerate(file.read().splitlines(keepends=True), start=1):
            torn = 0 if _is_record(line) else line.rfind(RECORD)
            if torn < 0 or not _is_record(line[torn:]):
                raise ValueError(f"{path}: line {number} (byte {offset}) is corrupt: {line[:80]!r}")
            if torn:
                log.warning("%s: blanked %d torn bytes of line %d", path, torn, number)
                file.seek(offset)
                file.write(b" " * torn)
            offset += len(line)
        file.flush()
        os.fsync(file.fileno())


def _ends_line(descriptor: int, end: int) -> bool:
    return os.pread(descriptor, 1, end - 1) == b"\n"


def _is_record(line: bytes) -> bool:
    with contextlib.suppress(ValueError):
        return isinstance(json.loads(line), dict)
    return False


def failures() -> tuple[type[Exception], ...]:
    """What a database or a proxy raises where it is away or refuses."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    kinds: tuple[type[Exception], ...] = (StorageInternalError, SQLAlchemyError)
    if importlib.util.find_spec("grpc"):  # an optional extra
        kinds = (*kinds, importlib.import_module("grpc").RpcError)
    return kinds


def _split(url: str) -> tuple[str, SplitResult]:
    if "://" not in url:
        url = f"journal://{Path(url).absolute()}"
    try:
        parts = urlsplit(url)
        _ = parts.port  # which alone reads it
    except ValueError as error:
        raise ValueError(f"storage = {mask_secrets(url)!r} is no address: {error}") from None
    scheme = parts.scheme
    if scheme not in SCHEMES:
        raise ValueError(
            f"storage = {mask_secrets(url)!r} is not allowed: it must be a path, or a URL of "
            f"{', '.join(SCHEMES)}.{closest(scheme, SCHEMES)}"
        )
    return scheme, parts


def _database(url: str) -> BaseStorage:
    """A database that is connected to for each operation: minutes lie between a worker's.

    Kept connections of hundreds of workers would fill Postgres, whose default is one hundred.
    """
    from optuna.storages import RDBStorage
    from sqlalchemy.pool import NullPool

    return RDBStorage(url, engine_kwargs={"poolclass": NullPool})


def _grpc(host: str, port: int) -> BaseStorage:
    _need("grpc", "grpc")
    from optuna.exceptions import ExperimentalWarning
    from optuna.storages import GrpcStorageProxy

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return GrpcStorageProxy(host=host, port=port)


def _need(module: str, extra: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ValueError(
            f"this storage needs the package {module}: pip install 'colddiff[{extra}]'"
        )
