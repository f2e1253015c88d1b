"""Preflight checks of MLflow, by calls as the runs will make them."""

from __future__ import annotations

import http.client
import importlib.metadata
import urllib.request
from urllib.parse import urlsplit

from colddiff.tracking import TrackingError, mask_secrets, open_client, store_errors
from colddiff.uris import is_server, sqlite_path
from jobs.doctor.checks import Check, existing
from jobs.options import Launch
from jobs.profiles import Profile

NAME = "MLflow"
LATER = "or launch with --offline: python jobs/launch.py sync sends the runs' record later"
LONGEST = 240
"""Of a message; what went wrong stands at its end."""


def check_tracking(launch: Launch) -> Check:
    """Whether the tracking store answers, and suits where the jobs run."""
    uri, on_slurm = launch.uri, launch.cluster == "slurm"
    if on_slurm:
        try:
            launch.refuse_shared_sqlite(2, Profile())
        except ValueError as error:
            what, _, mend = str(error).partition(". ")
            return Check(NAME, "FAIL", what, mend)
    file = sqlite_path(uri)
    if file is not None and not (file.exists() and file.stat().st_size):
        if not existing(file).is_dir():
            mend = "give another --tracking-uri"
            return Check(NAME, "FAIL", f"{existing(file)} is no folder, {file} cannot be", mend)
        return Check(NAME, "ok", f"{file} is made at the first launch")
    found = check_store(uri, launch.experiment)
    if found.verdict == "ok" and on_slurm and is_this_machine(uri):
        mend = "give its name, and start it with --host 0.0.0.0 --allowed-hosts NAME,NAME:PORT"
        return Check(NAME, "warning", f"{mask_secrets(uri)} means to each job its own node", mend)
    return found


def check_store(uri: str, experiment: str) -> Check:
    """Whether the store answers a call of the API; /health alone says nothing."""
    shown = mask_secrets(uri)
    try:
        with store_errors(uri):
            found = open_client(uri).get_experiment_by_name(experiment)
    except TrackingError as error:
        return _refused(shown, " ".join(str(error).split()))
    if found is not None and found.lifecycle_stage != "active":
        mend = f"mlflow experiments restore --experiment-id {found.experiment_id}, or --experiment"
        return Check(NAME, "FAIL", f"experiment {experiment!r} is deleted at {shown}", mend)
    there = f"{shown} answers" + (f", experiment {experiment!r}" if found else "")
    return _with_version(uri, there) if is_server(uri) else Check(NAME, "ok", there)


def is_this_machine(uri: str) -> bool:
    """Whether the URI means another machine on every machine."""
    host = urlsplit(uri).hostname or ""
    return is_server(uri) and (host in ("localhost", "::1") or host.startswith("127."))


def _refused(shown: str, message: str) -> Check:
    text = message if len(message) <= LONGEST else f"{message[:60]} … {message[60 - LONGEST :]}"
    if "403" in message:
        host = urlsplit(shown).netloc.rpartition("@")[2]
        name = host.partition(":")[0]
        mend = f'start the server with --allowed-hosts "{name},{name}:*", it refuses the name'
    elif "401" in message:
        mend = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
    else:
        mend = f"start it or mend --tracking-uri, {LATER}"
    return Check(NAME, "FAIL", text, mend)


def _with_version(uri: str, there: str) -> Check:
    """With the server's version beside ours, where it tells it."""
    ours, theirs = importlib.metadata.version("mlflow"), _server_version(uri)
    if theirs and theirs.split(".")[0] != ours.split(".")[0]:
        mend = f"pip install mlflow=={theirs} here, or upgrade the server"
        return Check(NAME, "warning", f"{there}; it is {theirs}, ours {ours}", mend)
    return Check(NAME, "ok", there + (f", version {theirs}" if theirs else ""))


def _server_version(uri: str) -> str:
    """Empty where the server does not say, as behind a login."""
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/version", timeout=5) as answer:
            text: str = answer.read(100).decode("ascii").strip()
    except (OSError, ValueError, http.client.HTTPException):
        return ""
    return text if text[:1].isdigit() else ""
