"""What a report page tells of a sweep, from its ledger and its frozen config; and the page itself."""

import shlex
from collections import Counter
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from pathlib import Path

from tune_topkd.config import SweepConfig
from tune_topkd.export import TUNED_FILE
from tune_topkd.findings import CONFIRMING
from tune_topkd.findings import Command
from tune_topkd.findings import Findings
from tune_topkd.findings import Importance
from tune_topkd.findings import Note
from tune_topkd.findings import Row
from tune_topkd.findings import Rung
from tune_topkd.findings import bounds_text
from tune_topkd.ledger import FELL_APART
from tune_topkd.ledger import SEARCH
from tune_topkd.ledger import SweepState
from tune_topkd.ledger import TrialRecord
from tune_topkd.ledger import TrialStatus
from tune_topkd.ledger import baseline_trials
from tune_topkd.ledger import finalists_done
from tune_topkd.ledger import has_looked
from tune_topkd.ledger import is_of_the_answer
from tune_topkd.ledger import measured_done
from tune_topkd.ledger import winner_of
from tune_topkd.space import end_of_range
from tune_topkd.sweep.campaign import ranges
from tune_topkd.sweep.campaign import row_of
from tune_topkd.sweep.preflight import known_parameters
from tune_topkd.sweep.recommending import Searched
from tune_topkd.sweep.recommending import recommended
from tune_topkd.sweep.result import ends_of_ranges
from tune_topkd.sweep.result import finalists_sentence
from tune_topkd.sweep.spend import WEAK
from tune_topkd.sweep.spend import rungs_of
from tune_topkd.sweep.spend import spend
from tune_topkd.sweep.spend import spend_by_arm
from tune_topkd.sweep.wording import counted
from tune_topkd.sweep.wording import short
from tune_topkd.sweep.workspace import CONFIG_FILE
from tune_topkd.sweep.workspace import DEFAULT_RUNS
from tune_topkd.sweep.workspace import Workspace
from tune_topkd.verdict import advice
from tune_topkd.verdict import baseline_name
from tune_topkd.verdict import capital
from tune_topkd.verdict import guessing
from tune_topkd.verdict import listed
from tune_topkd.verdict import verdict_of
from tune_topkd.verdict import verdict_of_answer

HARDLY = 0.1
"""A share of the variation below which a parameter hardly mattered."""
FEW_TRIALS = 10
"""Trials of the full budget below which a search has hardly begun."""
REPORT_FILE = "report.html"

CommandLine = Callable[..., str]
"""Makes a command line of this program of its words."""


def findings_from(config: SweepConfig, state: SweepState, folder: Path, how: str, command: CommandLine) -> Findings:
    """All that a page tells of a sweep.

    Args:
        config: its frozen config.
        state: its trials.
        folder: where it lies.
        how: its condition.
        command: makes command lines of their words.
    """
    from tune_topkd.importance import importances

    defaults = known_parameters(config)
    row, spent = row_of(config, state, defaults), spend(state)
    found, rungs = importances(config, state), rungs_of(config, state)
    lead, sentence = _answer(config, state, row, how)
    return Findings(
        config=config,
        state=state,
        condition=CONFIRMING if _is_being_confirmed(state, how) else how,
        row=row,
        lead=lead,
        sentence=sentence,
        notes=list(_notes(config, state, row, how, found, rungs)),
        commands=list(_commands(row.sweep, config, state, folder, how, command)),
        defaults=defaults,
        importances=found,
        rungs=rungs,
        spends=spend_by_arm(state),
        saved=spent.saved,
        spend_sentence=spent.sentence(),
    )


def page_of(found: Sequence[Findings]) -> str:
    """The HTML page of one sweep, or of a campaign of several."""
    from tune_topkd.report.page import campaign_page
    from tune_topkd.report.page import sweep_page

    if len(found) == 1:
        return sweep_page(found[0])
    for_all = recommended([Searched(f.config, f.state, f.defaults) for f in found])
    return campaign_page(found, None if for_all is None else for_all.told())


def page_file(found: Sequence[Findings], workspace: Workspace) -> Path:
    """Where the page lies if nobody says where: in the sweep's folder, or in the runs folder if it is of several."""
    name = found[0].row.sweep
    return workspace.folder(name) / REPORT_FILE if len(found) == 1 else workspace.runs / REPORT_FILE


# --- the answer -------------------------------------------------------------------------------------------------------


