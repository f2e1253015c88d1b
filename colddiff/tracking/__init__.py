"""Run folder -> MLflow: one idempotent operation, and a thread that repeats it.

The run folder is the truth and MLflow a view of it, so everything here is derived from the folder
and may be sent again: MLflow drops an exact repeat of a metric (key, step, timestamp, value), and
journal lines keep their timestamps. ``tracking.json`` only remembers what need not be sent again.
This is the only package that writes to MLflow, which it imports at the first use.
"""

from colddiff.tracking._background import BackgroundSync
from colddiff.tracking._push import PushReport, push
from colddiff.tracking._store import TrackingError, initialise_store, open_client, store_errors
from colddiff.uris import absolute_uri, default_uri, mask_secrets, run_link

__all__ = [
    "BackgroundSync",
    "PushReport",
    "TrackingError",
    "absolute_uri",
    "default_uri",
    "initialise_store",
    "mask_secrets",
    "open_client",
    "push",
    "run_link",
    "store_errors",
]
