"""Two sweeps or more side by side: how their configs differ, what each found, and by how much their answers differ."""

import csv
import io
import json
import statistics
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tune_topkd.config import what
from tune_topkd.findings import Row
from tune_topkd.findings import text_of
from tune_topkd.ledger import SweepState
from tune_topkd.sweep import identity
from tune_topkd.sweep.campaign import cells_of
from tune_topkd.sweep.campaign import flat_lines
from tune_topkd.sweep.campaign import latex_line
from tune_topkd.sweep.campaign import markdown_line
from tune_topkd.sweep.campaign import notes
from tune_topkd.sweep.campaign import row_of
from tune_topkd.sweep.recommending import Searched
from tune_topkd.sweep.size import with_sizes
from tune_topkd.verdict import LEVEL
from tune_topkd.verdict import Interval
from tune_topkd.verdict import verdict_of_answer
from tune_topkd.verdict import welch_interval

_OF_THE_TEST_SET = ("name", "kwargs", "val_fraction", "test_fraction", "split_seed", "image_size")
"""Keys of `data` that say which images the test set has."""


@dataclass(frozen=True)
class Difference:
    """By how much a sweep's answer is above that of the first one, on the same test set."""

    sweep: str
    first: str
    points: float | None = None
    """Of the mean over seeds; None where the two cannot be compared."""
    interval: Interval | None = None
    """Welch's, in points; all of a comparison hold together in 95 of 100. None where one of the two has a single seed."""
    why_not: str = ""
    """Why they cannot be compared."""

    @property
    def sentence(self) -> str:
        """In words."""
        if self.points is None:
            return f"{self.sweep} and {self.first} cannot be compared: {self.why_not}."
        above = f"{self.sweep} has {self.points:+.2f} points against {self.first} on the same test set"
        if self.interval is None:
            return f"{above}; of one seed, so nothing is sure."
        low, high = self.interval
        which = self.sweep if low > 0 else self.first
        told = f"{which} is better" if self.interval.excludes_zero else "which is better these seeds do not tell"
        return f"{above} ({low:+.2f} to {high:+.2f}): {told}."

    def data(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {
            "sweep": self.sweep,
            "first": self.first,
            "points": self.points,
            "interval": None if self.interval is None else list(self.interval),
            "sentence": self.sentence,
        }


@dataclass(frozen=True)
class Comparison:
    """Sweeps side by side."""

    rows: Sequence[Row]
    """What each found."""
    keys: Mapping[str, Sequence[Any]]
    """The config keys that differ, with the value of each sweep; None where a sweep has none."""
    differences: Sequence[Difference]
    """Of each sweep after the first, to the first."""


def compare(found: Sequence[Searched]) -> Comparison:
    """Compare sweeps.

    Args:
        found: two or more.
    """
    rows = [row_of(each.config, each.state, each.complete) for each in found]
    rows = with_sizes(rows, [each.config for each in found])
    together = len(found) - 1
    differences = [_difference(found[0], other, together) for other in found[1:]]
    return Comparison(rows, _differing([dict(_flat(what(each.config))) for each in found]), differences)


def _flat(content: Mapping[str, Any], parent: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested mappings by dotted key."""
    for name, value in content.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{parent}{name}.")
        else:
            yield f"{parent}{name}", value


def _differing(contents: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    keys = dict.fromkeys(key for content in contents for key in content if key != "description")
    found = {key: [content.get(key) for content in contents] for key in keys}
    return {key: values for key, values in found.items() if any(value != values[0] for value in values)}


def _difference(first: Searched, other: Searched, together: int) -> Difference:
    names = (other.state.header.sweep, first.state.header.sweep)
    verdicts = [verdict_of_answer(each.state) for each in (other, first)]
    unmeasured = [n for n, v in zip(names, verdicts, strict=True) if v is None or not v.answer.values]
    if unmeasured:
        answers = "the answer of {} is" if len(unmeasured) == 1 else "the answers of {} and {} are"
        commands = " and ".join(f"`confirm {name}`" for name in unmeasured)
        do = "does" if len(unmeasured) == 1 else "do"
        told = f"{answers.format(*unmeasured)} not measured on the test set; {commands} {do} it"
        return Difference(*names, why_not=told)
    if why_not := _other_test_set(first, other):
        return Difference(*names, why_not=why_not)
    one, base = (verdict.answer.values for verdict in verdicts if verdict is not None)
    points = statistics.fmean(one) - statistics.fmean(base)
    return Difference(*names, points, welch_interval(one, base, 1 - (1 - LEVEL) / together))


def _other_test_set(first: Searched, other: Searched) -> str:
    """Why two sweeps' test sets may not have the same images; empty if they have."""
    for key in _OF_THE_TEST_SET:
        if getattr(first.config.data, key) != getattr(other.config.data, key):
            return f"data.{key} differs, so they may have other test images"
    known = [_content(each.state) for each in (first, other)]
    return "" if known[0] and known[0] == known[1] else "their datasets have other content, or it is not known"


def _content(state: SweepState) -> str | None:
    return state.identities.get(identity.DATA)


# --- as a table -------------------------------------------------------------------------------------------------------


def _lines(found: Comparison) -> tuple[list[str], list[list[str]]]:
    """Headings, and a row of texts for each thing that is compared."""
    headings, cells = cells_of(found.rows)
    body = [[name, *(row[place] for row in cells)] for place, name in enumerate(headings) if name != "sweep"]
    keys = [[key, *(_text(value) for value in values)] for key, values in found.keys.items()]
    return ["", *(row.sweep for row in found.rows)], [*keys, *body]


def _text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, list | dict) else text_of(value)


def _sentences(found: Comparison) -> list[str]:
    """What must be known to read it, the differences first."""
    told = [difference.sentence for difference in found.differences]
    keys = "the config keys are those that differ" if found.keys else "their configs are the same"
    return [*told, keys, *notes(found.rows)]


def as_markdown(found: Comparison) -> str:
    """A column for each sweep: first the config keys that differ, then what it found; the differences below."""
    headings, body = _lines(found)
    rule = "|" + "|".join("---" for _ in headings) + "|"
    told = [f"- {sentence}" for sentence in _sentences(found)]
    return "\n".join([markdown_line(headings), rule, *map(markdown_line, body), "", *told]) + "\n"


def as_csv(found: Comparison) -> str:
    """A column for each sweep; numbers are whole, intervals and differences in lines of their own."""
    flat = flat_lines(found.rows)
    lines = [[f"config: {key}", *map(_plain, values)] for key, values in found.keys.items()]
    lines += [[name, *(row[name] for row in flat)] for name in flat[0] if name != "sweep"]
    first = found.rows[0].sweep
    parts: dict[str, list[Any]] = {f"over {first}": [], f"over {first}, low": [], f"over {first}, high": []}
    for difference in found.differences:
        low, high = difference.interval or ("", "")
        for column, value in zip(parts.values(), (_plain(difference.points), low, high), strict=True):
            column.append(value)
    lines += [[name, "", *values] for name, values in parts.items()]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([["", *(row.sweep for row in found.rows)], *lines])
    return text.getvalue()


def _plain(value: Any) -> Any:
    return "" if value is None else json.dumps(value) if isinstance(value, list | dict) else value


def as_json(found: Comparison) -> str:
    """One object: `sweeps`, as `report` has them; `config`, the keys that differ, by sweep; `differences`."""
    names = [row.sweep for row in found.rows]
    content = {
        "sweeps": [row.data() for row in found.rows],
        "config": {key: dict(zip(names, values, strict=True)) for key, values in found.keys.items()},
        "differences": [difference.data() for difference in found.differences],
    }
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def as_latex(found: Comparison) -> str:
    """A `tabular` for booktabs; the differences and notes as comments."""
    headings, body = _lines(found)
    lines = [f"% {sentence}" for sentence in _sentences(found)]
    lines += [rf"\begin{{tabular}}{{l{'r' * len(found.rows)}}}", r"\toprule", latex_line(headings), r"\midrule"]
    return "\n".join([*lines, *map(latex_line, body), r"\bottomrule", r"\end{tabular}"]) + "\n"


FORMATS: Mapping[str, Callable[[Comparison], str]] = {
    "markdown": as_markdown,
    "csv": as_csv,
    "json": as_json,
    "latex": as_latex,
}
"""What a comparison can be written as, by name."""
