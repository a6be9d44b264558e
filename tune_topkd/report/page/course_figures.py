"""The figures of how trainings went: learning curves, rungs, when each ran, and what all of it cost."""

import altair as alt

from tune_topkd.findings import Findings
from tune_topkd.ledger import winner_of
from tune_topkd.report.page.data import Rows
from tune_topkd.report.page.data import axis_of
from tune_topkd.report.page.data import curve_rows
from tune_topkd.report.page.data import timeline_rows
from tune_topkd.report.page.figure import Figure
from tune_topkd.report.page.figure import named
from tune_topkd.report.page.look import STATUS_COLOURS

STAGES = ("search", "baselines", "fresh seeds", "test set")
STAGE_COLOURS = ("@bar0", "@bar1", "@bar2", "@failed")


def curves_figure(found: Findings) -> Figure | None:
    """Validation top-1 by epoch."""
    rows, left_out = curve_rows(found)
    if not rows:
        return None
    winner = winner_of(found.state)
    best = None if winner is None else winner.record.key.number
    last = {row["n"]: row for row in rows}
    epochs = max(row["epoch"] for row in rows)
    # The steep beginning may leave the axis below: it goes down to what trials had at the first rung.
    first = min((rung.epoch for rung in found.rungs), default=0)
    early = [row["top1"] for row in rows if row["epoch"] == max(epochs // 10, first, 1)]
    ends = [row["top1"] for row in last.values() if row["status"] != "failed"] or [row["top1"] for row in rows]
    highest = max(row["top1"] for row in rows)  # a training may have fallen since
    axis = axis_of([*ends, *early], [highest])
    present = {row["status"] for row in rows}
    domain = [status for status in STATUS_COLOURS if status in present]
    colour = alt.Color(
        "status:N", scale=alt.Scale(domain=domain, range=[STATUS_COLOURS[s] for s in domain]), title=None
    )
    x = alt.X(
        "epoch:Q",
        scale=alt.Scale(domain=[1, max(epochs, 2)], nice=False),
        axis=alt.Axis(title="epoch", format="d", tickMinStep=1, tickCount=14),
    )
    y = alt.Y(
        "top1:Q",
        scale=alt.Scale(domain=[axis.floor, axis.high], nice=False),
        axis=alt.Axis(title="validation top-1 (%)", tickCount=6),
    )
    tips = [
        alt.Tooltip("n:Q", title="trial"),
        alt.Tooltip("status:N", title="status"),
        alt.Tooltip("epoch:Q", title="epoch"),
        alt.Tooltip("top1:Q", title="top-1 %", format=".2f"),
    ]
    hover = alt.selection_point(on="pointerover", clear="pointerout", fields=["n"], empty=False)
    base = alt.Chart(named("curves"))
    rungs = (
        alt.Chart(named("rungs"))
        .mark_rule(color="@faint", strokeDash=[2, 3])
        .encode(x=x, tooltip=[alt.Tooltip("epoch:Q", title="rung at epoch")])
    )
    names = (
        alt.Chart(named("rungs"))
        .mark_text(align="left", dx=4, dy=4, baseline="top", fontSize=11, color="@faint")
        .encode(x=x, y=alt.value(0), text="label:N")
    )
    lines = (
        base.mark_line(clip=True)
        .encode(
            x=x,
            y=y,
            detail="n:N",
            color=colour,
            strokeWidth=alt.condition(hover, alt.value(3), alt.value(1)),
            opacity=alt.condition(hover, alt.value(1), alt.value(0.5)),
            tooltip=tips,
        )
        .add_params(hover)
    )
    ends_chart = (
        alt.Chart(named("ends"))
        .mark_point(filled=True, size=26, clip=True)
        .encode(x=x, y=y, color=colour, tooltip=tips)
    )
    layers: list[alt.Chart] = [rungs, lines, ends_chart]
    if best is not None:
        layers.append(
            base.transform_filter(f"datum.n == {best}")
            .mark_line(color="@best", strokeWidth=2.8, clip=True)
            .encode(x=x, y=y, tooltip=tips)
        )
    chart = alt.layer(*layers, names).properties(width="container", height=340)
    rung_rows = [{"epoch": rung.epoch, "label": f"rung {rung.epoch}"} for rung in found.rungs if rung.epoch <= epochs]
    caption = (
        "A line for each trial, a point where it ended; the thick line is the answer. If the best lines still rise "
        "at the end, the budget is short. Their steep beginning may lie below the axis. "
        + (f"{left_out}." if left_out else "")
    )
    alt_text = f"Validation top-1 by epoch of {len(last)} trials over {epochs} epochs."
    if rung_rows:
        alt_text += f" Rungs at epochs {', '.join(str(row['epoch']) for row in rung_rows)}."
    data = {"curves": rows, "ends": list(last.values()), "rungs": rung_rows}
    return Figure("curves", "Learning curves", caption.strip(), alt_text, [chart], data)


def rungs_figure(found: Findings) -> Figure | None:
    """How many trials each rung stopped."""
    if not any(rung.arrived for rung in found.rungs):
        return None
    rows: Rows = []
    for rung in found.rungs:
        rank = "–" if rung.rank_correlation is None else f"{rung.rank_correlation:.2f}"
        about = {"rung": f"epoch {rung.epoch}", "rank": rank}
        rows.append(about | {"what": "went on", "trials": rung.arrived - rung.stopped, "order": 0})
        rows.append(about | {"what": "stopped here", "trials": rung.stopped, "order": 1})
    colours = alt.Scale(domain=["went on", "stopped here"], range=["@completed", "@pruned"])
    y = alt.Y("rung:N", sort=None, axis=alt.Axis(title=None, domain=False))
    bars = (
        alt.Chart(named("rung_bars"))
        .mark_bar()
        .encode(
            y=y,
            x=alt.X("trials:Q", axis=alt.Axis(title="trials", format="d", tickMinStep=1, grid=True, tickCount=8)),
            color=alt.Color("what:N", scale=colours, title=None),
            order="order:Q",
            tooltip=[
                alt.Tooltip("rung:N", title="rung"),
                alt.Tooltip("what:N", title="trials that"),
                alt.Tooltip("trials:Q", title="number"),
                alt.Tooltip("rank:N", title="rank correlation with the end"),
            ],
        )
        .properties(width="container", height=max(42 * len(found.rungs), 90))
    )
    told = "; ".join(f"epoch {r.epoch}: {r.arrived} arrived, {r.stopped} were stopped" for r in found.rungs)
    caption = (
        "The rank correlation says how well the order of the trials at a rung foresaw their order at the end; it is "
        "taken over the trials that reached the end. These are the better ones, whose order is harder to foresee; among "
        "all trials it would be higher."
    )
    return Figure("rungs", "What the rungs did", caption, f"Trials by rung. {told}.", [bars], {"rung_bars": rows})


def timeline_figure(found: Findings) -> Figure | None:
    """When each training ran."""
    rows, unit = timeline_rows(found)
    if not rows:
        return None
    lanes = max(row["lane"] for row in rows)
    stages = [stage for stage in STAGES if any(row["arm"] == stage for row in rows)]
    colours = [STAGE_COLOURS[STAGES.index(stage)] for stage in stages]
    chart = (
        alt.Chart(named("timeline"))
        .mark_bar(stroke="@paper", strokeWidth=0.5 if len(rows) < 600 else 0)
        .encode(
            x=alt.X("begin:Q", axis=alt.Axis(title=f"{unit} since the sweep began", grid=True, tickCount=10)),
            x2="end:Q",
            y=alt.Y("lane:O", axis=alt.Axis(title="at once" if lanes < 30 else None, domain=False, labels=lanes < 30)),
            color=alt.Color("arm:N", scale=alt.Scale(domain=stages, range=colours), title=None),
            opacity=alt.condition("datum.status == 'pruned' || datum.status == 'failed'", alt.value(0.5), alt.value(1)),
            tooltip=[
                alt.Tooltip("trial:N", title="trial"),
                alt.Tooltip("arm:N", title="of"),
                alt.Tooltip("status:N", title="status"),
                alt.Tooltip("epochs:Q", title="epochs"),
                alt.Tooltip("begin:Q", title=f"began after, {unit}", format=".2~f"),
                alt.Tooltip("end:Q", title=f"ended after, {unit}", format=".2~f"),
            ],
        )
        .properties(width="container", height=min(max(26 * lanes, 70), 420))
    )
    length = max(row["end"] for row in rows)
    caption = (
        "A bar for each training, from its suggestion to its end; the paler ones were stopped early or failed. A "
        "training that was interrupted and went on later is one bar over both."
    )
    alt_text = f"{len(rows)} trainings over {length:.3g} {unit}, at most {lanes} at once."
    return Figure("timeline", "When each training ran", caption, alt_text, [chart], {"timeline": rows})


def spend_figure(found: Findings) -> Figure | None:
    """What the arms cost, and what stopping saved."""
    total = sum(spent.seconds for spent in found.spends)
    if not total:
        return None
    unit, seconds = ("hours", 3600.0) if total > 5400 else ("minutes", 60.0) if total > 90 else ("seconds", 1.0)
    rows: Rows = [
        {"arm": s.arm, "what": s.status, "time": round(s.seconds / seconds, 4), "trials": s.trials}
        for s in found.spends
        if s.seconds
    ]
    stopped = sum(s.trials for s in found.spends if s.status == "pruned")
    if found.saved:
        saved = {
            "arm": "saved by stopping",
            "what": "saved",
            "time": round(found.saved / seconds, 4),
            "trials": stopped,
        }
        rows.append(saved)
    kinds = {**STATUS_COLOURS, "saved": "@value1"}
    domain = [what for what in kinds if any(row["what"] == what for row in rows)]
    chart = (
        alt.Chart(named("spend"))
        .mark_bar()
        .encode(
            y=alt.Y(
                "arm:N",
                sort=list(dict.fromkeys(row["arm"] for row in rows)),
                axis=alt.Axis(title=None, domain=False, labelLimit=200),
            ),
            x=alt.X("time:Q", axis=alt.Axis(title=f"{unit} of training, one trial at a time", grid=True, tickCount=6)),
            color=alt.Color("what:N", scale=alt.Scale(domain=domain, range=[kinds[d] for d in domain]), title=None),
            tooltip=[
                alt.Tooltip("arm:N", title="of"),
                alt.Tooltip("what:N", title="status"),
                alt.Tooltip("time:Q", title=unit, format=".3~g"),
                alt.Tooltip("trials:Q", title="trainings"),
            ],
        )
        .properties(width="container", height=max(34 * len({row["arm"] for row in rows}), 80))
    )
    sentence = found.spend_sentence
    caption = f"{sentence[0].upper()}{sentence[1:]}. What is saved is reckoned at each stopped trial's own pace."
    return Figure("spend", "What it cost", caption, f"Time of training by arm. {sentence}.", [chart], {"spend": rows})
