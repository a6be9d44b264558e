"""The figures of what was measured: the gains, the seeds of finalists and of the test stage, sweeps side by side."""

from collections import Counter
from collections.abc import Mapping
from collections.abc import Sequence

import altair as alt

from tune_topkd.findings import Findings
from tune_topkd.findings import Row
from tune_topkd.ledger import Finalist
from tune_topkd.ledger import finalists
from tune_topkd.ledger import former_finalists
from tune_topkd.ledger import winner_of
from tune_topkd.report.page.data import Rows
from tune_topkd.report.page.data import ends
from tune_topkd.report.page.data import seed_rows
from tune_topkd.report.page.figure import Figure
from tune_topkd.report.page.figure import named
from tune_topkd.verdict import Verdict
from tune_topkd.verdict import baseline_name
from tune_topkd.verdict import verdict_of


def gains_figure(row: Row) -> Figure | None:
    """What the answer is above each baseline by."""
    if not row.gains:
        return None
    rows: Rows = []
    for name, gain in row.gains.items():
        low, high = gain.interval.of_gain if gain.interval else (gain.mean, gain.mean)
        is_told = gain.interval is not None and gain.interval.excludes_zero
        what = "not told apart" if not is_told else "above" if gain.mean > 0 else "below"
        rows.append(
            {
                "name": f"over {name}",
                "gain": round(gain.mean, 3),
                "low": round(low, 3),
                "high": round(high, 3),
                "what": what,
            }
        )
    least, most = min([0.0, *(r["low"] for r in rows)]), max([0.0, *(r["high"] for r in rows)])
    pad = max(0.08 * (most - least), 0.1)
    tips = [
        alt.Tooltip("name:N", title="gain"),
        alt.Tooltip("gain:Q", title="points", format="+.2f"),
        alt.Tooltip("low:Q", title="from", format="+.2f"),
        alt.Tooltip("high:Q", title="to", format="+.2f"),
        alt.Tooltip("what:N", title="the answer is"),
    ]
    scale = alt.Scale(domain=[least - pad, most + pad], nice=False)
    x_axis = alt.Axis(title="points above the baseline", format="+~r", grid=True, tickCount=5)
    y = alt.Y("name:N", sort=None, axis=alt.Axis(title=None, domain=False, labelLimit=190))
    colours = {"above": "@completed", "not told apart": "@pruned", "below": "@failed"}
    domain = [what for what in colours if any(r["what"] == what for r in rows)]
    colour = alt.Color("what:N", scale=alt.Scale(domain=domain, range=[colours[d] for d in domain]), title=None)
    base = alt.Chart(named("gains"))
    zero = alt.Chart(named("zero")).mark_rule(color="@ink", strokeWidth=1).encode(x=alt.X("zero:Q", scale=scale))
    spans = base.mark_rule(strokeWidth=3, strokeCap="round").encode(
        y=y, x=alt.X("low:Q", scale=scale, axis=x_axis), x2="high:Q", color=colour, tooltip=tips
    )
    points = base.mark_point(filled=True, size=110).encode(
        y=y, x=alt.X("gain:Q", scale=scale), color=colour, tooltip=tips
    )
    chart = alt.layer(zero, spans, points).properties(width="container", height=max(46 * len(rows), 70))
    told = "; ".join(
        f"{r['name']} {r['gain']:+.2f} points, {r['low']:+.2f} to {r['high']:+.2f}, {r['what']}" for r in rows
    )
    caption = (
        "Intervals are at 95 % over seeds and hold for all baselines at once; one that crosses zero tells "
        "nothing apart."
    )
    if all(gain.interval is None for gain in row.gains.values()):
        caption = "Of one seed: there are no intervals, and nothing is told apart."
    data = {"gains": rows, "zero": [{"zero": 0}]}
    return Figure("gains", f"Gain over the baselines, {row.measured_on}", caption, f"{told}.", [chart], data)


def finalists_figure(found: Findings) -> Figure | None:
    """The finalists on fresh seeds."""
    former = former_finalists(found.state)
    each = [*finalists(found.state), *former]
    of_arm = Counter(finalist.record.key.arm for finalist in each)
    named_ = {_finalist_name(finalist, of_arm): finalist for finalist in each if finalist.values}
    caption = (
        "Points are trainings on seeds that took no part in the search, all on the same ones; the tick is the mean, "
        "the bar its 95 % interval, cut at the axis' end, the cross the search's own value, of the one seed that chose it: "
        "what that has above the mean is luck."
    )
    if former:
        caption += " Trials of an earlier choice, which are no finalists now, are shown with the seeds that they had."
    winner = winner_of(found.state)
    answer = "" if winner is None or winner.finalist is None else _finalist_name(winner.finalist, of_arm)
    return _seeds("finalists", "Finalists on fresh seeds", caption, named_, answer, "validation top-1 (%)", owns=True)


