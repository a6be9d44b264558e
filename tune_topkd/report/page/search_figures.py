"""The figures of a search: what its trials gave, by K, by parameter, by number."""

from collections.abc import Iterator
from collections.abc import Sequence

import altair as alt

from tune_topkd.findings import Findings
from tune_topkd.ledger import winner_of
from tune_topkd.report.page.data import Parameter
from tune_topkd.report.page.data import Rows
from tune_topkd.report.page.data import Top1Axis
from tune_topkd.report.page.data import base_values
from tune_topkd.report.page.data import coordinates
from tune_topkd.report.page.data import parameters_of
from tune_topkd.report.page.data import repeated
from tune_topkd.report.page.figure import Chart
from tune_topkd.report.page.figure import Figure
from tune_topkd.report.page.figure import along
from tune_topkd.report.page.figure import base_labels
from tune_topkd.report.page.figure import base_rows
from tune_topkd.report.page.figure import base_rules
from tune_topkd.report.page.figure import named
from tune_topkd.report.page.figure import ticks
from tune_topkd.report.page.figure import top1
from tune_topkd.report.page.figure import trial_tooltip
from tune_topkd.report.page.figure import values_of
from tune_topkd.report.page.look import BARS
from tune_topkd.report.page.look import STATUS_COLOURS
from tune_topkd.report.page.look import VALUES


def _on_the_edge(trials: Rows) -> str:
    """What the marks on the lower edge are."""
    named = {"triangle-down": "triangles are below the axis", "cross": "crosses have failed"}
    told = [what for mark, what in named.items() if any(row["mark"] == mark for row in trials)]
    return f"On the lower edge {', '.join(told)}." if told else ""


def _statuses(trials: Rows) -> tuple[list[str], list[str]]:
    """The statuses that there are, and their colours."""
    found = [status for status in STATUS_COLOURS if any(row["status"] == status for row in trials)]
    return found, [STATUS_COLOURS[status] for status in found]


def _points(trials: Rows, parameters: Sequence[Parameter], axis: Top1Axis, x: alt.X, size: int = 46) -> alt.Chart:
    """The trials as points, those that were not pruned on top and whole."""
    domain, colours = _statuses(trials)
    is_done = alt.datum.status == "completed"
    chart: alt.Chart = (
        alt.Chart(named("trials"))
        .transform_filter("datum.has_y")
        .mark_point(filled=True, strokeWidth=1)
        .encode(
            x=x,
            y=top1(axis),
            color=alt.Color("status:N", scale=alt.Scale(domain=domain, range=colours), title=None),
            shape=alt.Shape("mark:N", scale=None),
            size=alt.condition(is_done, alt.value(size), alt.value(size * 0.6)),
            opacity=alt.condition(is_done, alt.value(0.9), alt.value(0.45)),
            order=alt.Order("completed:Q"),
            tooltip=trial_tooltip(parameters),
        )
        .transform_calculate(completed="datum.status == 'completed' ? 1 : 0")
    )
    return chart


def _answer(parameters: Sequence[Parameter], axis: Top1Axis, x: alt.X, title: str) -> alt.Chart:
    """The trial that is the answer, marked."""
    chart: alt.Chart = (
        alt.Chart(named("trials"))
        .transform_filter("datum.is_best")
        .mark_point(filled=False, color="@best", strokeWidth=2.2, size=90, opacity=1)
        .encode(x=x, y=top1(axis, title), tooltip=trial_tooltip(parameters))
    )
    return chart


def has_values(trials: Rows) -> bool:
    """Whether there is anything to draw: a trial that did not fail has a value."""
    return any(row["top1"] is not None and row["status"] != "failed" for row in trials)


