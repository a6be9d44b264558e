"""A confirmed sweep's student in MLflow's model registry, and a tuned config out of it."""

import json
import math
import re
import tempfile
from collections.abc import Callable
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tune_topkd.config import ConfigError
from tune_topkd.config import Problem
from tune_topkd.config import SweepConfig
from tune_topkd.config import unknown_choice
from tune_topkd.export import TUNED_FILE
from tune_topkd.export import NoAnswerError
from tune_topkd.export import Student
from tune_topkd.export import TunedConfig
from tune_topkd.export import as_yaml
from tune_topkd.export import load_tuned_config
from tune_topkd.ledger import SweepState
from tune_topkd.space import digest
from tune_topkd.storage import write_text
from tune_topkd.sweep import identity
from tune_topkd.sweep.callbacks import Watchers
from tune_topkd.sweep.result import answer
from tune_topkd.sweep.student import student_of
from tune_topkd.sweep.workspace import Workspace
from tune_topkd.verdict import verdict_of
from tune_topkd.verdict import welch_interval

if TYPE_CHECKING:
    from tune_topkd.tracking import Registry
    from tune_topkd.tracking import Version

MODELS = "models:/"
"""What begins the URI of a model in the registry."""
JUDGED_TAG = "judged"
"""What became of a version when it was compared with the champion: an alias that a person moves is not moved back."""
_SAME = ("dataset", "data", "teacher", "student", "network")
"""Tags that two versions must have alike to be compared: names are cleaned, and a student may have other widths."""
_MODEL_URI = re.compile(rf"{MODELS}([^/]+?)(?:@([^/@]+)|/([1-9][0-9]*))")


def register(
    config: SweepConfig, state: SweepState, folder: Path, uri: str, watchers: Watchers, trouble: str = ""
) -> None:
    """Register the student of a confirmed answer; an error that keeps it from that is a note, and not raised.

    A sweep whose answer is not measured is passed over; so is one without MLflow. What is there is not registered again.

    Args:
        config: the sweep's frozen config.
        state: its trials.
        folder: the sweep's.
        uri: MLflow's tracking URI; empty for none.
        watchers: are told what was done.
        trouble: why MLflow is known not to have the sweep's runs; empty if it has.
    """
    try:
        tuned = answer(config, state)
    except NoAnswerError:
        return
    if not uri or tuned.evidence.test is None:
        return
    name = state.header.sweep
    try:
        if trouble:
            raise ConnectionError(f"MLflow has not got all of the sweep ({trouble})")
        with watchers.phase("registering the student in MLflow"):
            _register(tuned, lambda: student_of(config, state, folder, tuned), _note(state, tuned), uri, watchers)
    except Exception as error:  # noqa: BLE001 (the sweep is done, and this can be done later)
        watchers.note(skipped(name, " ".join(str(error).split()) or type(error).__name__, uri))


def skipped(sweep: str, reason: str, uri: str) -> str:
    """That the student of a confirmed sweep is not registered, why, and how to do it later; credentials masked."""
    from tune_topkd.tracking import masked

    return f"the student is not in MLflow's model registry: {masked(reason, uri)}; `track {sweep}` registers it later"


def _register(tuned: TunedConfig, student: Callable[[], Student], note: str, uri: str, watchers: Watchers) -> None:
    from tune_topkd.tracking import Registry
    from tune_topkd.tracking import model_name

    evidence = tuned.evidence
    assert evidence.test is not None, "it was measured"
    sweep_id, look = evidence.sweep_id, evidence.test.look
    pair = (tuned.data.name, None if tuned.teacher is None else tuned.teacher.name, tuned.student.name)
    name, registry = model_name(*pair), Registry(uri)
    there = registry.versions(name)
    found = next((v for v in there if (v.tags.get("sweep_id"), v.tags.get("look")) == (sweep_id, str(look))), None)
    if found is None:
        with tempfile.TemporaryDirectory(prefix="tune-topkd-register-") as folder:
            model = _written(tuned, student(), Path(folder))
            about = (
                f"`{pair[2]}`, taught by `{pair[1]}` on `{pair[0]}`: the students of confirmed sweeps of tune_topkd."
            )
            if pair[1] is None:
                about = about.replace(", taught by `None`", "")
            place = f"student-look-{look}"
            found = registry.add(name, model, _tags(tuned), sweep_id=sweep_id, place=place, note=note, about=about)
    elif JUDGED_TAG in found.tags:
        return
    watchers.info(f"registered as {found.uri}: {_judged(registry, found, there)}")


