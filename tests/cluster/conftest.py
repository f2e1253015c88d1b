"""One real Slurm for all tests of this folder: see ``make test-slurm``."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from sites import mlflow_server, reference, site
from slurm_cluster import SlurmCluster, obstacle
from slurm_files import NODES

__all__ = ["mlflow_server", "reference", "site"]
HERE = Path(__file__).parent
WANTED, REQUIRED = "COLDDIFF_SLURM", "COLDDIFF_REQUIRE_SLURM"


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """Three idle nodes at the start of each test."""
    with SlurmCluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def _nothing_is_left(slurm: SlurmCluster) -> Iterator[None]:
    yield
    for node in NODES:
        slurm.resume_node(node)
    slurm.cancel_all()
    slurm.wait_ready()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker("slurm")
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(600))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Skipped in sight, with the reason; minutes of Slurm are for those who ask for them."""
    required = os.environ.get(REQUIRED) == "1"
    if not required and os.environ.get(WANTED) != "1":
        pytest.skip("starts a real Slurm, which takes minutes: run make test-slurm")
    if reason := obstacle():
        if required:
            pytest.fail(f"{REQUIRED} is set, but: {reason}", pytrace=False)
        pytest.skip(reason)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failed test shows what Slurm and its jobs said."""
    report = yield
    values = getattr(item, "funcargs", {})
    if report.failed and isinstance(cluster := values.get("slurm"), SlurmCluster):
        report.sections.append(("slurmctld.log", cluster.log("slurmctld")))
        report.sections.extend(job_logs(values.get("tmp_path")))
    return report


def job_logs(folder: Path | None, most: int = 5, lines: int = 20) -> list[tuple[str, str]]:
    """The ends of the newest logs in a test's folder."""
    found = (
        [path for suffix in ("out", "err") for path in folder.rglob(f"*.{suffix}")]
        if folder
        else []
    )
    newest = sorted(found, key=lambda path: path.stat().st_mtime)[-most:]
    ends = [path.read_text(errors="replace").splitlines()[-lines:] for path in newest]
    return [(str(path), "\n".join(end)) for path, end in zip(newest, ends, strict=True)]