def k_figure(found: Findings, trials: Rows, axis: Top1Axis) -> Figure | None:
    """Top-1 against K; none where K is not searched."""
    parameters = parameters_of(found.config)
    k = next((p for p in parameters if p.name == "k" and not p.is_choice), None)
    if k is None or not any(row["kx"] for row in trials) or not has_values(trials):
        return None
    values, fresh, bases = _by_k(trials, k), repeated(found), base_values(found)
    known = [float(row[k.field]) for row in trials if row[k.field] is not None]
    low, high = min(known), max(known)
    at = [t for t in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 15, 20, 30, 50, 70, 100, 200, 500, 1000) if low <= t <= high]
    domain = [low / 1.12, high * 1.12] if k.is_log else [low - 0.6, high + 0.6]
    scale = alt.Scale(type="log" if k.is_log else "linear", domain=domain, nice=False)
    x_axis = alt.Axis(title="K", values=at, format="d", labelOverlap="parity")
    x = alt.X("kx:Q", scale=scale, axis=x_axis)
    line = (
        alt.Chart(named("by_k"))
        .mark_line(color="@completed", strokeWidth=1.5, opacity=0.55)
        .encode(x=alt.X("k:Q", scale=scale), y=top1(axis, field_name="best"))
    )
    median = (
        alt.Chart(named("by_k"))
        .transform_filter("datum.median != null")
        .mark_tick(thickness=2, width=22, color="@ink", orient="horizontal")
        .encode(
            x=alt.X("k:Q", scale=scale),
            y=top1(axis, field_name="median"),
            tooltip=[
                alt.Tooltip("k:Q", title="K"),
                alt.Tooltip("median:Q", title="median top-1 %", format=".2f"),
                alt.Tooltip("trials:Q", title="completed trials"),
            ],
        )
    )
    chart = alt.layer(
        *base_rules(bases, axis),
        line,
        _points(trials, parameters, axis, x),
        median,
        *_fresh_marks(axis, scale),
        *base_labels(bases, axis),
    ).properties(width="container", height=340)
    best = max(values, key=lambda row: row["best"], default=None)
    told = f"The highest value is at K = {best['k']:g}, {best['best']:.2f} %." if best else "No trial was completed."
    caption = [
        "Each point is a trial, moved a little to the side where several have the same K; a line joins the best "
        "completed trials of each K, where there are several K, and short dashes are medians, where a K has three or more "
        "completed trials. The search gives more trials to the K it "
        "likes, and the best of more trials is higher by luck.",
        "Diamonds are means over fresh seeds, the ringed one the answer's, with their 95 % intervals, cut at the axis' end."
        if fresh
        else "",
        _on_the_edge(trials),
    ]
    alt_text = f"Validation top-1 against K for {len(trials)} trials. {told}"
    alt_text += "".join(f" {name}: {value:.2f} %." for name, value in bases.items())
    rows = {"trials": trials, "by_k": values, "fresh": fresh, "bases": base_rows(bases, axis)}
    return Figure("k", "Top-1 against K", " ".join(filter(None, caption)), alt_text, [chart], rows)


def _fresh_marks(axis: Top1Axis, scale: alt.Scale) -> Iterator[alt.Chart]:
    """The finalists' means over fresh seeds and their intervals."""
    base = alt.Chart(named("fresh")).encode(
        x=alt.X("kx:Q", scale=scale),
        tooltip=[
            alt.Tooltip("n:Q", title="trial"),
            alt.Tooltip("k:Q", title="K"),
            alt.Tooltip("mean:Q", title="mean over fresh seeds %", format=".2f"),
            alt.Tooltip("low:Q", title="from", format=".2f"),
            alt.Tooltip("high:Q", title="to", format=".2f"),
            alt.Tooltip("seeds:Q", title="seeds"),
        ],
    )
    yield base.mark_rule(color="@best", strokeWidth=2).encode(y=top1(axis, field_name="low"), y2="high:Q")
    yield base.mark_point(shape="diamond", filled=True, size=110, color="@best", stroke="@paper", strokeWidth=1).encode(
        y=top1(axis, field_name="mean")
    )
    ring: alt.Chart = base.transform_filter("datum.is_answer")
    yield ring.mark_point(shape="circle", filled=False, size=340, color="@best", strokeWidth=2).encode(
        y=top1(axis, field_name="mean")
    )


def _by_k(trials: Rows, k: Parameter) -> Rows:
    """The best and the median of each K's completed trials."""
    groups: dict[float, list[float]] = {}
    for row in trials:
        if row["status"] == "completed" and row["top1"] is not None and row[k.field] is not None:
            groups.setdefault(row[k.field], []).append(row["top1"])
    rows = []
    for value, top1s in sorted(groups.items()):
        ordered = sorted(top1s)
        middle = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
        median = round(middle, 3) if len(ordered) >= 3 else None
        rows.append({"k": value, "best": ordered[-1], "median": median, "trials": len(ordered)})
    return rows