def _written(tuned: TunedConfig, student: Student, folder: Path) -> Path:
    """The MLflow model of a student, in a folder of its own."""
    import numpy as np

    from tune_topkd.export.graph import save_program
    from tune_topkd.export.graph import shown_images
    from tune_topkd.tracking import write_model

    program, images, config, model = (folder / name for name in ("student.pt2", "images.npy", TUNED_FILE, "model"))
    with program.open("xb") as stream:
        save_program(student, stream)
    np.save(images, shown_images(student)[:1].numpy())
    write_text(config, as_yaml(tuned))
    write_model(model, program, images, student.dataset.num_classes, config)
    return model


# --- what is said of a version --------------------------------------------------------------------------------------


def _tags(tuned: TunedConfig) -> dict[str, str]:
    """By which a version is found again, compared with others, and known to a reader; figures in percent and points."""
    evidence, test = tuned.evidence, tuned.evidence.test
    assert test is not None, "it was measured"
    gains = {method: base.gain.model_dump() for method, base in evidence.baselines.items() if base.gain is not None}
    return {
        "sweep": evidence.sweep,
        "sweep_id": evidence.sweep_id,
        "look": str(test.look),
        "method": tuned.method,
        "dataset": tuned.data.name,
        "teacher": "" if tuned.teacher is None else tuned.teacher.name,
        "student": tuned.student.name,
        "test_top1": repr(test.test_top1),
        "interval": json.dumps(test.interval),
        "seeds": json.dumps(test.seeds),
        "values": json.dumps(test.values),
        "gains": json.dumps(gains),
        "tuned_config": digest(tuned.model_dump(mode="json")),
        "data": evidence.identities.get(identity.DATA, ""),
        "network": evidence.identities.get(identity.STUDENT_NETWORK, ""),
    }


def _note(state: SweepState, tuned: TunedConfig) -> str:
    """The description of a version, as Markdown."""
    verdict = verdict_of(state)
    assert verdict is not None, "it was measured"
    return (
        f"{verdict.sentence}\n\n"
        f"- Sweep `{state.header.sweep}`, trial {tuned.evidence.trial}; the weights are those of its first training for "
        "the test set.\n"
        "- `mlflow.pyfunc.load_model` takes images `(B, C, H, W)` uint8 as they are stored, and gives logits "
        "`(B, classes)`.\n"
        f"- `{TUNED_FILE}` beside the model is the tuned config: `tune_topkd.export.load_tuned_config` reads it.\n"
    )


# --- the champion ---------------------------------------------------------------------------------------------------


def _judged(registry: "Registry", version: "Version", there: list["Version"]) -> str:
    """Give a version the alias that it deserves beside the champion; what became of it, in words.

    The aliases come before the tag that says so: who is killed in between begins anew, and ends the same.
    """
    from tune_topkd.tracking import CHAMPION
    from tune_topkd.tracking import PREVIOUS

    number = (registry.aliases(version.name) or {}).get(CHAMPION)
    champion = next((other for other in there if other.number == number), None)
    if champion is None or champion.number == version.number:
        is_better, told = True, "it is the champion"
    else:
        is_better, told = _compared(version, champion)
    if is_better and champion != version:
        if champion is not None:
            registry.set_alias(champion, PREVIOUS)
        registry.set_alias(version, CHAMPION)
    registry.set_tag(version, JUDGED_TAG, told)
    return told


