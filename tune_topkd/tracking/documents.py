"""What people read of a sweep in MLflow: its config, its answer and its report as artifacts, and a description.

They are made of the sweep's folder by an author that is handed in, and are of one line of the ledger, which a tag names: a
line's documents are sent once. An artifact store that cannot be written is passed over: all else is in MLflow.
"""

import contextlib
import re
import threading
import zlib
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path
from typing import Any
from urllib.parse import unquote
from urllib.parse import urlsplit

from tune_topkd.tracking.cleaning import LONGEST_TAG
from tune_topkd.tracking.cleaning import clean_text
from tune_topkd.tracking.masking import reason_of
from tune_topkd.tracking.projection import NOTE_TAG
from tune_topkd.tracking.projection import SWEEP_NOTE
from tune_topkd.tracking.store import Client
from tune_topkd.tracking.store import TrackingError

ARTIFACTS_TAG = "artifacts"
"""Which artifacts a sweep's run has, and of which line of the ledger: `sweep.yaml, tuned.yaml of line 214`."""
DESCRIPTION_TAG = "description_checksum"
"""Of the description that was written here: one that has another is the user's."""
LONGEST_UPLOAD_SECONDS = 15.0
"""Of an attempt, of which there are two."""


@dataclass(frozen=True)
class Documents:
    """What people read of a sweep."""

    files: Mapping[str, str] = field(default_factory=dict)
    """Texts by the name of the artifact."""
    description: str = ""
    """Markdown; empty where there is nothing new to say."""


Author = Callable[[bool], Documents]
"""Makes the documents of a sweep as it stands: those of its beginning, or, if it is told so, all. May take seconds and may
raise."""


class SkippedError(TrackingError):
    """Documents could not be made or stored; MLflow itself answers."""


def line_in(tags: Mapping[str, str]) -> int:
    """Of which line of the ledger the artifacts of a run with these tags are; -1 where it has none."""
    found = re.search(r" of line (\d+)$", tags.get(ARTIFACTS_TAG, ""))
    return int(found[1]) - 1 if found else -1


def names_in(tags: Mapping[str, str]) -> list[str]:
    """Which artifacts a run with these tags has."""
    return tags[ARTIFACTS_TAG].rpartition(" of line ")[0].split(", ") if line_in(tags) >= 0 else []


def send(client: Client, uri: str, run_id: str, author: Author, line: int, *, are_all: bool) -> dict[str, str]:
    """Send a sweep's documents to its run.

    Args:
        client: of the store at the URI.
        uri: MLflow's tracking URI.
        run_id: of the sweep's own run.
        author: makes the documents.
        line: of the ledger, from 0, that they are of.
        are_all: whether all documents are due, or those of the sweep's beginning.

    Returns:
        The tags that the run now has besides.

    Raises:
        SkippedError: the documents could not be made, or the artifact store not be written; says which and why.
        Exception: MLflow's, if it does not answer.
    """
    try:
        documents = author(are_all)
    except Exception as error:  # noqa: BLE001 (whatever it is, the rest of the sweep is in MLflow)
        raise SkippedError(f"they cannot be made: {reason_of(error, uri)}") from None
    run = client.get_run(run_id)
    tags = _description(documents, run.data.tags)
    trouble = _stored(client, uri, run, documents.files)
    if not trouble:
        tags[ARTIFACTS_TAG] = clean_text(f"{', '.join(documents.files)} of line {line + 1}", LONGEST_TAG)
    _set_tags(client, run_id, {name: text for name, text in tags.items() if run.data.tags.get(name) != text})
    if trouble:
        raise SkippedError(trouble)
    return tags


def missing(client: Client, uri: str, run: Any, due: int | None) -> Iterator[str]:
    """What a sweep's run lacks of the documents that are due after a line of the ledger, a line each."""
    line = line_in(run.data.tags)
    if due is not None and line < due:
        what = "has no artifacts" if line < 0 else f"artifacts are of line {line + 1} of the ledger"
        yield f"{what}, should be of line {due + 1}"
        return
    if not (names := names_in(run.data.tags)):
        return
    try:
        there = {file.path for file in client.list_artifacts(run.info.run_id)}
    except Exception as error:  # noqa: BLE001 (whatever the artifact store raises)
        yield f"artifacts cannot be listed: {reason_of(error, uri)}"
        return
    for name in names:
        if name not in there:
            yield f"artifact {name} is missing"


def _description(documents: Documents, tags: Mapping[str, str]) -> dict[str, str]:
    """The tags of the description, unless the one that is there is the user's."""
    there = tags.get(NOTE_TAG, "")
    if not documents.description or (
        there and _checksum(there) not in (_checksum(SWEEP_NOTE), tags.get(DESCRIPTION_TAG))
    ):
        return {}
    text = clean_text(documents.description, LONGEST_TAG)
    return {NOTE_TAG: text, DESCRIPTION_TAG: _checksum(text)}


def _checksum(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"


def _stored(client: Client, uri: str, run: Any, files: Mapping[str, str]) -> str:
    """Store the files among a run's artifacts; what kept them from it.

    Raises:
        Exception: MLflow's, if it does not answer.
    """
    if trouble := _foreign_store(uri, run.info.artifact_uri):
        return trouble
    trouble = ""
    for _ in range(2):  # an answer may have been lost
        if not (trouble := _trouble_of_storing(client, run.info.run_id, files, uri)):
            return ""
        client.get_run(run.info.run_id)  # is it the artifact store, or all of MLflow?
    return f"the artifact store {run.info.artifact_uri} cannot be written: {trouble}"


def _trouble_of_storing(client: Client, run_id: str, files: Mapping[str, str], uri: str) -> str:
    """Store the files; why that failed.

    An artifact store that hangs must not hold up the metrics, and nothing of MLflow's says how long it may take.
    """
    failed: list[Exception] = []

    def store() -> None:
        try:
            for name, text in files.items():
                client.log_text(run_id, text, name)
        except Exception as error:  # noqa: BLE001 (whatever the artifact store raises; it is told)
            failed.append(error)

    thread = threading.Thread(target=store, name="mlflow-artifacts", daemon=True)
    thread.start()
    thread.join(LONGEST_UPLOAD_SECONDS)
    if thread.is_alive():
        return f"no answer for {LONGEST_UPLOAD_SECONDS:.0f} s"
    return reason_of(failed[0], uri) if failed else ""


def _foreign_store(uri: str, artifact_uri: str) -> str:
    """Why the folder in which a server keeps artifacts is not the one of that name here; empty if it may be.

    MLflow's client would make it, and write where nobody looks.
    """
    place = urlsplit(artifact_uri)
    if not uri.startswith(("http://", "https://")) or place.scheme not in ("", "file"):
        return ""
    folder = Path(unquote(place.path))
    root = (
        folder.parents[2] if len(folder.parents) > 2 else folder
    )  # root/experiment/run/artifacts; a server makes its root
    with contextlib.suppress(OSError):
        if root.is_dir():
            return ""
    return (
        f"the server keeps artifacts in {root}, a folder of its own machine that is not here: start it with "
        "--serve-artifacts, or with a --default-artifact-root that both reach"
    )


def _set_tags(client: Client, run_id: str, tags: Mapping[str, str]) -> None:
    from mlflow.entities import RunTag

    if tags:
        client.log_batch(run_id, tags=[RunTag(*pair) for pair in tags.items()])
