"""The commands that look after studies: status, cancel, sync, report, serve."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from jobs.options import Place, say
from sweeps.storage import storage_of
from sweeps.study import read_study
from sweeps.workers import storage_errors

CLEAR = "\033[2J\033[H"


@dataclass(frozen=True)
class Status(Place):
    """Show where studies stand: trials, who works on them, the best so far."""

    study: str = ""
    """Name of the study; all by default."""
    watch: Annotated[float | None, arg(metavar="SECONDS")] = None
    """Look again at this interval, until Ctrl-C."""
    json: bool = False
    """For programs: a list with one object a study."""

    def __call__(self) -> int:
        """Print it, once or again and again."""
        from sweeps.standing import standing, stored, studies

        if self.watch is not None and self.watch <= 0:
            raise ValueError(f"--watch {self.watch:g} is not allowed: it must be above 0 seconds")
        opened = {each.name: stored(each) for each in studies(self.runs, self.study)}
        clear = CLEAR if self.watch and sys.stdout.isatty() and not self.json else ""
        with contextlib.suppress(KeyboardInterrupt) if self.watch else contextlib.nullcontext():
            while True:
                found = [
                    standing(self.runs, each, opened[each.name])
                    for each in studies(self.runs, self.study)
                    if each.name in opened
                ]
                if self.json:
                    say(json.dumps([each.to_dict() for each in found], indent=2))
                else:
                    texts = [each.text() for each in found] or [f"no studies below {self.runs}"]
                    say(clear + "\n\n".join(texts))
                if self.watch is None:
                    return 0
                time.sleep(self.watch)
        return 0


@dataclass(frozen=True, kw_only=True)
class Cancel(Place):
    """Stop a study's workers; those that run save first. ``resume`` goes on."""

    study: str
    """Name of the study."""

    def __call__(self) -> int:
        """Cancel what is queued or runs, and say so."""
        from sweeps.following import cancel_workers

        read_study(self.runs, self.study)
        jobs = cancel_workers(self.runs, self.study)
        for job in jobs:
            then = ": it saves and ends" if job.phase == "running" else ""
            say(f"{job.entry.run}: {job}, cancelled{then}")
        if not jobs:
            say(f"nothing to cancel: no worker of {self.study} is queued or runs")
        return 0


@dataclass(frozen=True, kw_only=True)
class Sync(Place):
    """Send to MLflow whatever of a study is not there yet, after --offline or an outage."""

    study: str
    """Name of the study."""

    def __call__(self) -> int:
        """Push the study and its trials; idempotent."""
        from sweeps.record import record_all
        from sweeps.standing import living, stored, survey_workers

        config = read_study(self.runs, self.study)
        study = stored(config)
        self.initialise()
        working = bool(living(survey_workers(self.runs, self.study)))
        record_all(study, config, self.uri, self.experiment, working=working)
        say(f"{self.study}: sent")
        return 0


@dataclass(frozen=True, kw_only=True)
class Report(Place):
    """The report of a study, from MLflow: the best against the reference, plots, front."""

    study: str
    """Name of the study."""
    out: Path | None = None
    """Folder for the results; reports/<study> by default."""

    def __call__(self) -> int:
        """Make it; the exit code of what makes it."""
        # As a process: sweeps know nothing of what analyses them.
        options = {
            "--experiment": self.experiment,
            "--study": self.study,
            "--tracking-uri": self.uri,
            "--out": str(self.out or Path("reports") / self.study),
        }
        words = [word for option in options.items() for word in option]
        command = [sys.executable, "-m", "analysis.sweep_report", *words]
        return subprocess.run(command, check=False).returncode


@dataclass(frozen=True, kw_only=True)
class Serve:
    """Stand between hundreds of workers and their database: Optuna's gRPC proxy.

    Workers have it as --storage grpc://HOST:PORT. It runs until Ctrl-C.
    """

    storage: str
    """The database, postgresql://host/database."""
    host: str = "localhost"
    """The address to listen at; 0.0.0.0 for all. Nothing is encrypted, nobody asked who they are:
    only within a cluster's own network."""
    port: int = 13000
    """1..65535."""

    def __call__(self) -> int:
        """Serve."""
        if not 1 <= self.port <= 65535:
            raise ValueError(f"--port {self.port} is not allowed: it must be in 1..65535")
        if not self.storage.startswith(("postgresql://", "sqlite://")):
            raise ValueError(
                f"--storage {self.storage!r} is not allowed: the proxy needs a database, "
                "postgresql://host/database (workers share a journal file without it)"
            )
        from optuna.storages import run_grpc_proxy_server

        with storage_errors():
            storage = storage_of(self.storage, one_machine=True)
        say(f"serving at grpc://{self.host}:{self.port}, until Ctrl-C")
        run_grpc_proxy_server(storage, host=self.host, port=self.port)
        return 0