def history_figure(found: Findings, trials: Rows, axis: Top1Axis) -> Figure:
    """Top-1 by the number of the trial, and the best so far."""
    parameters, bases = parameters_of(found.config), base_values(found)
    x = alt.X(
        "n:Q",
        axis=alt.Axis(title="trial", format="d", tickMinStep=1, tickCount=12),
        scale=alt.Scale(nice=False, padding=8),
    )
    line = (
        alt.Chart(named("trials"))
        .transform_filter("datum.best != null")
        .mark_line(interpolate="step-after", color="@best", strokeWidth=2)
        .encode(x=x, y=top1(axis, field_name="best"))
    )
    layers = [*base_rules(bases, axis), _points(trials, parameters, axis, x, 40)]
    layers += [line] if any(row["best"] is not None for row in trials) else []
    layers += base_labels(bases, axis)
    chart = alt.layer(*layers).properties(width="container", height=280)
    winner = winner_of(found.state)
    alt_text = f"Validation top-1 of {len(trials)} trials in their order, with the best so far."
    if winner is not None:
        alt_text += f" The answer is trial {winner.record.key.number}."
    caption = "The line is the best value up to each trial. Where it has long been flat, more trials are of little use."
    rows = {"trials": trials, "bases": base_rows(bases, axis)}
    return Figure("history", "How the search went", caption, alt_text, [chart], rows)


def slice_figure(found: Findings, trials: Rows, axis: Top1Axis) -> Figure | None:
    """Top-1 against each parameter, a small chart for each."""
    parameters = parameters_of(found.config)
    if not parameters:
        return None
    charts = [_slice(trials, parameters, axis, parameter) for parameter in parameters]
    labels = [parameter.name for parameter in parameters]
    caption = (
        "One chart for each parameter, K first; the ring is the answer. Pruned trials are faint: they had fewer epochs."
    )
    alt_text = (
        f"Validation top-1 against each of {len(parameters)} parameters: {', '.join(p.name for p in parameters)}."
    )
    return Figure("slices", "Each parameter by itself", caption, alt_text, charts, {"trials": trials}, labels)


def _slice(trials: Rows, parameters: Sequence[Parameter], axis: Top1Axis, parameter: Parameter) -> Chart:
    """Top-1 against one parameter."""
    x = along(parameter, trials)
    domain, colours = _statuses(trials)
    points = _points(trials, parameters, axis, x, 30).encode(
        color=alt.Color("status:N", scale=alt.Scale(domain=domain, range=colours), legend=None),
        y=top1(axis, "top-1 (%)"),
    )
    return alt.layer(points, _answer(parameters, axis, x, "top-1 (%)")).properties(width="container", height=190)


