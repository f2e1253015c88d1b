"""How long Table 1 takes from 2,000 tracked and evaluated runs, in SQLite and in Postgres.

One run folder is sent to MLflow by colddiff's own sync. Its rows are then copied for the other
runs, each with the parameters, tags and results of its own, because sending thousands takes an
hour. ``analysis/table1.py`` is timed as a process, and every number it writes is compared with
those put in. ``python benchmarks/table1_runs.py`` takes some minutes on two cores.
"""

from __future__ import annotations

import csv
import os
import statistics
import sys
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import tyro
from made_up import evaluated_run, evaluation_of
from processes import at_most, run_script
from timing import Result, machine, table
from trainers import with_seed

from colddiff.config import RunConfig
from colddiff.presets import preset
from colddiff.tracking import open_client, push

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine, Table

ALLOWED_S = 10.0
EXPERIMENT = "benchmark"
RECIPES = ("demo", "mnist", "mnist-hot", "mnist-paper", "cifar10")
"""Presets whose runs share the table."""
RECORDS = 20
"""Lines of each run's journal; the table needs none of them, the store has them all the same."""
CHUNK = 50
"""Runs that are inserted at once."""


def configs(number: int) -> list[RunConfig]:
    """So many runs, of all recipes in turn."""
    recipes = [preset(name) for name in RECIPES]
    chosen = (divmod(i, len(recipes)) for i in range(number))
    return [with_seed(recipes[recipe], seed) for seed, recipe in chosen]


def fill(uri: str, folder: Path, runs: Sequence[RunConfig]) -> int:
    """Record the runs in an empty store; returns the number of its rows.

    Artifacts go below ``folder``: a database elsewhere would put them into the working folder.
    """
    import sqlalchemy

    client = open_client(uri)  # makes the schema
    client.create_experiment(EXPERIMENT, artifact_location=(folder / "artifacts").as_uri())
    first = evaluated_run(folder, runs[0], seed_of_results=0, records=RECORDS)
    sent = push(first.path, uri, EXPERIMENT).mlflow_run_id
    engine = sqlalchemy.create_engine(uri)
    try:
        with engine.begin() as connection:
            copies = Copies(connection, sent, runs[0])
            for start in range(1, len(runs), CHUNK):
                copies.add(range(start, min(start + CHUNK, len(runs))), runs)
            return sum(
                connection.scalar(sqlalchemy.select(sqlalchemy.func.count()).select_from(each)) or 0
                for each in copies.tables
            )
    finally:
        engine.dispose()


class Copies:
    """The rows of one run, which others are made of."""

    def __init__(self, connection: Connection, run_id: str, config: RunConfig) -> None:
        from mlflow.store.tracking.dbmodels import models

        kinds = (
            models.SqlRun,
            models.SqlParam,
            models.SqlTag,
            models.SqlMetric,
            models.SqlLatestMetric,
        )
        self.tables: list[Table] = [kind.__table__ for kind in kinds]
        self.connection, self.run_id, self.config = connection, run_id, config
        self.rows = [
            [dict(row) for row in connection.execute(each.select()).mappings()]
            for each in self.tables
        ]

    def add(self, numbers: range, runs: Sequence[RunConfig]) -> None:
        """Record the runs of these numbers."""
        every: list[list[dict[str, object]]] = [[] for _ in self.tables]
        for number in numbers:
            for made, (name, rows) in zip(every, self._of(number, runs[number]), strict=True):
                made += rows if name != "params" else _parameters(rows[0], runs[number])
        for each, made in zip(self.tables, every, strict=True):
            self.connection.execute(each.insert(), made)

    def _of(self, number: int, config: RunConfig) -> Iterator[tuple[str, list[dict[str, object]]]]:
        """The rows of a table, as the run ``number`` would have them but for its parameters."""
        run_id, results = uuid.uuid4().hex, flat_results(number)
        texts = {
            self.run_id: run_id,
            self.config.run_id: config.run_id,
            self.config.preset: config.preset,
        }
        for each, rows in zip(self.tables, self.rows, strict=True):
            copied = []
            for row in rows:
                new = {name: texts.get(value, value) for name, value in row.items()}
                if each.name == "runs":
                    new["artifact_uri"] = str(row["artifact_uri"]).replace(self.run_id, run_id)
                    new["start_time"] = int(row["start_time"]) + number
                if each.name.endswith("metrics") and row["key"] in results:
                    new["value"] = results[row["key"]]
                copied.append(new)
            yield each.name, copied


