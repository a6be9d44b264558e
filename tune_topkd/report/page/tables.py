"""The tables of a page that are few rows long; that of all trainings is made in the browser."""

from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field

from tune_topkd.findings import NONE
from tune_topkd.findings import Findings
from tune_topkd.findings import ForAll
from tune_topkd.findings import Row
from tune_topkd.findings import range_text
from tune_topkd.findings import text_of
from tune_topkd.ledger import SEARCH
from tune_topkd.ledger import finalists
from tune_topkd.ledger import former_finalists
from tune_topkd.ledger import winner_of
from tune_topkd.report.page.data import interval_of
from tune_topkd.verdict import baseline_name
from tune_topkd.verdict import listed
from tune_topkd.verdict import verdict_of


@dataclass(frozen=True)
class Column:
    """A column of a table."""

    name: str
    is_number: bool = False


@dataclass(frozen=True)
class Line:
    """A row of a table; the first cell is its name."""

    cells: Sequence[str]
    is_answer: bool = False
    link: str = ""
    """The part of the page that its name leads to."""


@dataclass(frozen=True)
class Table:
    """A table, and what to know to read it."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[Line]
    sortable: bool = True
    notes: Sequence[str] = field(default=())


def parameter_table(found: Findings) -> Table | None:
    """The answer's parameters beside what was searched; none without an answer."""
    params = found.row.params
    if not params:
        return None
    shares = found.importances[0].shares if found.importances else {}
    searched = sorted(found.config.space, key=lambda name: name != "k")
    lines = [
        Line(
            [
                name,
                text_of(params.get(name)),
                range_text(found.config.space[name]),
                text_of(found.defaults.get(name)),
                f"{shares[name]:.0%}" if name in shares else NONE,
            ],
        )
        for name in searched
    ]
    columns = [Column("parameter"), Column("answer", True), Column("searched"), Column("default", True)]
    columns.append(Column(f"importance{f' ({found.importances[0].measure})' if shares else ''}", True))
    others = ", ".join(f"{n} = {text_of(v)}" for n, v in params.items() if n not in found.config.space)
    notes = [f"Not searched: {others}."] if others else []
    if (relative := found.config.relative) is not None:
        notes.append(f"Of {listed(relative.of)} the ratios were searched: a value itself may lie outside its range.")
    return Table("The answer's parameters", columns, lines, notes=notes)


def finalists_table(found: Findings) -> Table | None:
    """The finalists and what their fresh seeds gave; none where none were trained again."""
    former, winner = former_finalists(found.state), winner_of(found.state)
    each = [*finalists(found.state), *former]
    seeds = sorted({seed for finalist in each for seed in finalist.values})
    if not seeds:
        return None
    lines = []
    for finalist in sorted(each, key=lambda f: -(f.mean or 0.0)):
        record = finalist.record
        is_answer = winner is not None and winner.finalist is not None and winner.record.key == record.key
        low, high = interval_of(finalist)
        lines.append(
            Line(
                [
                    str(record.key),
                    "search" if record.key.arm == SEARCH else baseline_name(record),
                    text_of(record.params.get("k")),
                    NONE if finalist.mean is None else f"{finalist.mean:.2f}",
                    f"{low:.2f} to {high:.2f}" if len(finalist.values) > 1 else NONE,
                    f"{record.value or 0.0:.2f}",
                    NONE if finalist.mean is None else f"{finalist.luck:+.2f}",
                    *(f"{finalist.values[seed]:.2f}" if seed in finalist.values else NONE for seed in seeds),
                ],
                is_answer,
            )
        )
    columns = [Column("trial"), Column("of"), Column("K", True), Column("mean", True), Column("95 % interval", True)]
    columns += [Column("found by", True), Column("luck", True), *(Column(f"seed {seed}", True) for seed in seeds)]
    notes = ["Validation top-1 in percent; luck is what a trial's own value in the search has above its mean."]
    if former:
        which = listed([str(finalist.record.key) for finalist in former])
        notes.append(f"Of an earlier choice, and not among the finalists now: {which}.")
    return Table("Values on fresh seeds", columns, lines, notes=notes)