def _finalist_name(finalist: Finalist, of_arm: Mapping[str, int]) -> str:
    record = finalist.record
    if record.key.arm != "search":
        return baseline_name(record) + (f", {record.key}" if of_arm[record.key.arm] > 1 else "")
    return f"trial {record.key.number}" + (f", K = {record.params['k']}" if "k" in record.params else "")


def test_figure(found: Findings) -> Figure | None:
    """The answer and the baselines on the test set."""
    verdict: Verdict | None = verdict_of(found.state)
    if verdict is None:
        return None
    arms = [verdict.answer, *verdict.baselines]
    named_ = {arm.name: arm.finalist for arm in arms if arm.values}
    caption = (
        "Points are trainings on further seeds, on all images but those of the test set, measured once after their "
        "last epoch; the tick is the mean, the bar its 95 % interval."
    )
    return _seeds("test", "The test set", caption, named_, verdict.answer.name, "test top-1 (%)", owns=False)


def _seeds(
    id_: str, title: str, caption: str, arms: Mapping[str, Finalist], answer: str, axis: str, *, owns: bool
) -> Figure | None:
    """Values by seed, a line for each arm, the answer's in its own colour."""
    if not arms:
        return None
    each, means = seed_rows(arms)
    means = [row | {"is_answer": row["name"] == answer} for row in means]
    colour = alt.condition("datum.is_answer", alt.value("@best"), alt.value("@pruned"))
    own = [{"name": name, "own": round(f.record.value or 0.0, 3)} for name, f in arms.items()] if owns else []
    known = [*(r["top1"] for r in each), *(r["mean"] for r in means), *(r["own"] for r in own)]
    known += ends(known, means)
    pad = max(0.05 * (max(known) - min(known)), 0.1)
    scale = alt.Scale(domain=[min(known) - pad, max(known) + pad], nice=False, clamp=True)
    x_axis = alt.Axis(title=axis, grid=True, tickCount=6)
    y = alt.Y("name:N", sort=list(arms), axis=alt.Axis(title=None, domain=False, labelLimit=200))
    tips = [
        alt.Tooltip("name:N", title="training of"),
        alt.Tooltip("mean:Q", title="mean %", format=".2f"),
        alt.Tooltip("low:Q", title="from", format=".2f"),
        alt.Tooltip("high:Q", title="to", format=".2f"),
    ]
    spans = (
        alt.Chart(named("means"))
        .mark_bar(height=10, opacity=0.32, cornerRadius=5)
        .encode(y=y, color=colour, x=alt.X("low:Q", scale=scale, axis=x_axis), x2="high:Q", tooltip=tips)
    )
    ticks = (
        alt.Chart(named("means"))
        .mark_tick(thickness=3, height=20)
        .encode(y=y, color=colour, x=alt.X("mean:Q", scale=scale), tooltip=tips)
    )
    points = (
        alt.Chart(named("seeds"))
        .mark_point(filled=True, size=48, color="@completed", opacity=0.85)
        .encode(
            y=y,
            x=alt.X("top1:Q", scale=scale),
            tooltip=[
                alt.Tooltip("name:N", title="training of"),
                alt.Tooltip("seed:Q", title="seed"),
                alt.Tooltip("top1:Q", title="top-1 %", format=".2f"),
            ],
        )
    )
    layers = [spans, ticks, points]
    if own:
        layers.append(
            alt.Chart(named("own"))
            .mark_point(filled=False, shape="cross", size=60, strokeWidth=1.6, color="@ink", opacity=0.8)
            .encode(
                y=y,
                x=alt.X("own:Q", scale=scale),
                tooltip=[alt.Tooltip("name:N", title="trial"), alt.Tooltip("own:Q", title="found by %", format=".2f")],
            )
        )
    chart = alt.layer(*layers).properties(width="container", height=max(40 * len(arms), 80))
    told = "; ".join(f"{r['name']}: {r['mean']:.2f} %, {r['low']:.2f} to {r['high']:.2f}" for r in means)
    rows = {"seeds": each, "means": means, "own": own}
    return Figure(id_, title, caption, f"{title}. {told}.", [chart], rows)


