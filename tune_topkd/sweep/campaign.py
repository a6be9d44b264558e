"""A campaign: many sweeps side by side, a row for each dataset, teacher and student."""

import csv
import io
import json
import math
import statistics
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

from tune_topkd.config import Scalar
from tune_topkd.config import SweepConfig
from tune_topkd.findings import INTERVALS
from tune_topkd.findings import EqualK
from tune_topkd.findings import Figure
from tune_topkd.findings import Row
from tune_topkd.ledger import SweepState
from tune_topkd.ledger import apart_by_seed
from tune_topkd.ledger import baseline_trials
from tune_topkd.ledger import finalists
from tune_topkd.ledger import standings
from tune_topkd.ledger import winner_of
from tune_topkd.sweep.recommending import Recommendation
from tune_topkd.sweep.size import on_front
from tune_topkd.sweep.spend import Spend
from tune_topkd.sweep.spend import spend
from tune_topkd.sweep.wording import short
from tune_topkd.verdict import Apart
from tune_topkd.verdict import baseline_name
from tune_topkd.verdict import fresh_gains
from tune_topkd.verdict import mean_interval
from tune_topkd.verdict import verdict_of_answer

SHOWN = ("scale_top", "scale_last", "scale_gt", "ce_weight", "tdl_weight", "contrastive_weight", "temperature", "lr")
"""Parameters that have a column, after K, in campaigns that have them."""


def row_of(config: SweepConfig, state: SweepState, complete: Mapping[str, Scalar]) -> Row:
    """What a sweep found.

    Args:
        config: the sweep's frozen config.
        state: its trials.
        complete: its parameters as the config has them, those that it searches at their defaults.
    """
    cpu_hours, gpu_hours = hours_of(state, spend(state))
    about: dict[str, Any] = {
        "sweep": state.header.sweep,
        "dataset": config.data.name,
        "teacher": config.teacher.name if config.teacher else "–",
        "student": config.student.name,
        "method": config.method,
        "state": state.stop_reason or "under way",
        "trials": state.size(),
        "trainings": len(state.trials),
        "cpu_hours": cpu_hours,
        "gpu_hours": gpu_hours,
    }
    winner = winner_of(state)
    if winner is None:
        return Row(**about)
    return Row(**about, params={**complete, **winner.record.params}, equal_k=equal_k(state), **figures_of(state))


def hours_of(state: SweepState, spent: Spend) -> tuple[float, float]:
    """What a sweep's trainings have cost, in hours of CPUs and of GPUs, with what a trial of it has of a node."""
    hours = spent.total / 3600
    share = state.prepared.share if state.prepared else None
    return hours * (share.cpus if share else 1.0), hours * (share.gpus if share else 0.0)


def figures_of(state: SweepState) -> dict[str, Any]:
    """An answer's `top1`, what that was `measured_on` and its `gains`, as a `Row` has them, from the best evidence there is.

    Empty without an answer.
    """
    verdict, winner = verdict_of_answer(state), winner_of(state)
    if winner is None:
        return {}
    if verdict is not None and verdict.answer.values:
        gains = {gain.base.name: Figure(gain.mean, gain.interval) for gain in verdict.gains}
        top1 = Figure(statistics.fmean(verdict.answer.values), verdict.answer.interval)
        return {"top1": top1, "measured_on": "test set", "gains": gains}
    bases = baseline_trials(state)
    if winner.finalist is not None:
        told = fresh_gains(state)
        known = [(baseline_name(base), told[base.key.arm]) for base in bases if base.key.arm in told]
        gains = {name: Figure(apart.mean, apart.interval) for name, apart in known}
        top1 = Figure(winner.value, mean_interval(list(winner.finalist.values.values())))
        return {"top1": top1, "measured_on": "fresh seeds", "gains": gains}
    gains = {baseline_name(base): Figure(winner.value - (base.value or 0.0)) for base in bases}
    return {"top1": Figure(winner.value), "measured_on": "one seed", "gains": gains}


