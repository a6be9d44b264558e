"""How a page is put together: its parts in their order, what is missing said in its place."""

import datetime
import functools
import json
import re
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from importlib import resources
from typing import Any

import altair as alt
import jinja2
import markupsafe
import vl_convert

from tune_topkd import __version__
from tune_topkd.findings import CONFIRMING
from tune_topkd.findings import INTERVALS
from tune_topkd.findings import NONE
from tune_topkd.findings import Findings
from tune_topkd.findings import ForAll
from tune_topkd.findings import Row
from tune_topkd.ledger import TrialStatus
from tune_topkd.report.page import course_figures
from tune_topkd.report.page import evidence_figures
from tune_topkd.report.page import search_figures
from tune_topkd.report.page import tables
from tune_topkd.report.page.data import Rows
from tune_topkd.report.page.data import Top1Axis
from tune_topkd.report.page.data import axis_of_trials
from tune_topkd.report.page.data import other_rows
from tune_topkd.report.page.data import parameters_of
from tune_topkd.report.page.data import trial_rows
from tune_topkd.report.page.figure import Figure
from tune_topkd.report.page.figure import columns
from tune_topkd.report.page.look import PALETTES
from tune_topkd.report.page.look import settings
from tune_topkd.verdict import capital

MOST_POINTS_OF_A_SWEEP, MOST_POINTS = 400, 6000
"""Trials that a campaign's page draws of a sweep, and of all."""
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffe\uffff\ud800-\udfff]")
_VEGA_LITE = ".".join(alt.VEGALITE_VERSION.split(".")[:2])
_STATE_CLASSES = {"finished": "good", "running": "busy", CONFIRMING: "busy", "failed": "bad"}


class _Drawn:
    """The figures of a page as they are put in: each chart and each set of rows once."""

    def __init__(self) -> None:
        self.charts: dict[str, dict[str, Any]] = {}
        self.data: dict[str, Rows] = {}
        self._keys: dict[int, str] = {}

    def rows(self, rows: Rows) -> str:
        """The name under which these rows are in the page."""
        if id(rows) not in self._keys:
            key = f"d{len(self.data)}"
            self._keys[id(rows)], self.data[key] = key, rows
        return self._keys[id(rows)]

    def figure(
        self, figure: Figure | None, missing: tuple[str, str, str] = ("", "", ""), prefix: str = ""
    ) -> dict[str, Any]:
        """A figure for the template; without one its id, its title, and why it is missing."""
        if figure is None:
            id_, title, why = missing
            return {"id": f"{prefix}{id_}", "title": title, "missing": why}
        names = {name: self.rows(rows) for name, rows in figure.rows.items()}
        drawn = []
        for place, spec in enumerate(figure.specs()):
            key = f"{prefix}{figure.id}-{place}"
            self.charts[key] = {"spec": spec, "data": {n: names[n] for n in sorted(_data_of(spec)) if n in names}}
            label = f"{figure.labels[place]}. " if figure.labels else ""
            drawn.append({"key": key, "alt": f"{label}{figure.alt}"})
        return {
            "id": f"{prefix}{figure.id}",
            "title": figure.title,
            "caption": figure.caption.strip(),
            "charts": drawn,
            "least_width": figure.least_width,
            "missing": "",
        }


def _data_of(spec: Any) -> Iterable[str]:
    """The names of the rows that a chart draws."""
    if isinstance(spec, Mapping):
        if isinstance(data := spec.get("data"), Mapping) and "name" in data:
            yield data["name"]
        for value in spec.values():
            yield from _data_of(value)
    elif isinstance(spec, list):
        for value in spec:
            yield from _data_of(value)


def sweep_page(found: Findings) -> str:
    """The page of one sweep."""
    drawn, row = _Drawn(), found.row
    axis = axis_of_trials(found)
    trials, others = trial_rows(found, axis), other_rows(found)
    sections = [_k_section(found, trials, axis, drawn), *_search_sections(found, trials, axis, drawn)]
    contents = [("answer", "The answer"), ("commands", "Reproduce it")]
    contents += [(section["id"], section["title"]) for section in sections]
    contents += [("trainings", "All trainings"), ("about", "Where it comes from")]
    gains = evidence_figures.gains_figure(row)
    return _rendered(
        "sweep.html",
        drawn,
        page_title=f"{row.sweep} – tune_topkd",
        contents=contents,
        name=row.sweep,
        description=found.config.description or "",
        state=found.condition,
        state_class=_STATE_CLASSES.get(found.condition, ""),
        facts=_facts(found),
        told=_told(found),
        gains=None if gains is None else drawn.figure(gains),
        notes=found.notes,
        params=tables.parameter_table(found),
        commands=found.commands,
        sections=sections,
        all_columns=json.dumps(_columns_of_all(found)),
        all_rows=json.dumps([drawn.rows(trials), drawn.rows(others)]),
        about=_about(found),
    )