def parallel_figure(found: Findings) -> Figure | None:
    """All parameters of each trial as a line."""
    drawn, parameters = coordinates(found), parameters_of(found.config)
    if len(parameters) < 2 or not drawn.lines:
        return None
    done = sorted(
        {row["n"]: row["top1"] for row in drawn.lines if row["status"] == "completed" and row["top1"]}.values()
    )
    low, high = (done[len(done) // 10], done[-1]) if done else (0.0, 100.0)
    low = min(low, high - 0.2)
    names = [parameter.name for parameter in parameters]
    x = alt.X("axis:N", sort=names, axis=alt.Axis(title=None, labelAngle=0, domain=False, ticks=False, labelPadding=12))
    y = alt.Y("place:Q", axis=None, scale=alt.Scale(domain=[-0.03, 1.03], nice=False))
    hover = alt.selection_point(on="pointerover", clear="pointerout", fields=["n"], empty=False, nearest=False)
    tips = [
        alt.Tooltip("n:Q", title="trial"),
        alt.Tooltip("status:N", title="status"),
        alt.Tooltip("top1:Q", title="top-1 %", format=".2f"),
    ]
    base = alt.Chart(named("lines"))
    axes = alt.Chart(named("ticks")).mark_rule(color="@faint").encode(x=x, y=alt.value(0), y2=alt.value("height"))
    pruned = (
        base.transform_filter("datum.status == 'pruned'")
        .mark_line(color="@pruned", strokeWidth=1, opacity=0.22)
        .encode(x=x, y=y, detail="n:N")
    )
    ramp = alt.Scale(domain=[low, high], range=list(VALUES), clamp=True)
    legend = alt.Legend(title="top-1 (%)", orient="top", gradientLength=180, gradientThickness=10, format=".1f")
    completed = (
        base.transform_filter("datum.status == 'completed'")
        .mark_line(strokeWidth=1.6)
        .encode(
            x=x,
            y=y,
            detail="n:N",
            color=alt.Color("top1:Q", scale=ramp, legend=legend),
            order=alt.Order("place_of_axis:Q"),
            strokeWidth=alt.condition(hover, alt.value(4), alt.value(1.6)),
            opacity=alt.condition(hover, alt.value(1), alt.value(0.85)),
            tooltip=tips,
        )
        .add_params(hover)
    )
    best = base.transform_filter("datum.is_best")
    line = best.mark_line(color="@best", strokeWidth=3).encode(x=x, y=y, tooltip=tips)
    points = best.mark_point(filled=True, color="@best", size=50, opacity=1).encode(
        x=x, y=y, tooltip=[*tips, alt.Tooltip("axis:N", title="parameter"), alt.Tooltip("value:N", title="value")]
    )
    labels = (
        alt.Chart(named("ticks"))
        .mark_text(align="left", dx=5, fontSize=11, color="@ink", stroke="@paper", strokeWidth=3, strokeOpacity=0.8)
        .encode(x=x, y=y, text="text:N")
    )
    labels_over = labels.mark_text(align="left", dx=5, fontSize=11, color="@ink")
    chart = alt.layer(axes, pruned, completed, line, points, labels, labels_over).properties(
        width="container", height=340
    )
    caption = (
        "A line for each trial, coloured by its top-1; the answer is the thick one, pruned trials are grey. Lines "
        "that meet on an axis show a value that good trials share; lines that fan out show one that matters little. "
    )
    alt_text = f"Parallel coordinates of {', '.join(names)}; completed trials coloured by top-1."
    rows = {"lines": drawn.lines, "ticks": drawn.ticks}
    width = max(90 * len(names), 320)
    return Figure(
        "parallel",
        "All parameters at once",
        caption + (f"{drawn.left_out}." if drawn.left_out else ""),
        alt_text,
        [chart],
        rows,
        (),
        width,
    )


def weights_figure(found: Findings, trials: Rows) -> Figure | None:
    """Where in K × each weight good trials lie."""
    parameters = parameters_of(found.config)
    k = next((p for p in parameters if p.name == "k" and not p.is_choice), None)
    names = (
        found.config.relative.of if found.config.relative else [n for n in found.config.space if n.endswith("weight")]
    )
    weights = [p for p in parameters if p.name in names and not p.is_choice]
    done = [row for row in trials if row["status"] == "completed" and row["top1"] is not None]
    if k is None or not weights or len(done) < 3:
        return None
    values = sorted(row["top1"] for row in done)
    low = min(values[len(values) // 10], values[-1] - 0.2)
    ramp = alt.Scale(domain=[low, values[-1]], range=list(VALUES), clamp=True)
    rows: dict[str, Rows] = {"trials": trials}
    charts = []
    for parameter in weights:
        cells = _cells(done, k, parameter)
        rows[f"cells_{parameter.field}"] = cells
        charts.append(_weight_chart(done, parameters, k, parameter, ramp))
    caption = (
        "Cells are coloured by the mean top-1 of the completed trials in them, points are the trials; an empty cell "
        "is one that the search left. The ring is the answer."
    )
    alt_text = f"Mean top-1 of completed trials over K and each of {', '.join(p.name for p in weights)}."
    labels = [parameter.name for parameter in weights]
    return Figure("weights", "K and the weights of the loss", caption, alt_text, charts, rows, labels)


def _weight_chart(
    done: Rows, parameters: Sequence[Parameter], k: Parameter, weight: Parameter, ramp: alt.Scale
) -> Chart:
    """A grid of cells over K and a weight."""
    of_k, of_weight = values_of(k, done), values_of(weight, done)
    edges = _edges(of_k, k, 8)
    x_scale = alt.Scale(type="log" if k.is_log else "linear", domain=[edges[0], edges[-1]], nice=False)
    edges = _edges(of_weight, weight, 6)
    y_scale = alt.Scale(type="log" if weight.is_log else "linear", domain=[edges[0], edges[-1]], nice=False)
    cells = f"cells_{weight.field}"
    x_axis = alt.Axis(title="K", format="d", values=ticks(k, of_k, 9), labelOverlap="parity")
    y_axis = alt.Axis(title=weight.name, format="~g", values=ticks(weight, of_weight), grid=False)
    legend = alt.Legend(title="mean top-1 (%)", orient="top", gradientLength=150, gradientThickness=8, format=".1f")
    heat = (
        alt.Chart(named(cells))
        .mark_rect(stroke="@paper", strokeWidth=1.5)
        .encode(
            x=alt.X("x:Q", scale=x_scale, axis=x_axis),
            x2="x2:Q",
            y=alt.Y("y:Q", scale=y_scale, axis=y_axis),
            y2="y2:Q",
            color=alt.Color("mean:Q", scale=ramp, legend=legend),
            tooltip=[
                alt.Tooltip("mean:Q", title="mean top-1 %", format=".2f"),
                alt.Tooltip("best:Q", title="best %", format=".2f"),
                alt.Tooltip("trials:Q", title="completed trials"),
            ],
        )
    )
    place = {"x": alt.X(f"{k.field}:Q", scale=x_scale), "y": alt.Y(f"{weight.field}:Q", scale=y_scale)}
    points = (
        alt.Chart(named("trials"))
        .transform_filter("datum.status == 'completed'")
        .mark_point(filled=True, size=16, color="@ink", stroke="@paper", strokeWidth=0.8, opacity=1)
        .encode(**place, tooltip=trial_tooltip(parameters))
    )
    ring = (
        alt.Chart(named("trials"))
        .transform_filter("datum.is_best")
        .mark_point(filled=False, size=130, color="@best", strokeWidth=2.4, opacity=1)
        .encode(**place, tooltip=trial_tooltip(parameters))
    )
    return alt.layer(heat, points, ring).properties(width="container", height=240)


def _cells(done: Rows, k: Parameter, weight: Parameter) -> Rows:
    """The completed trials in a grid over K and a weight, as many cells as there are trials for."""
    x_edges = _edges([float(row[k.field]) for row in done], k, 8)
    y_edges = _edges([float(row[weight.field]) for row in done], weight, 6)
    cells: dict[tuple[int, int], list[float]] = {}
    for row in done:
        place = _bin(float(row[k.field]), x_edges), _bin(float(row[weight.field]), y_edges)
        cells.setdefault(place, []).append(row["top1"])
    return [
        {
            "x": x_edges[i],
            "x2": x_edges[i + 1],
            "y": y_edges[j],
            "y2": y_edges[j + 1],
            "mean": round(sum(values) / len(values), 3),
            "best": max(values),
            "trials": len(values),
        }
        for (i, j), values in cells.items()
    ]


def _edges(values: Sequence[float], parameter: Parameter, most: int) -> list[float]:
    """The edges of the cells along an axis: whole values of K where these are few, else parts of the same length."""
    low, high = min(values), max(values)
    if parameter.name == "k" and high - low < 12:
        return [max(k - 0.5, 0.5) for k in range(round(low), round(high) + 2)]
    if parameter.is_log and low > 0:
        low, high = (low / 1.05, high * 1.05) if high == low else (low * 0.999, high * 1.001)
        return [low * (high / low) ** (i / most) for i in range(most + 1)]
    pad = 0.5 if high == low else 0.001 * (high - low)
    low, high = low - pad, high + pad
    return [low + (high - low) * i / most for i in range(most + 1)]


def _bin(value: float, edges: Sequence[float]) -> int:
    return min(max(sum(edge <= value for edge in edges) - 1, 0), len(edges) - 2)


def importance_figure(found: Findings) -> Figure | None:
    """How much of the variation goes with each parameter."""
    measures = found.importances
    if not measures:
        return None
    rows: Rows = [
        {"measure": each.measure, "name": name, "share": round(share, 4)}
        for each in measures
        for name, share in each.shares.items()
    ]
    means = {name: [r["share"] for r in rows if r["name"] == name] for name in dict.fromkeys(r["name"] for r in rows)}
    order = sorted(means, key=lambda name: -sum(means[name]) / len(means[name]))
    names = [each.measure for each in measures]
    colour = alt.Color("measure:N", scale=alt.Scale(domain=names, range=list(BARS[: len(names)])), title=None)
    chart = (
        alt.Chart(named("importance"))
        .mark_bar()
        .encode(
            y=alt.Y("name:N", sort=order, axis=alt.Axis(title=None, domain=False, labelLimit=220)),
            yOffset=alt.YOffset("measure:N", sort=names),
            x=alt.X("share:Q", axis=alt.Axis(title="share of the importance", format=".0%", grid=True, tickCount=5)),
            color=colour,
            tooltip=[
                alt.Tooltip("name:N", title="parameter"),
                alt.Tooltip("measure:N", title="measure"),
                alt.Tooltip("share:Q", title="share", format=".1%"),
            ],
        )
        .properties(width="container", height=max(46 * len(order), 120))
    )
    over = "; ".join(
        f"{each.measure} over {each.trials} trials" + (f" of {each.of:,}" if each.trials < each.of else "")
        for each in measures
    )
    caption = (
        f"{over}. fANOVA is the share of the variation in top-1 that goes with a parameter, PED-ANOVA of what sets "
        "the best quarter apart. With some dozens of trials both are rough: trust what they agree on."
    )
    top = ", ".join(f"{name} {max(means[name]):.0%}" for name in order)
    alt_text = f"Importance of the parameters, highest first, by the measure that gives most: {top}."
    return Figure("importance", "What mattered", caption, alt_text, [chart], {"importance": rows})