def equal_k(state: SweepState) -> EqualK | None:
    """The K that a sweep cannot tell from that of its answer; None where K is not searched, or there is no answer.

    Where finalists have several K it is those whose mean is not told apart from the answer's, seed by seed. Else it is the K
    of all full trials within two standard errors of a difference of the best value, by the spread over seeds of what was
    repeated.
    """
    winner = winner_of(state)
    if winner is None or "k" not in winner.record.params:
        return None
    own = int(winner.record.params["k"])
    best, others = next(iter(standings(state)), None), standings(state)[1:]
    if best is not None and any(other.record.params["k"] != own for other in others):
        told = Apart.together([apart_by_seed(best, other) for other in others])
        by_k = {int(o.record.params["k"]): apart for o, apart in reversed(list(zip(others, told, strict=True)))}
        equal = {k for k, apart in by_k.items() if not apart.is_told_apart}
        return EqualK(sorted({own, *equal}), "finalists on fresh seeds")
    noise = _noise(state)
    if noise is None:
        return EqualK([own], "the best trial alone: nothing was repeated")
    top = state.best()
    assert top is not None, "there is an answer"
    near = (r for r in state.ranked() if (top.value or 0.0) - (r.value or 0.0) <= 2 * math.sqrt(2) * noise)
    return EqualK(sorted({own, *(int(r.params["k"]) for r in near)}), "full trials within what another seed may change")


def _noise(state: SweepState) -> float | None:
    """The standard deviation over seeds, pooled over what was repeated; none where nothing was."""
    groups = [list(finalist.values.values()) for finalist in finalists(state)]
    squares = sum(statistics.variance(values) * (len(values) - 1) for values in groups if len(values) > 1)
    degrees = sum(len(values) - 1 for values in groups if len(values) > 1)
    return math.sqrt(squares / degrees) if degrees else None


# --- the table --------------------------------------------------------------------------------------------------------


