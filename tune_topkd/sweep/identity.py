"""What a sweep's results depend on besides its config: data, weights, networks and the user's code, each by its
content.

Their places may change, their content may not. Each is named by the config key that it belongs to.
"""

from collections.abc import Mapping
from pathlib import Path

from tune_topkd.config import PairConfig
from tune_topkd.config import Problem
from tune_topkd.config import SweepConfig
from tune_topkd.storage import file_hash
from tune_topkd.user_code import code_hash
from tune_topkd.user_code import is_users
from tune_topkd.user_code import resolve
from tune_topkd.user_code import user_modules

VERSION = 1
"""Of the rules by which identities are taken; those of other versions are not compared."""

DATA, TEACHER, TEACHER_NETWORK = "data", "teacher.checkpoint", "teacher.name"
STUDENT, STUDENT_NETWORK, CODE = "student.checkpoint", "student.name", "code"

_WHAT = {
    DATA: "the dataset",
    TEACHER: "the teacher's weights",
    TEACHER_NETWORK: "the network that the teacher's name builds",
    STUDENT: "the student's initial weights",
    STUDENT_NETWORK: "the network that the student's name builds",
}


def identities(config: PairConfig, teacher_file: Path | None) -> dict[str, str]:
    """The identities of everything that results depend on, by config key; of the user's modules by `code MODULE`.

    Args:
        config: names the data, networks and loss.
        teacher_file: the teacher's weights, if there are any.

    Raises:
        ValueError: something is missing or cannot be read.
    """
    from tune_topkd.data import dataset_info
    from tune_topkd.data import fingerprint
    from tune_topkd.loss import loss_parameters
    from tune_topkd.models import network_fingerprint

    info = dataset_info(config.data)
    found = {DATA: fingerprint(config.data)}
    networks = {STUDENT_NETWORK: config.student} | (
        {TEACHER_NETWORK: config.teacher.model} if config.teacher is not None else {}
    )
    for key, network in networks.items():
        found[key] = network_fingerprint(network, num_classes=info.num_classes, image_shape=info.image_shape)
    if config.student.checkpoint is not None:
        found[STUDENT] = file_hash(Path(config.student.checkpoint))
    if teacher_file is not None:
        found[TEACHER] = file_hash(teacher_file)
    loss_parameters(config.method)  # imports it
    names = [config.method.removesuffix("+topkd"), config.data.name, *(network.name for network in networks.values())]
    names += [*_scaling_rules(config), *_choices(config)]
    for name in names:
        found |= {f"{CODE} {module}": code_hash(path) for module, path in user_modules(name).items()}
    return found


def _scaling_rules(config: PairConfig) -> list[str]:
    """The rule of the scaling module that is the user's, imported."""
    rule = str(config.loss.get("scaling_rule", ""))
    if not is_users(rule):
        return []
    resolve(rule)
    return [rule]


def _choices(config: PairConfig) -> list[str]:
    """The sampler and the scheduler of a sweep that are the user's, imported."""
    if not isinstance(config, SweepConfig):
        return []
    names = [name for name in (config.sweep.sampler.name, config.sweep.scheduler.name) if is_users(name)]
    for name in names:
        resolve(name)
    return names


def file_hashes(config: PairConfig, found: Mapping[str, str], teacher_file: Path | None) -> dict[str, str]:
    """The SHA-256 of each file of weights by its path, which trials compare with the file before they use it."""
    paths = {TEACHER: teacher_file, STUDENT: config.student.checkpoint}
    return {str(path): found[key] for key, path in paths.items() if path is not None and key in found}


def described(key: str) -> str:
    """What an identity is of, in words."""
    return _WHAT.get(key, f"this file of yours ({key.removeprefix(CODE).strip()})")


def changes(before: Mapping[str, str], now: Mapping[str, str], config: PairConfig) -> list[Problem]:
    """A problem for each identity that has changed; those that only one of the two has are not compared."""
    values = {
        DATA: config.data.root,
        TEACHER: config.teacher and config.teacher.checkpoint,
        TEACHER_NETWORK: config.teacher and config.teacher.name,
        STUDENT: config.student.checkpoint,
        STUDENT_NETWORK: config.student.name,
    }
    return [
        Problem(key=key, value=values.get(key), has_value=values.get(key) is not None, rule=_rule(key))
        for key in before
        if key in now and before[key] != now[key]
    ]


def _rule(key: str) -> str:
    cure = "restore it"
    if key in (DATA, TEACHER, STUDENT):
        cure += f", or say where the old one is: `resume --set {'data.root' if key == DATA else key}=PATH`"
    what = _WHAT.get(key, "this file of yours")
    return (
        f"{what} changed since the sweep began, and its trials would not be comparable; {cure}; "
        "to use the new one, `run` a new sweep under another name"
    )
