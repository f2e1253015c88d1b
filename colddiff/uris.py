"""Tracking URIs: where they point, how they are shown, and what in them must not be shown."""

from __future__ import annotations

import os
import re
from pathlib import Path

SQLITE = "sqlite:///"


def default_uri() -> str:
    """``$MLFLOW_TRACKING_URI``, or ``mlflow.db`` in the working folder; SQLite paths absolute."""
    return absolute_uri(os.environ.get("MLFLOW_TRACKING_URI") or f"{SQLITE}mlflow.db")


def absolute_uri(uri: str) -> str:
    """The URI, with a relative SQLite path made absolute: jobs run in other folders."""
    return f"{SQLITE}{Path(uri[len(SQLITE) :]).absolute()}" if uri.startswith(SQLITE) else uri


def sqlite_path(uri: str) -> Path | None:
    """The file of a SQLite URI, None for any other."""
    if not uri.startswith(SQLITE):
        return None
    return Path(uri[len(SQLITE) :].partition("?")[0]).absolute()


def is_server(uri: str) -> bool:
    """Whether the URI is an MLflow server's, and not a database's."""
    return uri.startswith(("http://", "https://"))


def mask_secrets(text: str) -> str:
    """The text with user:password and secret query values of every URI in it replaced by ***."""
    text = re.sub(r"(\w[\w+.-]*://)[^\s/?#\"']*@", r"\1***@", text)
    secret = r"([?&][\w.-]*(?:password|passwd|pwd|token|secret|key)[\w.-]*=)[^&\s\"']+"
    return re.sub(secret, r"\1***", text, flags=re.IGNORECASE)


def run_link(uri: str, experiment_id: str, run_id: str) -> str:
    """The run's address on a tracking server, or the command that serves a local store."""
    shown = mask_secrets(absolute_uri(uri))
    if is_server(shown):
        return f"{shown.rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}"
    return f"mlflow ui --backend-store-uri {shown}"