def test_table(found: Findings) -> Table | None:
    """The test stage: the answer and the baselines; none before it."""
    verdict = verdict_of(found.state)
    if verdict is None or not verdict.answer.values:
        return None
    gains = {gain.base.name: gain for gain in verdict.gains}
    seeds = list(verdict.answer.finalist.seeds)
    lines = []
    for arm in (verdict.answer, *verdict.baselines):
        gain, mean, interval = gains.get(arm.name), arm.finalist.mean, arm.interval
        values = arm.finalist.values
        lines.append(
            Line(
                [
                    arm.name,
                    str(arm.record.key),
                    NONE if mean is None else f"{mean:.2f}",
                    NONE if interval is None else "{:.2f} to {:.2f}".format(*interval.of_top1),
                    f"{gain.mean:+.2f}" if gain else NONE,
                    "{:+.2f} to {:+.2f}".format(*gain.interval.of_gain) if gain and gain.interval else NONE,
                    *(f"{values[seed]:.2f}" if seed in values else NONE for seed in seeds),
                ],
                arm is verdict.answer,
            )
        )
    columns = [Column("config"), Column("trial"), Column("mean", True), Column("95 % interval", True)]
    columns += [Column("tuned is above by", True), Column("interval of that", True)]
    columns += [Column(f"seed {seed}", True) for seed in seeds]
    notes = [f"Test top-1 in percent, look {verdict.look}. {verdict.effort}"]
    return Table("Values on the test set", columns, lines, notes=notes)


def rungs_table(found: Findings) -> Table | None:
    """The rungs and what they foresaw."""
    if not found.rungs:
        return None
    lines = [
        Line(
            [
                f"epoch {rung.epoch}",
                str(rung.arrived),
                str(rung.stopped),
                NONE if rung.rank_correlation is None else f"{rung.rank_correlation:.2f}",
                str(rung.trials) if rung.trials else NONE,
            ]
        )
        for rung in found.rungs
    ]
    columns = [Column("rung"), Column("trials that arrived", True), Column("stopped", True)]
    columns += [Column("rank correlation with the end", True), Column("over trials", True)]
    return Table("Rungs", columns, lines)


def campaign_table(rows: Sequence[Row], links: Mapping[str, str], notes: Sequence[str]) -> Table:
    """A row for each sweep."""
    bases = list(dict.fromkeys(name for row in rows for name in row.gains))
    columns = [
        Column("sweep"),
        Column("dataset"),
        Column("teacher → student"),
        Column("K", True),
        Column("equal K", True),
    ]
    columns += [Column("top-1 %", True), Column("on"), *(Column(f"over {name}", True) for name in bases)]
    columns += [Column("trials", True), Column("CPU h", True), Column("GPU h", True)]
    lines = [
        Line(
            [
                row.sweep,
                row.dataset,
                row.student if row.teacher == NONE else f"{row.teacher} → {row.student}",
                text_of(row.params.get("k")),
                NONE if row.equal_k is None else ", ".join(map(str, row.equal_k.values)),
                NONE if row.top1 is None else row.top1.of_top1(),
                row.measured_on or row.state.replace("_", " "),
                *(row.gains[name].of_gain() if name in row.gains else NONE for name in bases),
                str(row.trials),
                f"{row.cpu_hours:.2f}",
                f"{row.gpu_hours:.2f}",
            ],
            link=links[row.sweep],
        )
        for row in rows
    ]
    return Table("A row for each sweep", columns, lines, notes=notes)


def for_all_table(for_all: ForAll) -> Table:
    """What the one config for all sweeps loses on each."""
    columns = [Column(name, "lose" in name) for name in for_all.headings]
    note = "Losses are against each sweep's own answer; below 0 it gains. In brackets are 95 % intervals."
    return Table("What it loses on each sweep", columns, [Line(row) for row in for_all.rows], notes=(note,))