def _answer(config: SweepConfig, state: SweepState, row: Row, how: str) -> tuple[str, str]:
    """The answer in one sentence, and the same with its figures."""
    winner = winner_of(state)
    if winner is None:
        return _no_answer(state, how), ""
    if (verdict := verdict_of_answer(state)) is not None and verdict.answer.values:
        return verdict.advice, verdict.sentence
    record = winner.record
    what = f"trial {record.key.number}" + (f" (K = {record.params['k']})" if "k" in record.params else "")
    gains = {name: (gain.mean, gain.interval) for name, gain in row.gains.items()}
    tuned = f"tuned {config.method}"
    if winner.finalist is not None:
        return advice(tuned, gains), f"The answer is {what}: {finalists_sentence(state)}."
    far = " so far" if how == "running" else ""
    lead = f"On one seed the best of {_trials(state.size())}{far} is {what}: {winner.figure}."
    over = [f"{mean:+.2f} points against {name}" for name, (mean, _) in gains.items()]
    beside = f"That is {listed(over)}, each on one seed." if over else ""
    told = "" if how == "running" else finalists_sentence(state)
    return lead, " ".join(filter(None, [beside, f"{capital(told)}." if told else ""]))


def _no_answer(state: SweepState, how: str) -> str:
    """Why there is none."""
    counts = state.counts()
    if not state.size():
        return "The sweep is running; its first trial has not begun." if how == "running" else "No trial has begun."
    if counts[TrialStatus.FAILED] == state.size():
        return f"Every trial has failed ({counted(state.size(), 'trial')}): there is no answer."
    yet = " yet" if how == "running" or state.stop_reason != "finished" else ""
    return f"No trial has reached the full budget{yet}: there is no answer."


# --- what to know before relying on it --------------------------------------------------------------------------------


def _notes(
    config: SweepConfig,
    state: SweepState,
    row: Row,
    how: str,
    found: Sequence[Importance],
    rungs: Sequence[Rung],
) -> Iterator[Note]:
    yield from _how_it_stands(state, how)
    if winner_of(state) is not None:
        yield from _how_it_was_measured(state, row)
        yield from _beside_the_baselines(config, row)
        yield from _what_k_did(row, found)
        yield from _at_the_end_of_a_range(config, state, row)
    yield from _failures(state)
    weak = [rung for rung in rungs if rung.rank_correlation is not None and rung.rank_correlation < WEAK]
    if weak:
        which = listed([str(rung.epoch) for rung in weak])
        ranks = listed([f"{rung.rank_correlation:.2f}" for rung in weak])
        subject = f"rung at epoch {which}" if len(weak) == 1 else f"rungs at epochs {which}"
        text = (
            f"The rank correlation with the end is {ranks}, over {weak[0].trials} trials: trials were stopped nearly "
            "at random. Later rungs, or none, may find more."
        )
        yield Note(f"The {subject} foresaw little", text)


def _how_it_stands(state: SweepState, how: str) -> Iterator[Note]:
    done, target = _ended(state), state.target
    trials = f"{done:,} of {_trials(target)} have ended"
    as_written = "This page shows it as it was when the page was written."
    if _is_being_confirmed(state, how):
        yield Note("The answer is being confirmed", f"{_confirmed_so_far(state)}. {as_written}")
    elif how == "running":
        yield Note("The sweep is running", f"{trials}. {as_written}")
    elif how != "finished":
        why = f" ({state.stop_error})" if state.stop_error else ""
        yield Note(f"The sweep is not finished: {how}", f"{trials}{why}. `resume` goes on with it.")
    full = len(state.ranked())
    if how == "finished" and 0 < full < FEW_TRIALS:
        text = "With so few trials another seed of the search may give quite another answer."
        yield Note(f"Only {counted(full, 'trial')} reached the full budget", text)


def _is_being_confirmed(state: SweepState, how: str) -> bool:
    return how == "running" and state.confirm is not None and _ended(state) >= state.target


def _ended(state: SweepState) -> int:
    """Trials of the search that have ended."""
    return sum(record.status.is_end for record in state.arm(SEARCH))


def _confirmed_so_far(state: SweepState) -> str:
    ended, total = finalists_done(state) or (0, 0)
    told = f"{ended} of {total} trainings on fresh seeds have ended"
    if (of_the_test := measured_done(state)) is not None and has_looked(state):
        told += ", and {} of {} for the test set".format(*of_the_test)
    return told


