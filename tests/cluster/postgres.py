"""A disposable Postgres server: one folder of state, a free port of this machine."""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = Path("/usr/lib/postgresql")
"""Where Debian keeps the server's programs, a folder a version."""
ACCOUNT = "postgres"
"""Debian's, because the server refuses to run as root."""


def obstacle() -> str | None:
    """Why no server can be started here, if so."""
    if not list(PROGRAMS.glob("*/bin/initdb")):
        return "needs the Debian package postgresql: make test-slurm gets it"
    return None


@contextmanager
def postgres_server() -> Iterator[str]:
    """A server of its own; the URL of its empty database, without a password."""
    programs = max(PROGRAMS.glob("*/bin"), key=lambda path: int(path.parent.name))
    state = Path(tempfile.mkdtemp(prefix="colddiff-postgres-"))  # pytest's own are closed to others
    shutil.chown(state, ACCOUNT, ACCOUNT)
    data = state / "data"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # What a crash of the machine would cost is no matter here.
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c fsync=off -k {state}"

    def carry_out(program: str, *words: str) -> None:
        command = ["runuser", "-u", ACCOUNT, "--", str(programs / program), *words]
        subprocess.run(command, check=True, cwd=state, stdout=subprocess.DEVNULL)

    try:
        carry_out("initdb", "-D", str(data), "-A", "trust", "-U", "colddiff")
        carry_out("pg_ctl", "start", "-w", "-D", str(data), "-l", f"{state}/log", "-o", options)
        try:
            yield f"postgresql://colddiff@127.0.0.1:{port}/postgres"
        finally:
            carry_out("pg_ctl", "stop", "-m", "immediate", "-D", str(data))
    finally:
        shutil.rmtree(state)