# --- sweeps side by side ----------------------------------------------------------------------------------------------


def campaign_gains_figure(rows: Sequence[Row]) -> Figure | None:
    """The gains of many sweeps over each baseline."""
    data: Rows = []
    for row in rows:
        for name, gain in row.gains.items():
            low, high = gain.interval.of_gain if gain.interval else (gain.mean, gain.mean)
            data.append(
                {
                    "sweep": row.sweep,
                    "name": name,
                    "gain": round(gain.mean, 3),
                    "low": round(low, 3),
                    "high": round(high, 3),
                    "on": row.measured_on,
                }
            )
    if not data:
        return None
    names = list(dict.fromkeys(r["name"] for r in data))
    colours = [f"@bar{i % 3}" if i < 3 else "@failed" for i in range(len(names))]
    tips = [
        alt.Tooltip("sweep:N", title="sweep"),
        alt.Tooltip("name:N", title="over"),
        alt.Tooltip("gain:Q", title="points", format="+.2f"),
        alt.Tooltip("low:Q", title="from", format="+.2f"),
        alt.Tooltip("high:Q", title="to", format="+.2f"),
        alt.Tooltip("on:N", title="measured on"),
    ]
    y = alt.Y("sweep:N", sort=None, axis=alt.Axis(title=None, domain=False, labelLimit=200))
    colour = alt.Color("name:N", scale=alt.Scale(domain=names, range=colours), title="over")
    base = alt.Chart(named("gains"))
    zero = alt.Chart(named("zero")).mark_rule(color="@ink").encode(x="zero:Q")
    spans = base.mark_rule(strokeWidth=2.5, strokeCap="round").encode(
        y=y,
        yOffset=alt.YOffset("name:N", sort=names),
        x=alt.X("low:Q", axis=alt.Axis(title="points above the baseline", format="+~r", grid=True, tickCount=6)),
        x2="high:Q",
        color=colour,
        tooltip=tips,
    )
    points = base.mark_point(filled=True, size=70).encode(
        y=y, yOffset=alt.YOffset("name:N", sort=names), x="gain:Q", color=colour, tooltip=tips
    )
    height = max(22 * len({r["sweep"] for r in data}) * max(len(names), 2), 100)
    chart = alt.layer(zero, spans, points).properties(width="container", height=min(height, 1600))
    told = "; ".join(f"{r['sweep']} {r['gain']:+.2f} over {r['name']}" for r in data[:40])
    caption = (
        "Intervals are at 95 % over seeds and hold for all baselines of a sweep at once; a point without one is of "
        "one seed, which tells nothing apart."
    )
    rows_ = {"gains": data, "zero": [{"zero": 0}]}
    return Figure("campaign-gains", "Gain over the baselines", caption, f"{told}.", [chart], rows_)


def campaign_k_figure(rows: Sequence[Row]) -> Figure | None:
    """The K of each sweep's answer, and those equal to it."""
    data: Rows = [
        {"sweep": row.sweep, "k": k, "what": "best" if k == row.params.get("k") else "not told from it"}
        for row in rows
        if row.equal_k is not None
        for k in row.equal_k.values
    ]
    if not data:
        return None
    most = max(r["k"] for r in data)
    scale = alt.Scale(type="log" if most > 20 else "linear", nice=False, domain=[0.8, most * 1.1 + 0.3])
    colours = alt.Scale(domain=["best", "not told from it"], range=["@best", "@completed"])
    chart = (
        alt.Chart(named("equal_k"))
        .mark_point(filled=True, size=90)
        .encode(
            y=alt.Y("sweep:N", sort=None, axis=alt.Axis(title=None, domain=False, labelLimit=200)),
            x=alt.X("k:Q", scale=scale, axis=alt.Axis(title="K", format="d", grid=True, tickMinStep=1)),
            color=alt.Color("what:N", scale=colours, title=None),
            tooltip=[
                alt.Tooltip("sweep:N", title="sweep"),
                alt.Tooltip("k:Q", title="K"),
                alt.Tooltip("what:N", title="which is"),
            ],
        )
        .properties(width="container", height=min(max(34 * len({r["sweep"] for r in data}), 80), 1600))
    )
    caption = "By what K are not told apart is said below the table. Where nothing was repeated the best stands alone."
    told = "; ".join(f"{row.sweep}: K = {row.params.get('k')}" for row in rows if row.equal_k is not None)
    return Figure("campaign-k", "K of each answer", caption, f"{told}.", [chart], {"equal_k": data})