def _k_section(found: Findings, trials: Rows, axis: Top1Axis, drawn: _Drawn) -> dict[str, Any]:
    is_searched = "k" in found.config.space
    value = found.config.loss.get("k", found.defaults.get("k"))
    if is_searched:
        has_values = search_figures.has_values(trials)
        why = "Its values are not numbers." if has_values else "No trial has a value."
    elif value is None:
        why = f"The method {found.config.method} has no parameter of this name."
    else:
        why = f"K was not searched: it is {value} in every trial."
    missing = ("k", "Top-1 against K", why)
    figures = [drawn.figure(search_figures.k_figure(found, trials, axis), missing)]
    weights = search_figures.weights_figure(found, trials)
    if weights is not None:
        figures.append(drawn.figure(weights))
    elif is_searched:
        why = "It takes three completed trials where K and weights of the loss are searched."
        figures.append(drawn.figure(None, ("weights", "K and the weights of the loss", why)))
    return {"id": "about-k", "title": "K", "parts": figures}


def _search_sections(found: Findings, trials: Rows, axis: Top1Axis, drawn: _Drawn) -> list[dict[str, Any]]:
    none = "No trial has a value."
    has_values = search_figures.has_values(trials)
    few = "It takes three trials for every two parameters that have reached a rung, or the end, with different values."
    search = [
        drawn.figure(
            search_figures.history_figure(found, trials, axis) if has_values else None,
            ("history", "How the search went", none),
        ),
        drawn.figure(search_figures.importance_figure(found), ("importance", "What mattered", few)),
        drawn.figure(
            search_figures.slice_figure(found, trials, axis) if has_values else None,
            ("slices", "Each parameter by itself", none),
        ),
        drawn.figure(
            search_figures.parallel_figure(found),
            ("parallel", "All parameters at once", "It takes two parameters, and a trial that has ended."),
        ),
    ]
    no_rungs = "No trial has arrived at a rung." if found.rungs else "This sweep stops no trial by rungs of ASHA's."
    course = [
        drawn.figure(course_figures.curves_figure(found), ("curves", "Learning curves", "No epoch has been reported.")),
        drawn.figure(course_figures.rungs_figure(found), ("rungs", "What the rungs did", no_rungs)),
        *filter(None, [tables.rungs_table(found)]),
    ]
    no_finalists = "No trial was trained again on fresh seeds; `confirm` does it."
    no_test = "The test set has not been read; `confirm` reads it, once."
    evidence = [
        drawn.figure(evidence_figures.test_figure(found), ("test", "The test set", no_test)),
        *filter(None, [tables.test_table(found)]),
        drawn.figure(evidence_figures.finalists_figure(found), ("finalists", "Finalists on fresh seeds", no_finalists)),
        *filter(None, [tables.finalists_table(found)]),
    ]
    cost = [
        drawn.figure(
            course_figures.spend_figure(found), ("spend", "What it cost", "No epoch's time has been reported.")
        ),
        drawn.figure(
            course_figures.timeline_figure(found), ("timeline", "When each training ran", "No training has begun.")
        ),
    ]
    return [
        {"id": "evidence", "title": "Fresh seeds and the test set", "parts": evidence},
        {"id": "search", "title": "The search", "parts": search},
        {"id": "course", "title": "Trainings and rungs", "parts": course},
        {"id": "cost", "title": "Time and cost", "parts": cost},
    ]


def _facts(found: Findings) -> list[tuple[str, str]]:
    state, row = found.state, found.row
    counts = ", ".join(f"{n:,} {status}" for status, n in state.counts().items() if n)
    pair = row.student if row.teacher == NONE else f"{row.teacher} → {row.student}"
    facts = [("dataset", row.dataset), ("teacher → student", pair), ("method", row.method)]
    facts.append(("trials of the search", f"{state.size():,} of {state.target:,}" + (f": {counts}" if counts else "")))
    if state.teacher_file is not None:
        given = found.config.teacher is not None and found.config.teacher.checkpoint is not None
        learnt = ", of images that it may have been trained on" if given else ""
        facts.append(("teacher's validation top-1", f"{state.teacher_file.val_top1:.2f} %{learnt}"))
    facts.append(("epochs of a full trial", str(found.config.recipe.epochs)))
    return facts


