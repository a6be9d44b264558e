"""Where a machine keeps its copy of what lies in a store: a private folder, which may be lost at any time."""

import hashlib
import os
import re
from pathlib import Path

CACHE_VARIABLE = "TUNE_TOPKD_CACHE_DIR"


def cache_folder() -> Path:
    """The folder of all caches of this user on this machine.

    `TUNE_TOPKD_CACHE_DIR`, or `tune_topkd` in `XDG_CACHE_HOME`, or in `~/.cache`.
    """
    if given := os.environ.get(CACHE_VARIABLE):
        return Path(given).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "tune_topkd"


def copy_of(uri: str) -> Path:
    """The folder in which the runs of a URI have their copy on this machine; one for each endpoint."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    digest = hashlib.sha256(f"{endpoint} {uri}".encode()).hexdigest()[:12]
    readable = re.sub(r"[^A-Za-z0-9.]+", "-", uri.partition("://")[2]).strip("-.")[-40:]
    return cache_folder() / "runs" / f"{readable}-{digest}"
