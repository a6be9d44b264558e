"""What a sweep's results depend on besides its config, by content: data, weights, networks, a user's code.

Where these lie may change; what they are may not. Each is named by the config key that a user would look at.
"""

from collections.abc import Mapping
from pathlib import Path

from tune_topkd.config import PairConfig
from tune_topkd.config import Problem
from tune_topkd.storage import file_hash
from tune_topkd.user_code import code_hash
from tune_topkd.user_code import user_modules

VERSION = 1
"""Of the rules below: identities taken by other rules are not compared."""

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
    """Each thing's identity by its config key; a module of the user's by `code MODULE`.

    Args:
        config: whose data, networks and loss.
        teacher_file: the teacher's weights, where there are any.

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
    for name in names:
        found |= {f"{CODE} {module}": code_hash(path) for module, path in user_modules(name).items()}
    return found


def file_hashes(config: PairConfig, found: Mapping[str, str], teacher_file: Path | None) -> dict[str, str]:
    """SHA-256 by path of the weights among some identities: trials look that these are still the same."""
    paths = {TEACHER: teacher_file, STUDENT: config.student.checkpoint}
    return {str(path): found[key] for key, path in paths.items() if path is not None and key in found}


def changes(before: Mapping[str, str], now: Mapping[str, str], config: PairConfig) -> list[Problem]:
    """What is no longer what it was, a problem each; what only one of the two has is not compared."""
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
    cure = "put back what it was"
    if key in (DATA, TEACHER, STUDENT):
        cure += f", or say where that lies: `resume --set {'data.root' if key == DATA else key}=PATH`"
    return (
        f"{_WHAT.get(key, 'this file of yours')} changed since the sweep began, and trials of both would be mixed; {cure}; "
        "to use what is there now, `run` a new sweep under another name"
    )