def _compared(version: "Version", champion: "Version") -> tuple[bool, str]:
    """Whether a version is to replace the champion, and why, in words."""
    stays = f"version {champion.number} stays the champion"
    if any(version.tags.get(key) != champion.tags.get(key) for key in _SAME):
        return False, f"{stays}: it is of other images or networks, so the figures cannot be compared"
    interval = welch_interval(_values(version.tags), _values(champion.tags))
    if interval is None:
        return False, f"{stays}: its tags have no values of two seeds to be compared with"
    low, high = interval
    within = f"{(low + high) / 2:+.2f} points ({low:+.2f} to {high:+.2f})"
    if not interval.excludes_zero:
        return False, f"{stays}: {within} against it are not told apart"
    if low < 0:
        return False, f"{stays}: {within} against it"
    return True, f"it is the champion, {within} over version {champion.number}, which is `previous` now"


def _values(tags: Mapping[str, str]) -> list[float]:
    """A version's figures on the test set by seed, in percent; none where the tag is not as it is written here."""
    try:
        found = json.loads(tags.get("values", "[]"))
    except ValueError:
        return []
    numbers = [value for value in found if isinstance(value, int | float)] if isinstance(found, list) else []
    return [float(value) for value in numbers if math.isfinite(value)]


# --- out of the registry --------------------------------------------------------------------------------------------


def registered(uri: str, workspace: Workspace) -> TunedConfig:
    """The tuned config of a registered model.

    Args:
        uri: `models:/NAME@ALIAS` or `models:/NAME/VERSION`.
        workspace: has MLflow's tracking URI.

    Raises:
        ConfigError: there is no such model, alias or version, it has no tuned config, or MLflow cannot be asked.
    """
    from tune_topkd.tracking import Registry
    from tune_topkd.tracking import TrackingError

    found = _MODEL_URI.fullmatch(uri)
    if found is None:
        raise _refused(uri, f"must be {MODELS}NAME@ALIAS or {MODELS}NAME/VERSION")
    if not workspace.mlflow_uri:
        raise _refused(uri, "there is no MLflow to ask: --mlflow-uri or MLFLOW_TRACKING_URI names one")
    try:
        registry = Registry(workspace.mlflow_uri)
        version = _version(registry, uri, *found.groups())
    except TrackingError as error:
        raise _refused(uri, " ".join(str(error).split())) from None
    try:
        with tempfile.TemporaryDirectory(prefix="tune-topkd-registry-") as folder:
            return load_tuned_config(registry.download(version, TUNED_FILE, Path(folder)))
    except ConfigError as error:
        raise ConfigError(uri, error.problems) from None  # its file is a copy that is gone
    except TrackingError as error:
        raise _refused(uri, " ".join(str(error).split())) from None


def _version(registry: "Registry", uri: str, name: str, alias: str | None, number: str | None) -> "Version":
    """The version that a URI names.

    Raises:
        ConfigError: there is none.
    """
    aliases = registry.aliases(name)
    if aliases is None:
        known = registry.models()
        which = (
            unknown_choice(name, known) if known else "the registry has no model of this project; `confirm` makes them"
        )
        raise _refused(uri, f"there is no model {name!r}; {which}")
    if alias is not None and alias not in aliases:
        which = unknown_choice(alias, sorted(aliases)) if aliases else "the model has none"
        raise _refused(uri, f"there is no alias {alias!r}; {which}")
    wanted = number if alias is None else aliases[alias]
    versions = {version.number: version for version in registry.versions(name)}
    if wanted not in versions:
        which = f"known: {', '.join(versions)}" if versions else "the model has none"
        raise _refused(uri, f"there is no version {wanted}; {which}")
    return versions[wanted]


def _refused(uri: str, rule: str) -> ConfigError:
    return ConfigError("export", [Problem(key=uri, rule=rule)])