def _how_it_was_measured(state: SweepState, row: Row) -> Iterator[Note]:
    verdict, winner = verdict_of(state), winner_of(state)
    assert winner is not None, "there is an answer"
    if row.measured_on == "one seed":
        text = (
            f"The figure is of one training, on the images that chose it among {_trials(state.size())}, so it "
            "is too high. `confirm` measures the answer on fresh seeds and on the test set."
        )
        yield Note("One seed: this figure is optimistic", text)
    elif row.measured_on == "fresh seeds":
        text = (
            "The mean is over seeds that took no part in the search, but the finalist was chosen by it, on validation "
            "images. `confirm` measures the answer on the test set."
        )
        yield Note("Not measured on the test set", text)
    if verdict is not None and verdict.look > 1:
        text = "An earlier look at the same test set may have chosen what this one measured."
        yield Note(f"Look {verdict.look} at the test set", text)
    if verdict is not None and not verdict.is_done:
        ended, total = measured_done(state) or (0, 0)
        yield Note("The test stage is not done", f"{ended} of {total} trainings have ended. `resume` goes on with it.")
    elif verdict is not None and not is_of_the_answer(state):
        text = f"The test set was read for trial {verdict.answer.record.key.number}, which is not the answer any more."
        yield Note("The answer has changed since the test set was read", text)
    broken = winner.finalist.broken if winner.finalist is not None else {}
    if told := guessing(state):
        yield Note("The student has learnt nothing", f"{capital(told)}.")
    if broken:
        text = "; ".join(f"seed {seed} {how}" for seed, how in broken.items())
        yield Note("The answer fell apart on a fresh seed", f"{capital(text)}.")


def _beside_the_baselines(config: SweepConfig, row: Row) -> Iterator[Note]:
    tuned, on = f"tuned {config.method}", row.measured_on
    where = {"test set": "on the test set", "fresh seeds": "on fresh seeds"}.get(on, "on one seed")
    told = {n: g for n, g in row.gains.items() if g.interval is not None and g.interval.excludes_zero}
    for name, gain in sorted(told.items(), key=lambda item: item[1].mean):
        if gain.mean < 0:
            text = f"It is {-gain.mean:.2f} points above {tuned} {where}."
            yield Note(f"{capital(name)} is the better choice here", text)
    seeds = "one seed does" if on == "one seed" else "these seeds do"
    higher = {name: gain for name, gain in row.gains.items() if gain.mean < 0 and name not in told}
    if higher:
        points = [f"{name} is {-gain.mean:.2f} points above {tuned}" for name, gain in higher.items()]
        verb = "has the higher mean" if len(higher) == 1 else "have the higher mean"
        text = f"{capital(listed(points))} {where}. Which is better {seeds} not tell."
        yield Note(f"{capital(listed(list(higher)))} {verb}", text)
    equal = {
        n: g.interval.of_gain for n, g in row.gains.items() if g.mean >= 0 and g.interval is not None and n not in told
    }
    if equal:
        spans = [f"{low:+.2f} to {high:+.2f} over {name}" for name, (low, high) in equal.items()]
        text = f"The gain {where} may lie anywhere from {listed(spans)}."
        yield Note(f"Not told apart from {listed(list(equal))}", text)
    if not row.gains:
        text = "None has a value yet" if config.baselines is not None else "This sweep has none"
        yield Note("No baseline", f"{text}: what {tuned} is worth cannot be told.")


def _what_k_did(row: Row, found: Sequence[Importance]) -> Iterator[Note]:
    shares = [(i.shares["k"], i) for i in found if i.measure.startswith("fANOVA") and "k" in i.shares]
    if shares and max(share for share, _ in shares) < HARDLY:
        low, high = min(s for s, _ in shares) * 100, max(s for s, _ in shares) * 100
        by = sorted({each.measure.partition(",")[0] for _, each in shares})
        range_ = f"{high:.0f} %" if round(low) == round(high) else f"{low:.0f}–{high:.0f} %"
        most = max(each.trials for _, each in shares)
        text = f"{range_} of the variation in top-1 goes with it, by {listed(by)} over up to {most} trials."
        early = next((i.measure.partition(", ")[2] for _, i in shares if "at epoch" in i.measure), "")
        if any("at epoch" not in each.measure for _, each in shares):
            yield Note("K hardly mattered", text, is_warning=False)
        else:
            few = " Too few trials have reached the end to say it of that."
            yield Note(f"K hardly mattered {early}", text + few, is_warning=False)
    equal = row.equal_k
    others = [] if equal is None else [k for k in equal.values if k != row.params.get("k")]
    if equal is not None and others:
        values = "another value" if len(others) == 1 else f"{len(others)} other values"
        text = f"K = {ranges(others)} cannot be told from the answer's, K = {row.params['k']}, by {equal.how}."
        yield Note(f"{capital(values)} of K may be as good", text, is_warning=False)


