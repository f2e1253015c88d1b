"""What MLflow is told about a run, read from its folder; nothing here calls MLflow."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from colddiff.files import read_json
from colddiff.uris import mask_secrets

log = logging.getLogger(__name__)

ARTIFACTS = (
    "config.json",
    "environment.json",
    "environment.diff",
    "schedule.json",
    "evaluation.json",
    "profile/operators.txt",
    "profile/trace.json.gz",
)
FINAL_ARTIFACTS = ("ema.safetensors",)  # large and rewritten during training
LONGEST_PARAM, LONGEST_TAG, LONGEST_KEY = 6000, 8000, 250  # MLflow's limits


def read_or_empty(path: Path) -> dict[str, Any]:
    """A JSON object, empty if the file is missing or, with a warning, unreadable."""
    try:
        value = read_json(path)
    except FileNotFoundError:
        return {}
    except json.JSONDecodeError as error:
        log.warning("%s is not JSON and is ignored: %s", path, error)
        return {}
    return value if isinstance(value, dict) else {}


def identity(run_id: str, environment: dict[str, Any]) -> dict[str, str]:
    """The tags that say which MLflow run is this folder's.

    The first attempt's start tells apart folders of equal configuration, which have equal run ids:
    their metrics must not mix.
    """
    started = first_start_ms(environment)
    tags = {"colddiff.run_id": run_id}
    return tags if started is None else tags | {"colddiff.started_ms": str(started)}


def first_start_ms(environment: dict[str, Any]) -> int | None:
    """Unix time in milliseconds of the first attempt's start."""
    started = (environment.get("attempts") or [{}])[0].get("started_ms")
    return None if started is None else int(started)


def tags(environment: dict[str, Any]) -> dict[str, str]:
    """Provenance of code, data, machine and attempts; what is unknown is left out, secrets too."""
    attempts = environment.get("attempts") or [{}]
    last = attempts[-1]
    command = last.get("command")
    values: dict[str, object] = {
        "colddiff.git_sha": _distinct(attempt.get("git_sha") for attempt in attempts),
        "colddiff.git_dirty": str(any(attempt.get("git_dirty") for attempt in attempts)).lower(),
        "colddiff.data_sha256": environment.get("data_sha256"),
        "colddiff.data_samples": environment.get("data_samples"),
        "colddiff.slurm_job_ids": _distinct(
            (attempt.get("slurm") or {}).get("job_id") for attempt in attempts
        ),
        "colddiff.attempts": len(attempts),
        "colddiff.host": last.get("host"),
        "colddiff.device": last.get("device"),
        "colddiff.machine": _distinct(_machine(attempt) for attempt in attempts),
        "colddiff.arithmetic": _distinct(attempt.get("arithmetic") for attempt in attempts),
        "mlflow.source.git.commit": last.get("git_sha"),
        "mlflow.source.name": " ".join(command) if isinstance(command, list) else command,
        "mlflow.source.type": "JOB" if last.get("slurm") else "LOCAL",
    }
    return {
        key: mask_secrets(str(value))[:LONGEST_TAG]
        for key, value in values.items()
        if value not in (None, "")
    }


def metric_key(key: str) -> str:
    """The key as MLflow allows it: letters, digits and ``_-. /``, at most 250 of them."""
    key = re.sub(r"[^/\w.\- ]", "_", key.replace("]", ""))
    parts = [part for part in key.split("/") if part not in ("", ".", "..")]
    return "/".join(parts)[:LONGEST_KEY].rstrip("/") or "_"


def evaluation_metrics(evaluation: dict[str, Any]) -> dict[str, float]:
    """``eval/<kind>/<metric>`` and ``eval/samples``; objects become further levels.

    Lists (RMSE by class) stay in the artifact: fifty charts of one point would hide the curves.
    """
    values = {"samples": evaluation.get("samples"), **evaluation.get("kinds", {})}
    return {metric_key(key): value for key, value in _numbers("eval", values)}


def evaluation_tags(evaluation: dict[str, Any], values: Iterable[str]) -> dict[str, str]:
    """What readers need beside the metrics of an evaluation.

    MLflow cannot delete a metric: ``colddiff.eval_keys`` says which of the run's belong to its last
    evaluation, and which are left from an earlier one with other settings.
    """
    dirty = " with uncommitted changes" if evaluation.get("git_dirty") else ""
    return {
        "colddiff.eval_split": str(evaluation.get("split", "")),
        "colddiff.eval_keys": " ".join(key.removeprefix("eval/") for key in values)[:LONGEST_TAG],
        "colddiff.eval_git_sha": f"{evaluation.get('git_sha', '')[:12]}{dirty}",
    }


def artifact_paths(folder: Path, *, final: bool) -> list[Path]:
    """The files to upload; the weights only of a run that is not going on."""
    names = ARTIFACTS + (FINAL_ARTIFACTS if final else ())
    paths = [folder / name for name in names] + sorted(folder.glob("submission-*"))
    if (folder / "samples").is_dir():
        paths += sorted((folder / "samples").iterdir())
    return [path for path in paths if path.is_file() and not path.name.startswith(".")]


def fingerprint(folder: Path) -> frozenset[tuple[str, int, int]]:
    """Name, size and time of all that is sent of a run folder: equal where nothing is new."""
    names = ("config.json", "environment.json", "status.json", "journal.jsonl", "evaluation.json")
    paths = {folder / name for name in names} | set(artifact_paths(folder, final=True))
    found = set()
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            status = path.stat()
            found.add((str(path), status.st_size, status.st_mtime_ns))
    return frozenset(found)


def digest(content: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file in hexadecimal, without reading it into memory at once."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _machine(attempt: dict[str, Any]) -> str:
    """What computed: GPU x their number, or processor x threads; empty where that is not known."""
    ranks, on_gpu = int(attempt.get("world_size") or 1), bool(attempt.get("gpu"))
    if not on_gpu and str(attempt.get("device") or "").startswith("cuda"):
        return ""  # recorded before GPUs had names
    name = attempt.get("gpu") if on_gpu else attempt.get("processor")
    number = ranks if on_gpu else ranks * int(attempt.get("threads") or 0)
    return f"{name} x {number}" if name and number else ""


def _distinct(values: Iterator[Any]) -> str:
    return ",".join(dict.fromkeys(str(value) for value in values if value))


def _numbers(prefix: str, value: Any) -> Iterator[tuple[str, float]]:
    match value:
        case bool() | str() | None:
            return
        case int() | float():
            yield prefix, float(value)
        case dict():
            for key, item in value.items():
                yield from _numbers(f"{prefix}/{key}", item)