def _told(found: Findings) -> dict[str, str]:
    """The answer, for the template."""
    row, told = found.row, {"lead": found.lead, "sentence": found.sentence, "value": "", "what": ""}
    if row.top1 is None:
        return told
    on = {
        "test set": "top-1 on the test set",
        "fresh seeds": "validation top-1 on fresh seeds",
        "one seed": "validation top-1 on one seed: chosen by it, so too high",
    }.get(row.measured_on, row.measured_on)
    interval = row.top1.interval
    within = "" if interval is None else "; 95 % interval {:.2f} to {:.2f}".format(*interval.of_top1)
    k = f" with K = {row.params['k']}" if "k" in found.config.space and "k" in row.params else ""
    return told | {"value": f"{row.top1.mean:.2f}", "what": f"tuned {row.method}{k}: {on}{within}"}


def _columns_of_all(found: Findings) -> list[dict[str, Any]]:
    def column(name: str, field: str, is_number: bool = False, digits: int | None = None) -> dict[str, Any]:
        return {"name": name, "field": field, "is_number": is_number, "digits": digits}

    return [
        column("trial", "trial"),
        column("status", "status"),
        column("top-1 %", "top1", True, 2),
        column("on", "on"),
        column("epochs", "epochs", True, 0),
        column("seconds", "seconds", True, 1),
        *(column(p.name, p.field, not p.is_choice) for p in parameters_of(found.config)),
        column("again", "of"),
        column("why it ended", "reason"),
    ]


def _about(found: Findings) -> list[tuple[str, str]]:
    header = found.state.header
    when = datetime.datetime.fromtimestamp(found.state.started_at, datetime.UTC)
    versions = ", ".join(f"{name} {version}" for name, version in header.versions.items())
    facts = [
        ("sweep id", header.id),
        ("begun", f"{when:%Y-%m-%d %H:%M} UTC"),
        ("seed", str(header.seed)),
        ("trainings in the ledger", f"{len(found.state.trials):,}"),
        ("ledger's lines", f"{found.state.last_seq + 1:,}"),
        ("digest of the config", header.digest[:12]),
        ("commit", header.git_commit or ""),
        ("versions", versions),
    ]
    return [(label, value) for label, value in facts if value]


# --- a campaign -------------------------------------------------------------------------------------------------------


