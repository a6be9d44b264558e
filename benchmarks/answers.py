"""`python -m benchmarks.answers [SPACE ...] [--runs-dir DIR] [--verify N] [--write]`: answers, confirmed and verified.

Each search space is swept, its answer confirmed on five seeds a stage, exported, and trained again from the exported file
alone, in a folder of its own. KD is tuned as the search tunes TopKD (`baselines.match`). Sweeps that the runs folder has
already are gone on with, so the whole may be stopped at any time.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from collections.abc import Sequence
from pathlib import Path

from benchmarks.__main__ import cores
from benchmarks.__main__ import machine
from benchmarks.pages import give
from tune_topkd.sweep import Sweep
from tune_topkd.sweep.campaign import as_markdown
from tune_topkd.sweep.images import image_spread
from tune_topkd.verdict import Measured
from tune_topkd.verdict import Verdict

SPACES = ("digits", "glyphs")
LAUNCH = Path(__file__).parents[1] / "launch.py"


def launch(*arguments: str) -> str:
    """Run a command of the project, in a process of its own; its stdout.

    Raises:
        RuntimeError: it failed.
    """
    ended = subprocess.run([sys.executable, str(LAUNCH), *arguments], stdout=subprocess.PIPE, text=True)
    if ended.returncode not in (0, 1):  # 1 is what `verify` found
        raise RuntimeError(f"{' '.join(arguments)}: exit {ended.returncode}")
    return ended.stdout


def answered(space: str, runs: Path, seeds: int) -> list[str]:
    """Sweep, confirm, export and verify; the lines of the page."""
    folder = ("--runs-dir", str(runs))
    plain = (*folder, "--mlflow-uri", "")
    begun = (runs / space / "ledger.jsonl").exists()
    launch("resume", space, *plain) if begun else launch("run", space, *plain, "--set", "baselines.match=true")
    launch("confirm", space, *plain)
    sweep = Sweep.open(space, runs_dir=runs, mlflow_uri="")
    status = sweep.status()
    assert status.verdict is not None, "it has just been confirmed"
    with tempfile.TemporaryDirectory() as scratch:
        tuned = Path(scratch) / "tuned.yaml"
        launch("export", space, *folder, "-o", str(tuned))
        found = json.loads(launch("verify", str(tuned), "--seeds", str(seeds)))
    return list(section(space, sweep, status.verdict, found))


def section(space: str, sweep: Sweep, verdict: Verdict, verified: dict[str, object]) -> Iterator[str]:
    """What there is to say of one sweep."""
    yield from (f"## {space}", "", f"**{verdict.sentence}**", "")
    yield "| | trial | test top-1 % | sd over seeds | 95 % interval | tuned is above by | by seed |"
    yield "|---|---|--:|--:|--:|--:|---|"
    gains = {gain.base.name: gain for gain in verdict.gains}
    for arm in (verdict.answer, *verdict.baselines):
        gain = gains.get(arm.name)
        above = "" if gain is None else f"{gain.mean:+.2f} ({_ends(gain.interval, '+')})"
        yield (
            f"| {arm.name} | {arm.record.key} | {arm.finalist.mean or 0:.2f} | {arm.spread or 0:.2f} | "
            f"{_ends(arm.interval)} | {above} | {_by_seed(arm)} |"
        )
    yield ""
    if (images := image_spread(sweep.folder, verdict)) is not None:
        yield from (f"By images: {images.sentence(verdict)}.", "")
    chosen = verdict.answer.chosen_by
    yield from (f"On the validation split: {chosen.sentence}.", "")
    low, high = verified["expected"]  # type: ignore[misc]
    values = ", ".join(f"{seed}: {value:.2f}" for seed, value in verified["values"].items())  # type: ignore[attr-defined]
    kept = "inside" if verified["holds"] else "outside"
    yield (
        f"Trained again from the exported file alone ({values}): {verified['mean']:.2f} %, {kept} the prediction interval "
        f"of {low:.2f} to {high:.2f}."
    )
    yield from ("", as_markdown([sweep.row()]))


def _ends(interval: Sequence[float] | None, sign: str = "") -> str:
    return "–" if interval is None else f"{interval[0]:{sign}.2f} to {interval[1]:{sign}.2f}"


def _by_seed(arm: Measured) -> str:
    return ", ".join(f"{seed}: {value:.2f}" for seed, value in arm.finalist.values.items())


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(prog="benchmarks.answers", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("spaces", nargs="*", default=list(SPACES), metavar="SPACE")
    parser.add_argument("--runs-dir", help="folder of the sweeps, to go on with them; by default a scratch one")
    parser.add_argument("--verify", type=int, default=5, metavar="N", help="trainings from the exported file")
    parser.add_argument("--write", action="store_true", help="keep the page in benchmarks/results")
    args = parser.parse_args()
    lines = ["# Answers, confirmed and verified", "", *(__doc__ or "").splitlines()[2:], "", *machine(), ""]
    with tempfile.TemporaryDirectory() as scratch:
        for space in args.spaces:
            lines += answered(space, Path(args.runs_dir or scratch), args.verify)
    give(lines, f"answers-{'-'.join(args.spaces)}-{cores()}-cores", args.write)


if __name__ == "__main__":
    main()
