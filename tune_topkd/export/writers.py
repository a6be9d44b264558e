"""The tuned config as a file of another project: the formats of `export`, by name."""

import json
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence

from tune_topkd.config import dump_config
from tune_topkd.export.standalone import literal
from tune_topkd.export.standalone import sorted_imports
from tune_topkd.export.standalone import standalone
from tune_topkd.export.tuned import TUNED_FILE
from tune_topkd.export.tuned import Evidence
from tune_topkd.export.tuned import TunedConfig
from tune_topkd.verdict import Interval


def as_yaml(tuned: TunedConfig) -> str:
    """The tuned config as the YAML that `load_tuned_config` reads."""
    evidence = tuned.evidence
    opening = (
        f"# {tuned.method} for {pair(tuned)} on {tuned.data.name}: "
        f"validation top-1 {figures(evidence)} (trial {evidence.trial} of sweep {evidence.sweep}).\n"
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
    """The tuned config as one Python file that other projects may copy: the loss, its values, and torch alone to run it.

    It has `METHOD`, `LOSS`, `RECIPE`, `EVIDENCE`, and `criterion()`, which constructs what
    `tune_topkd.loss.build_loss(METHOD, LOSS)` does, equal to the last bit. A loss of the user's is imported, not copied.
    """
    return loss_module(tuned, [])


def loss_module(tuned: TunedConfig, also: Sequence[str]) -> str:
    """The file of `as_python`.

    Args:
        tuned: what it is of.
        also: more lines for its opening.
    """
    evidence = tuned.evidence
    content = tuned.model_dump(mode="json")
    constants = [("METHOD", "method"), ("LOSS", "loss"), ("RECIPE", "recipe"), ("EVIDENCE", "evidence")]
    source = standalone(tuned.method, tuned.loss)
    users = _users_module(tuned)
    copied = [
        f"The loss is your own and is imported from {users}, which has to be importable wherever this file is used.",
        "What surrounds it, below the values, is the source of tune_topkd.loss, as far as this method needs it.",
    ]
    whole = ["Below the values is the source of tune_topkd.loss, as far as this method needs it."]
    lines = [
        f'"""{tuned.method} tuned for {pair(tuned)} on {tuned.data.name}: the loss and its values, in one file.',
        "",
        f"Validation top-1 {figures(evidence)}, trial {evidence.trial} of sweep {evidence.sweep}.",
        "",
        "    import tuned",
        f"    criterion = tuned.criterion()  # {_CALLED}: a scalar",
        "",
        f"Needs Python 3.10 or newer and torch{f', and {users}' if users else ''}.",
        *(copied if users else whole),
        "`build_loss`, which its texts mention, is tune_topkd's. Apache-2.0.",
        *also,
        '"""',
        "",
        sorted_imports([*source.imports, "from torch import Tensor"]),
        "",
        *(f"{name} = {literal(content[key], len(name) + 3)}" for name, key in constants),
        f"DISTILL_WARMUP = {distill_warmup(tuned)}",
        '"""Epochs in which the weight of all terms but the cross-entropy rises linearly, as it did in the sweep."""',
        "",
        "",
        source.definitions,
        "",
        "",
        f"def criterion(**changes: object) -> {source.kind}:",
        '    """Construct the loss with the tuned values, or with some of them changed."""',
        "    if unknown := changes.keys() - LOSS.keys():",
        "        raise ValueError(f\"unknown parameters: {', '.join(unknown)}; known: {', '.join(LOSS)}\")",
        *(["    values = {**LOSS, **changes}"] if tuned.loss else []),
        f"    return {source.construction}",
        _WARMING.format(kind=source.kind),
    ]
    return "\n".join(lines)


_WARMING = '''

def distill_share(epoch: int) -> float:
    """Return what all terms but ``ce`` are multiplied by in an epoch, from 1."""
    return min(epoch / DISTILL_WARMUP, 1.0) if DISTILL_WARMUP else 1.0


def weighted_terms(
    loss: {kind}, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, epoch: int
) -> dict[str, Tensor]:
    """Return the terms of a loss by name, weighted as in an epoch of the sweep's trainings; their sum is minimised."""
    terms, share = loss.terms(student_logits, teacher_logits, labels), distill_share(epoch)
    return {{
        name: getattr(loss, weight) * (terms[name] if name == "ce" else share * terms[name])
        for name, weight in loss._weight_of.items()
    }}
'''


def distill_warmup(tuned: TunedConfig) -> int:
    """Epochs in which the distillation terms rise; 0 if they do not."""
    first = tuned.recipe.distill_share(1, tuned.method)
    return 0 if first == 1.0 else round(1 / first)


def figures(evidence: Evidence) -> str:
    """Its value in words; that of fresh seeds first, where there are any."""
    own, fresh, test = f"{evidence.val_top1:.2f} %", evidence.fresh, evidence.test
    if test is not None:
        within = "" if test.interval is None else " ({:.2f} to {:.2f})".format(*Interval(*test.interval).of_top1)
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
    """What the loss needs besides this project, if it or its scaling rule is the user's."""
    rule, is_users, _ = str(tuned.loss.get("scaling_rule", "")).partition(":")
    modules = dict.fromkeys(filter(None, (_users_module(tuned), rule if is_users else "")))
    return f"; imports {' and '.join(modules)}" if modules else ""


def _users_module(tuned: TunedConfig) -> str:
    """Where the loss is, if it is the user's."""
    module, is_users, _ = tuned.method.partition(":")
    return module if is_users else ""


def pair(tuned: TunedConfig) -> str:
    """The two networks in words."""
    return f"{tuned.teacher.name} -> {tuned.student.name}" if tuned.teacher else tuned.student.name


WRITERS: Mapping[str, Callable[[TunedConfig], str]] = {"yaml": as_yaml, "json": as_json, "python": as_python}
"""The formats of `export`, by name."""
