"""The model registry: the students of confirmed sweeps as versions of models, which are found again by their tags."""

import logging
import re
import shutil
import warnings
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

from tune_topkd.tracking.cleaning import LONGEST_TAG
from tune_topkd.tracking.cleaning import clean_text
from tune_topkd.tracking.masking import masked
from tune_topkd.tracking.store import TrackingError
from tune_topkd.tracking.store import client_of
from tune_topkd.tracking.store import find_experiment
from tune_topkd.tracking.store import masked_errors
from tune_topkd.tracking.store import runs_by_trial
from tune_topkd.tracking.store import sqlite_file

PREFIX = "topkd"
"""Of the names of all models."""
CHAMPION = "champion"
"""The alias of the version to use."""
PREVIOUS = "previous"
"""The alias of the version that was to be used before it."""
PROGRAM_FILE = "model.pt2"
"""What MLflow's loader of exported programs looks for."""

_LONGEST_NAME = 250
_LONGEST_DESCRIPTION = 5000
_LONGEST_VERSION_TAG = 100_000
_FORBIDDEN = re.compile(r"[^\w.-]+", re.ASCII)  # a / and a : are refused, and an @ begins an alias
_ABSENT = "RESOURCE_DOES_NOT_EXIST"


@dataclass(frozen=True)
class Version:
    """A version of a registered model."""

    name: str
    number: str
    tags: Mapping[str, str]

    @property
    def uri(self) -> str:
        """What MLflow and `export` call it."""
        return f"models:/{self.name}/{self.number}"


def model_name(dataset: str, teacher: str | None, student: str) -> str:
    """The name of the registered model of a pair: `topkd.<dataset>.<teacher>.<student>`, `none` for no teacher.

    A sign that the registry or a `models:/` URI does not take becomes `-`, as in `torchvision-resnet18`.
    """
    parts = (PREFIX, dataset, teacher or "none", student)
    return ".".join(_FORBIDDEN.sub("-", part) for part in parts)[:_LONGEST_NAME]


def write_model(folder: Path, program: Path, images: Path, classes: int, tuned: Path) -> None:
    """Write an MLflow model that any process with MLflow and torch can load, by `mlflow.pyfunc` and without this project.

    It computes on the CPU, since an exported program stays on the device that it was traced on.

    Args:
        folder: to be made.
        program: an exported torch program, from images `(B, C, H, W)` uint8 to logits `(B, classes)` float32.
        images: `.npy` of an example, `(B, C, H, W)` uint8.
        classes: of the logits.
        tuned: the tuned config's file, which is put beside the model.
    """
    import numpy as np

    example = np.load(images)
    data = program.parent / "data"
    data.mkdir()
    shutil.copyfile(program, data / PROGRAM_FILE)
    with _quiet():
        from mlflow import pyfunc
        from mlflow.models import ModelSignature
        from mlflow.types.schema import Schema
        from mlflow.types.schema import TensorSpec

        takes = Schema([TensorSpec(example.dtype, (-1, *example.shape[1:]))])
        gives = Schema([TensorSpec(np.dtype("float32"), (-1, classes))])
        pyfunc.save_model(
            folder,
            loader_module="mlflow.pytorch",
            data_path=str(data),
            model_config={"device": "cpu"},
            signature=ModelSignature(takes, gives),
            input_example=example,
            pip_requirements=[
                f"torch=={version_of('torch').partition('+')[0]}"
            ],  # else MLflow would load it to find out
        )
    shutil.copyfile(tuned, folder / tuned.name)