def _at_the_end_of_a_range(config: SweepConfig, state: SweepState, row: Row) -> Iterator[Note]:
    relative = config.relative.of if config.relative else []
    for name, parameter in config.space.items():
        if name in relative or name not in row.params:
            continue
        end = end_of_range(parameter, row.params[name])
        if end == "upper" or (end == "lower" and name != "k"):
            searched = f"{bounds_text(parameter)} was searched"
            text = f"The answer has {name} = {short(row.params[name])}, and {searched}. A wider range may find more."
            yield Note(f"{name} lies at the {end} end of its range", text)
    for base in baseline_trials(state):
        baseline = baseline_name(base)
        for name, which in ends_of_ranges(config, base).items():
            best = f"The best of {state.size(base.key.arm)} trainings of {baseline} has {name} = {short(base.params[name])}"
            text = (
                f"{best}, and {bounds_text(config.space[name])} was tried. With a wider range the baseline may be better, "
                "and the gain over it smaller."
            )
            yield Note(f"The {name} of {baseline} lies at the {which} end of its range", text)


def _failures(state: SweepState) -> Iterator[Note]:
    failed = [record for record in state.arm(SEARCH) if record.status is TrialStatus.FAILED]
    if not failed:
        return
    causes = Counter(_cause(record) for record in failed).most_common()
    named = "; ".join(f"{cause} ({count})" for cause, count in causes[:3])
    more = f"; and {len(causes) - 3} other reasons" if len(causes) > 3 else ""
    yield Note(f"{len(failed):,} of {_trials(state.size())} failed", f"{named}{more}.")


def _cause(record: TrialRecord) -> str:
    return f"{record.reason}: {record.error}" if record.error and record.reason not in FELL_APART else record.reason


def _trials(number: int) -> str:
    return f"{number:,} trial{'' if number == 1 else 's'}"


# --- the commands -----------------------------------------------------------------------------------------------------


def plain_command(workspace: Workspace) -> CommandLine:
    """Command lines of `tune-topkd` for a workspace."""

    def command(*words: str) -> str:
        is_elsewhere = words[0] != "verify" and workspace.place != str(Path(DEFAULT_RUNS).absolute())
        return shlex.join(["tune-topkd", *words, *(["--runs-dir", workspace.place] if is_elsewhere else [])])

    return command


def _commands(
    name: str, config: SweepConfig, state: SweepState, folder: Path, how: str, command: CommandLine
) -> Iterator[Command]:
    """What brings this about again, and what comes next."""
    again, plan = f"{name}-again", state.confirm
    more = ["--trials", str(state.target)] if state.target != config.sweep.trials else []
    text = command("run", str(folder / CONFIG_FILE), "--name", again, *more)
    yield Command("Run this search again, as a sweep of its own", text)
    if plan is not None:
        words = ["--finalists", str(len(plan.finalists)), "--seeds", str(plan.test_seeds)]
        yield Command("Then confirm it as this one was", command("confirm", again, *words))
    if how not in ("finished", "running"):
        yield Command("Go on with this sweep", command("resume", name))
    is_over = how == "finished" or (how == "running" and _ended(state) >= state.target)
    if plan is None and state.ranked() and is_over:
        yield Command("Confirm this answer on fresh seeds and on the test set", command("confirm", name))
    if state.ranked():
        text = command("export", name, "--format", "python", "-o", "tuned.py")
        yield Command("Use the answer elsewhere: one file with the loss and its values", text)
    if verdict_of_answer(state) is not None:
        places = {"teacher.checkpoint": config.teacher and config.teacher.checkpoint, "data.root": config.data.root}
        given = [word for key, path in places.items() if path for word in ("--set", f"{key}={path}")]
        text = command("verify", str(folder / TUNED_FILE), *given)
        yield Command("Train the answer again and see whether its figure holds", text)
    yield Command("Write this page again", command("report", name, "--format", "html"))
