"""A figure of a page: what is drawn, by Vega-Lite, and what it says in words."""

import json
import math
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from typing import Any
from typing import TypeAlias

import altair as alt

from tune_topkd.report.page.data import Parameter
from tune_topkd.report.page.data import Rows
from tune_topkd.report.page.data import Top1Axis

Chart: TypeAlias = alt.Chart | alt.LayerChart | alt.FacetChart
MOST_SVG = 1500
"""Marks above which a figure is painted instead of drawn: each of an SVG's is an element."""


@dataclass(frozen=True)
class Figure:
    """A figure, or a row of small ones."""

    id: str
    title: str
    caption: str
    """What to see in it, and what is left out."""
    alt: str
    """The same for who cannot see it."""
    charts: Sequence[Chart]
    rows: Mapping[str, Rows] = field(default_factory=dict)
    """What is drawn, by the name that the charts call it by."""
    labels: Sequence[str] = ()
    """Of each chart, where there are several."""
    least_width: int = 0
    """Pixels below which it is scrolled sideways."""

    def specs(self) -> list[dict[str, Any]]:
        """The charts as Vega-Lite."""
        marks = sum(len(rows) for rows in self.rows.values())
        return [
            chart.to_dict() | {"usermeta": {"embedOptions": {"renderer": "canvas" if marks > MOST_SVG else "svg"}}}
            for chart in self.charts
        ]


def columns(rows: Rows) -> str:
    """Rows as JSON, a list for each field: the shortest form."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    return json.dumps({name: [row.get(name) for row in rows] for name in names}, separators=(",", ":"), allow_nan=False)


def named(data: str) -> alt.NamedData:
    """The rows of this name."""
    return alt.NamedData(name=data)


def top1(axis: Top1Axis, title: str = "validation top-1 (%)", field_name: str = "y") -> alt.Y:
    """The axis of top-1."""
    ticks = alt.Axis(title=title, tickCount=6, labelExpr="datum.value > 100 ? '' : datum.label")
    return alt.Y(f"{field_name}:Q", scale=alt.Scale(domain=axis.domain, nice=False, clamp=True), axis=ticks)


def along(parameter: Parameter, trials: Rows) -> alt.X:
    """The axis of a parameter."""
    if parameter.is_choice:
        return alt.X(f"{parameter.field}:N", axis=alt.Axis(title=parameter.name, labelAngle=0))
    values = values_of(parameter, trials)
    axis = alt.Axis(title=parameter.name, values=ticks(parameter, values), format="~g", labelOverlap="parity")
    return alt.X(f"{parameter.field}:Q", scale=scale_of(parameter, values), axis=axis)


def values_of(parameter: Parameter, trials: Rows) -> list[float]:
    """The values that a parameter has had."""
    return [float(row[parameter.field]) for row in trials if isinstance(row[parameter.field], int | float)]


def scale_of(parameter: Parameter, values: Sequence[float]) -> alt.Scale:
    """The scale of a parameter: the values that there are, and a little more."""
    low, high = (min(values), max(values)) if values else (1.0, 1.0)
    if parameter.is_log and low > 0:
        by = max((high / low) ** 0.04, 1.05)
        return alt.Scale(type="log", domain=[low / by, high * by], nice=False)
    pad = 0.04 * (high - low) or 0.5
    return alt.Scale(domain=[low - pad, high + pad], nice=False, zero=False)


def ticks(parameter: Parameter, values: Sequence[float], most: int = 7) -> list[float]:
    """Round values along an axis."""
    low, high = (min(values), max(values)) if values else (1.0, 1.0)
    if low == high:
        return [low]
    if not (parameter.is_log and low > 0):
        step = 10.0 ** math.floor(math.log10((high - low) / 2))
        step *= next(f for f in (1, 2, 5, 10) if (high - low) / (step * f) <= 5)
        step = max(step, 1.0) if parameter.name == "k" else step
        return [round(step * i, 10) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found: list[float] = []
    for factors in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
        inside = [v for d in decades for f in factors if low <= (v := round(f * 10.0**d, 12)) <= high]
        whole = [v for v in inside if parameter.name != "k" or v == round(v)]
        if len(whole) <= most:
            found = whole
    return found or [low, high]


def trial_tooltip(parameters: Sequence[Parameter]) -> list[alt.Tooltip]:
    """What is said of a trial under the pointer."""
    return [
        alt.Tooltip("trial:N", title="trial"),
        alt.Tooltip("status:N", title="status"),
        alt.Tooltip("top1:Q", title="top-1 %", format=".2f"),
        alt.Tooltip("epochs:Q", title="epochs"),
        *(
            alt.Tooltip(f"{p.field}:N", title=p.name)
            if p.is_choice
            else alt.Tooltip(f"{p.field}:Q", title=p.name, format="d" if p.name == "k" else ".3~g")
            for p in parameters
        ),
    ]


def base_rules(values: Mapping[str, float], axis: Top1Axis) -> list[alt.Chart]:
    """The baselines as rules across a figure; `base_labels` says which is which."""
    if not values:
        return []
    return [
        alt.Chart(named("bases"))
        .mark_rule(strokeDash=[5, 4], color="@ink", opacity=0.65)
        .encode(
            y=top1(axis, field_name="value"),
            tooltip=[alt.Tooltip("name:N", title="baseline"), alt.Tooltip("value:Q", title="top-1 %", format=".2f")],
        )
    ]


def base_labels(values: Mapping[str, float], axis: Top1Axis) -> list[alt.Chart]:
    """The names of `base_rules`, for the top of a figure: what lies below them is covered a little."""
    if not values:
        return []
    look: dict[str, Any] = {"align": "right", "baseline": "bottom", "dx": -2, "dy": -2, "fontSize": 11}
    text = alt.Chart(named("bases")).encode(y=top1(axis, field_name="place"), x=alt.value("width"), text="label:N")
    cover = text.mark_text(color="@paper", stroke="@paper", strokeWidth=3, strokeOpacity=0.8, **look)
    return [cover, text.mark_text(color="@faint", **look)]


def base_rows(values: Mapping[str, float], axis: Top1Axis) -> Rows:
    """The baselines, their labels as far from one another as they need."""
    gap, last, rows = 0.06 * (axis.high - axis.low), float("-inf"), []
    for name, value in sorted(values.items(), key=lambda item: item[1]):
        last = max(value, last + gap)
        rows.append({"name": name, "value": round(value, 3), "place": last, "label": f"{name}: {value:.1f} %"})
    return rows