def _parameters(like: dict[str, object], config: RunConfig) -> list[dict[str, object]]:
    """Rows of the configuration's values, as the sync sends them."""
    return [like | {"key": key, "value": str(value)} for key, value in config.flat().items()]


def flat_results(number: int) -> dict[str, float]:
    """What MLflow has of the evaluation of the run of this number."""
    from colddiff.tracking._contents import evaluation_metrics

    return evaluation_metrics(evaluation_of(number))


def check(file: Path, runs: Sequence[RunConfig]) -> int:
    """Compare the table's numbers with those put in; returns how many there are.

    Raises:
        RuntimeError: naming the first that is wrong or absent.
    """
    with file.open(newline="") as text:
        rows = {
            (row["preset"], row["kind"], row["metric"]): row
            for row in csv.DictReader(text)
            if row["seeds"] != "0"
        }
    compared = 0
    for name in dict.fromkeys(config.preset for config in runs):
        members = [flat_results(i) for i, config in enumerate(runs) if config.preset == name]
        for key in members[0]:
            if key.count("/") != 2:  # eval/samples
                continue
            _, kind, metric = key.split("/")
            if kind not in ("degraded", "direct", "sampled"):  # not in the CSV
                continue
            values = [member[key] for member in members]
            wanted = (statistics.fmean(values), statistics.stdev(values), len(values))
            row = rows.get((name, kind, metric), {})
            got = [float(row.get(column) or "nan") for column in ("mean", "std", "seeds")]
            pairs = zip(got, wanted, strict=True)
            if not all(abs(a - b) <= 1e-8 * max(1.0, abs(b)) for a, b in pairs):
                raise RuntimeError(f"{name}, {kind}, {metric}: {wanted} went in, {got} came out")
            compared += 1
    return compared


@contextmanager
def new_database(url: str) -> Iterator[str]:
    """The URI of an empty database beside the one at ``url``, which is dropped again."""
    import sqlalchemy

    from sweeps.storage import postgres_url

    name, server = f"colddiff_{uuid.uuid4().hex}", sqlalchemy.make_url(postgres_url(url))

    def carry_out(statement: str) -> None:
        engine: Engine = sqlalchemy.create_engine(server, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(sqlalchemy.text(statement))
        engine.dispose()

    carry_out(f"CREATE DATABASE {name}")
    try:
        yield server.set(database=name).render_as_string(hide_password=False)
    finally:
        carry_out(f"DROP DATABASE {name} WITH (FORCE)")


def measure(runs: int = 2000, repeats: int = 3, postgres: str = "") -> Iterator[Result]:
    """Seconds of the table from each store."""
    url, wanted = postgres or os.environ.get("COLDDIFF_POSTGRES", ""), configs(runs)
    if not url:
        yield Result(f"Table 1 of {runs:,} runs in Postgres", 0, 0, "not measured: no --postgres")
    for name in ("SQLite", "Postgres") if url else ("SQLite",):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            local = nullcontext(f"sqlite:///{folder}/mlflow.db")
            with local if name == "SQLite" else new_database(url) as uri:
                rows = fill(uri, folder, wanted)
                words = ("--experiment", EXPERIMENT, "--out", "out", "--tracking-uri", uri)
                script = "analysis/table1.py"
                made = [run_script(script, *words, folder=folder) for _ in range(repeats)]
                numbers = check(folder / "out" / "table1.csv", wanted)
        more = f"; {rows:,} rows, {numbers} numbers of the table checked"
        yield at_most(f"Table 1 of {runs:,} runs in {name}", ALLOWED_S, made, more)


def main(runs: int = 2000, repeats: int = 3, postgres: str = "") -> None:
    """Print the table.

    Args:
        runs: in each store; at least two of each of five presets.
        repeats: tables; the median is shown.
        postgres: postgresql://host/database of a user who may create databases, to measure that
            too; COLDDIFF_POSTGRES by default.
    """
    if runs < 2 * len(RECIPES):
        sys.exit(f"error: --runs {runs} must be at least {2 * len(RECIPES)}")
    print(machine(), end="\n\n")
    table(measure(runs, repeats, postgres))


if __name__ == "__main__":
    tyro.cli(main)