def campaign_page(every: Sequence[Findings], for_all: ForAll | None = None) -> str:
    """The page of several sweeps, with the one config that is recommended for all of them."""
    drawn, rows = _Drawn(), [found.row for found in every]
    links = {found.row.sweep: f"sweep-{place}" for place, found in enumerate(every)}
    sweeps = []
    for found in every:
        axis, prefix = axis_of_trials(found), f"{links[found.row.sweep]}-"
        trials = [row for row in trial_rows(found, axis) if row["has_y"]]
        few = _thinned(trials, min(MOST_POINTS_OF_A_SWEEP, MOST_POINTS // len(every)))
        figure = search_figures.k_figure(found, few, axis)
        if figure is None and search_figures.has_values(few):
            figure = search_figures.history_figure(found, few, axis)
        missing = ("k", "Top-1 against K", "No trial has a value.")
        about = drawn.figure(figure, missing, prefix)
        if len(few) < len(trials):
            about["caption"] += (
                f" {len(few)} of {len(trials):,} trials are drawn, evenly by their values, the best among them."
            )
        sweeps.append(
            {
                "id": links[found.row.sweep],
                "name": found.row.sweep,
                "description": found.config.description or "",
                "state": found.condition,
                "state_class": _STATE_CLASSES.get(found.condition, ""),
                "told": _told(found),
                "notes": found.notes,
                "commands": found.commands,
                "figure": about,
            }
        )
    figures = [evidence_figures.campaign_gains_figure(rows), evidence_figures.campaign_k_figure(rows)]
    return _rendered(
        "campaign.html",
        drawn,
        page_title="Campaign – tune_topkd",
        title=f"{len(rows)} sweeps",
        contents=[("answer", "The answer"), *((links[row.sweep], row.sweep) for row in rows)],
        lead=campaign_lead(rows),
        table=tables.campaign_table(rows, links, _campaign_notes(rows)),
        for_all=None if for_all is None else for_all.sentence,
        for_all_table=tables.for_all_table(for_all) if for_all is not None and for_all.rows else None,
        figures=[drawn.figure(figure) for figure in figures if figure is not None],
        sweeps=sweeps,
    )


def _thinned(trials: Rows, most: int) -> Rows:
    """At most so many trials, evenly by their values, the best and the answer among them."""
    if len(trials) <= most:
        return trials
    ranked = sorted(trials, key=lambda row: (row["status"] != TrialStatus.COMPLETED, -(row["top1"] or 0.0)))
    taken = {ranked[place * len(ranked) // most]["n"] for place in range(most)}
    return [row for row in trials if row["n"] in taken or row["is_best"]]


def campaign_lead(rows: Sequence[Row]) -> str:
    """What the sweeps say together."""
    told: dict[str, list[str]] = {"ahead": [], "behind": [], "unclear": [], "one seed": [], "no answer": []}
    for row in rows:
        spans = [gain.interval for gain in row.gains.values() if gain.interval is not None]
        if row.top1 is None:
            told["no answer"].append(row.sweep)
        elif not spans:
            told["one seed"].append(row.sweep)
        elif any(span.high < 0 for span in spans):
            told["behind"].append(row.sweep)
        elif all(span.low > 0 for span in spans) and len(spans) == len(row.gains):
            told["ahead"].append(row.sweep)
        else:
            told["unclear"].append(row.sweep)
    words = {
        "ahead": "the tuned method is better than every baseline",
        "behind": "a baseline is the better choice",
        "unclear": "the seeds do not tell the tuned method from some baseline",
        "one seed": "there is one seed only, which tells nothing apart",
        "no answer": "there is no answer yet",
    }
    parts = [f"in {len(names)} {words[what]}{_few(names)}" for what, names in told.items() if names]
    if len(parts) == 1:
        return f"In all {len(rows)} sweeps {next(words[what] for what, names in told.items() if names)}."
    return f"Of {len(rows)} sweeps: {'; '.join(parts)}."


def _few(names: Sequence[str]) -> str:
    return f" ({', '.join(names)})" if len(names) <= 4 else ""


def _campaign_notes(rows: Sequence[Row]) -> list[str]:
    notes = [f"{capital(INTERVALS)}."]
    how: dict[str, list[str]] = {}
    for row in rows:
        if row.equal_k is not None:
            how.setdefault(row.equal_k.how, []).append(row.sweep)
    few = {what: ", ".join(names) if len(names) <= 6 else f"{len(names)} sweeps" for what, names in how.items()}
    notes += [f"Equal K of {names}: {what}." for what, names in few.items()]
    if any(row.measured_on == "one seed" for row in rows):
        notes.append("A figure of one seed was chosen by the images that it is measured on, and is too high.")
    return notes


# --- the file ---------------------------------------------------------------------------------------------------------


def _rendered(template: str, drawn: _Drawn, **content: Any) -> str:
    look = {"palettes": PALETTES, "settings": settings()}
    data = ",".join(f"{json.dumps(key)}:{columns(rows)}" for key, rows in drawn.data.items())
    text = (
        _templates()
        .get_template(template)
        .render(
            css=_asset("page.css"),
            js=_asset("page.js"),
            bundle=_bundle(),
            look=_script_safe(json.dumps(look)),
            data=_script_safe(f"{{{data}}}"),
            charts=_script_safe(json.dumps(drawn.charts, separators=(",", ":"), allow_nan=False)),
            written=f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC",
            version=__version__,
            **content,
        )
    )
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def _script_safe(text: str) -> str:
    """JSON that ends no script and begins no comment, whatever it holds."""
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _with_code(text: str) -> markupsafe.Markup:
    """A sentence whose words in backticks are code."""
    escaped = str(markupsafe.escape(text))
    return markupsafe.Markup(re.sub("`([^`]+)`", r"<code>\1</code>", escaped))  # noqa: S704 (escaped above)


@functools.cache
def _templates() -> jinja2.Environment:
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("tune_topkd.report.page"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["with_code"] = _with_code
    return templates


def _asset(name: str) -> str:
    return (resources.files("tune_topkd.report.page") / "templates" / name).read_text(encoding="utf-8")


@functools.cache
def _bundle() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script."""
    bundle = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=_VEGA_LITE)
    assert "</script" not in bundle.lower(), "it would end the script that it stands in"
    return bundle