def cells_of(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Headings, and a row of texts for each sweep."""
    shown = [name for name in SHOWN if any(name in row.params for row in rows)]
    bases = list(dict.fromkeys(name for row in rows for name in row.gains))
    front = on_front(rows)
    sizes = ["weights", "multiply-adds", "front"] if any(row.size for row in rows) else []
    headings = ["sweep", "dataset", "teacher", "student", *sizes, "K", "equal K", *shown, "top-1 %", "on"]
    headings += [f"over {name}" for name in bases] + ["trials", "CPU h", "GPU h"]
    return headings, [
        [
            row.sweep,
            row.dataset,
            row.teacher,
            row.student,
            *(_size_cells(row, row.sweep in front) if sizes else ()),
            _value(row.params, "k"),
            "–" if row.equal_k is None else ranges(row.equal_k.values),
            *(_value(row.params, name) for name in shown),
            "–" if row.top1 is None else row.top1.of_top1(),
            row.measured_on or row.state,
            *(row.gains[name].of_gain() if name in row.gains else "–" for name in bases),
            str(row.trials),
            f"{row.cpu_hours:.2f}",
            f"{row.gpu_hours:.2f}",
        ]
        for row in rows
    ]


def _size_cells(row: Row, is_on_front: bool) -> list[str]:
    size = row.size
    counts = ["–", "–"] if size is None else [_in_millions(size.parameters), _in_millions(size.multiply_adds)]
    return [*counts, "yes" if is_on_front else ""]


def _in_millions(count: int) -> str:
    return f"{count / 1e6:.3g} M"


def _value(params: Mapping[str, Scalar], name: str) -> str:
    return short(params[name]) if name in params else "–"


def ranges(values: Sequence[int]) -> str:
    """Whole numbers, those that follow one another as a range: `1, 3–5`."""
    groups: list[list[int]] = []
    for value in values:
        if groups and value == groups[-1][-1] + 1:
            groups[-1].append(value)
        else:
            groups.append([value])
    return ", ".join(str(g[0]) if len(g) == 1 else f"{g[0]}–{g[-1]}" for g in groups)


def notes(rows: Sequence[Row]) -> list[str]:
    """What must be known to read the table."""
    how: dict[str, list[str]] = {}
    for row in rows:
        if row.equal_k is not None:
            how.setdefault(row.equal_k.how, []).append(row.sweep)
    told = [f"equal K of {', '.join(names)}: {what}" for what, names in how.items()]
    if any(row.measured_on == "one seed" for row in rows):
        told.append(
            "a figure of one seed was chosen by the images that it is measured on, and is too high: `confirm` it"
        )
    if any(row.size for row in rows):
        told.append(
            "front: no other of these sweeps on the same images has a student as small with a top-1 as high, by the means; "
            "multiply-adds, of one image, stand for latency and energy, which depend on the device"
        )
    return [INTERVALS, *told]


def as_markdown(rows: Sequence[Row], for_all: Recommendation | None = None) -> str:
    """A table and its notes; below, the config that is recommended for all."""
    headings, cells = cells_of(rows)
    lines = [
        markdown_line(headings),
        "|" + "|".join("---" for _ in headings) + "|",
        *(markdown_line(row) for row in cells),
    ]
    lines += ["", *(f"- {note}" for note in notes(rows))]
    return "\n".join([*lines, *(["", *for_all.lines()] if for_all else [])]) + "\n"


def markdown_line(cells: Iterable[str]) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def as_csv(rows: Sequence[Row], for_all: Recommendation | None = None) -> str:
    """A line for each sweep, intervals in columns of their own; numbers are whole. What is recommended has no line."""
    lines = flat_lines(rows)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]) if lines else ["sweep"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def flat_lines(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """All of each row by name, the same names for all; what a row lacks is an empty text."""
    bases = list(dict.fromkeys(name for row in rows for name in row.gains))
    params = list(dict.fromkeys(name for row in rows for name in row.params))
    front, has_sizes = on_front(rows), any(row.size for row in rows)
    lines: list[dict[str, Any]] = []
    for row in rows:
        content = row.data()
        flat = {name: content[name] for name in ("sweep", "dataset", "teacher", "student", "method", "state")}
        flat |= {name: row.params.get(name, "") for name in params}
        flat["equal_k"] = "" if row.equal_k is None else " ".join(map(str, row.equal_k.values))
        flat |= _flat("top1", row.top1) | {"measured_on": row.measured_on}
        for name in bases:
            flat |= _flat(f"gain over {name}", row.gains.get(name))
        flat |= {name: content[name] for name in ("trials", "trainings", "cpu_hours", "gpu_hours")}
        if has_sizes:
            sizes = content.get("size", {})
            flat |= {name: sizes.get(name, "") for name in ("parameters", "multiply_adds")}
            flat["on_front"] = row.sweep in front
        lines.append(flat)
    return lines


def _flat(name: str, figure: Figure | None) -> dict[str, float | str]:
    low, high = figure.interval if figure and figure.interval else ("", "")
    return {name: figure.mean if figure else "", f"{name}, low": low, f"{name}, high": high}


def as_json(rows: Sequence[Row], for_all: Recommendation | None = None) -> str:
    """One object: `sweeps`, a list of objects, and `recommended`, null for fewer than two."""
    front, has_sizes = on_front(rows), any(row.size for row in rows)
    told = [row.data() | ({"on_front": row.sweep in front} if has_sizes else {}) for row in rows]
    content = {"sweeps": told, "recommended": None if for_all is None else for_all.data()}
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        **{sign: f"\\{sign}" for sign in "&%$#_{}"},
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "±": r"$\pm$",
        "–": "--",
        "−": "$-$",
    }
)


def as_latex(rows: Sequence[Row], for_all: Recommendation | None = None) -> str:
    """A `tabular` for booktabs; its notes, and what is recommended for all, as comments."""
    headings, cells = cells_of(rows)
    lines = [f"% {note}" for note in [*notes(rows), *(for_all.lines() if for_all else [])]]
    lines += [rf"\begin{{tabular}}{{{'l' * 4}{'r' * (len(headings) - 4)}}}", r"\toprule"]
    lines += [latex_line(headings), r"\midrule", *map(latex_line, cells), r"\bottomrule", r"\end{tabular}"]
    return "\n".join(lines) + "\n"


def latex_line(cells: Iterable[str]) -> str:
    """A row of a LaTeX table, its signs escaped."""
    return " & ".join(cell.translate(_LATEX) for cell in cells) + r" \\"


FORMATS: Mapping[str, Callable[[Sequence[Row], Recommendation | None], str]] = {
    "markdown": as_markdown,
    "csv": as_csv,
    "json": as_json,
    "latex": as_latex,
}
"""What a campaign's table can be written as, by name."""
