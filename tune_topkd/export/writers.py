"""The tuned config as a file of another project: the formats of `export`, by name."""

import json
from collections.abc import Callable
from collections.abc import Mapping
from pprint import pformat

from tune_topkd.config import dump_config
from tune_topkd.export.tuned import TUNED_FILE
from tune_topkd.export.tuned import Evidence
from tune_topkd.export.tuned import TunedConfig


def as_yaml(tuned: TunedConfig) -> str:
    """The tuned config as the YAML that `load_tuned_config` reads."""
    evidence = tuned.evidence
    opening = (
        f"# {tuned.method} for {_pair(tuned)} on {tuned.data.name}: "
        f"validation top-1 {_figures(evidence)} (trial {evidence.trial} of sweep {evidence.sweep}).\n"
        "# from tune_topkd.export import load_tuned_config\n"
        "# from tune_topkd.loss import build_loss\n"
        f'# tuned = load_tuned_config("{TUNED_FILE}")\n'
        f"# criterion = build_loss(tuned.method, tuned.loss)  # {_CALLED}{_its_module(tuned)}\n"
    )
    return opening + dump_config(tuned)


def as_json(tuned: TunedConfig) -> str:
    """The tuned config as JSON, which has no comments; `load_tuned_config` reads it too."""
    return json.dumps(tuned.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"


def as_python(tuned: TunedConfig) -> str:
    """The tuned config as a Python module of constants that imports nothing."""
    evidence = tuned.evidence
    content = tuned.model_dump(mode="json")
    constants = [("METHOD", "method"), ("LOSS", "loss"), ("RECIPE", "recipe"), ("EVIDENCE", "evidence")]
    lines = [
        f'"""{tuned.method} tuned for {_pair(tuned)} on {tuned.data.name}.',
        "",
        f"Validation top-1 {_figures(evidence)}, trial {evidence.trial} of sweep {evidence.sweep}.",
        "",
        "    from tune_topkd.loss import build_loss",
        f"    criterion = build_loss(METHOD, LOSS)  # {_CALLED}{_its_module(tuned)}",
        '"""',
        "",
        *(f"{name} = {pformat(content[key], sort_dicts=False, width=100)}" for name, key in constants),
    ]
    return "\n".join(lines) + "\n"


def _figures(evidence: Evidence) -> str:
    """Its value in words; that of fresh seeds first, where there are any."""
    own, fresh, test = f"{evidence.val_top1:.2f} %", evidence.fresh, evidence.test
    if test is not None:
        within = "" if test.interval is None else f" ({test.interval[0]:.2f} to {test.interval[1]:.2f})"
        look = "" if test.look == 1 else f", look {test.look} at it"
        seeds = sum(value is not None for value in test.values)
        return f"{own} in the search; on the test set {test.test_top1:.2f} %{within} over {seeds} fresh seeds{look}"
    if fresh is None:
        return own
    error = "" if fresh.error is None else f" ± {fresh.error:.2f}"
    count = sum(value is not None for value in fresh.values)
    return f"{fresh.val_top1:.2f}{error} % over {count} fresh seeds, {own} in the search"


_CALLED = "criterion(student_logits, teacher_logits, labels)"


def _its_module(tuned: TunedConfig) -> str:
    """What the loss needs besides this project, if it is the user's."""
    module, is_users, _ = tuned.method.partition(":")
    return f"; imports {module}" if is_users else ""


def _pair(tuned: TunedConfig) -> str:
    return f"{tuned.teacher.name} -> {tuned.student.name}" if tuned.teacher else tuned.student.name


WRITERS: Mapping[str, Callable[[TunedConfig], str]] = {"yaml": as_yaml, "json": as_json, "python": as_python}
"""The formats of `export`, by name."""