class Registry:
    """The model registry of a tracking URI. Each method raises `TrackingError` if MLflow fails, credentials masked."""

    def __init__(self, uri: str) -> None:
        """Open it.

        Raises:
            TrackingError: it cannot be.
        """
        self._uri = uri
        with masked_errors(uri):
            file = sqlite_file(uri)
            if file is not None and not file.exists():  # MLflow would make it
                raise TrackingError("there is no such database")
            self._client: Any = client_of(uri)

    def models(self) -> list[str]:
        """The names of this project's models."""
        with masked_errors(self._uri):
            found = _pages(self._client.search_registered_models, f"name LIKE '{PREFIX}.%'")
            return sorted(model.name for model in found)

    def aliases(self, name: str) -> dict[str, str] | None:
        """The numbers of a model's versions by alias; None if there is no such model."""
        with masked_errors(self._uri):
            try:
                model = self._client.get_registered_model(name)
            except Exception as error:
                if getattr(error, "error_code", None) != _ABSENT:
                    raise
                return None
            return {alias: str(number) for alias, number in model.aliases.items()}

    def versions(self, name: str) -> list[Version]:
        """All versions of a model, oldest first; none of one that is not there."""
        with masked_errors(self._uri):
            found = _pages(self._client.search_model_versions, f"name = '{name}'")
            versions = [Version(name, str(version.version), dict(version.tags)) for version in found]
            return sorted(versions, key=lambda version: int(version.number))

    def add(
        self, name: str, folder: Path, tags: Mapping[str, str], *, sweep_id: str, place: str, note: str, about: str
    ) -> Version:
        """Add a version, with its files among the artifacts of the sweep's own run.

        Args:
            name: the model's, which is made if need be.
            folder: what `write_model` has written.
            tags: of the version.
            sweep_id: of the sweep, which must be in MLflow.
            place: where the files lie among the run's artifacts.
            note: what is said of the version, as Markdown.
            about: what is said of the model, if it is new.

        Raises:
            TrackingError: MLflow fails, or has no run of the sweep.
        """
        with masked_errors(self._uri):
            run = self._run(sweep_id)
            try:
                self._client.create_registered_model(name, description=clean_text(about, _LONGEST_DESCRIPTION))
            except Exception as error:
                if getattr(error, "error_code", None) != "RESOURCE_ALREADY_EXISTS":
                    raise
            self._client.log_artifacts(run.info.run_id, str(folder), place)
            made = self._client.create_model_version(
                name,
                source=f"{run.info.artifact_uri}/{place}",
                run_id=run.info.run_id,
                tags={key: clean_text(text, _LONGEST_VERSION_TAG) for key, text in tags.items()},
                description=clean_text(note, _LONGEST_DESCRIPTION),
            )
            return Version(name, str(made.version), dict(tags))

    def set_alias(self, version: Version, alias: str) -> None:
        """Give a version an alias, which another one of the model may have had."""
        with masked_errors(self._uri):
            self._client.set_registered_model_alias(version.name, alias, version.number)

    def set_tag(self, version: Version, key: str, text: str) -> None:
        """Give a version a tag."""
        with masked_errors(self._uri):
            self._client.set_model_version_tag(version.name, version.number, key, clean_text(text, LONGEST_TAG))

    def download(self, version: Version, file: str, folder: Path) -> Path:
        """Copy one of the files of a version's model into a folder.

        Raises:
            TrackingError: MLflow fails, or the version has no such file.
        """
        with masked_errors(self._uri):
            from mlflow.artifacts import download_artifacts

            place = self._client.get_model_version_download_uri(version.name, version.number)
            found = download_artifacts(f"{place}/{file}", dst_path=str(folder), tracking_uri=self._uri)
            return Path(found)

    def _run(self, sweep_id: str) -> Any:
        experiment = find_experiment(self._client, self._uri)
        runs = runs_by_trial(self._client, experiment.experiment_id, sweep_id).get("") if experiment else None
        if not runs:
            raise TrackingError(f"there is no run of the sweep {sweep_id} at {masked(self._uri)}")
        return runs[0]


def _pages(search: Any, filter_string: str) -> Iterator[Any]:
    """All that a search of MLflow's finds."""
    token = None
    while True:
        page: Sequence[Any] = search(filter_string, page_token=token)
        yield from page
        token = getattr(page, "token", None)
        if not token:
            return


@contextmanager
def _quiet() -> Iterator[None]:
    """MLflow tells neither what it does nor what it thinks of its own code, of which it warns as it is imported."""
    logger = logging.getLogger("mlflow")
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
