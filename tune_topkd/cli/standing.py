"""How sweeps stand, as `status` prints it."""

import time
from collections.abc import Mapping
from collections.abc import Sequence
from typing import TYPE_CHECKING
from typing import Any

from rich.cells import cell_len
from rich.cells import set_cell_size

from tune_topkd.errors import TuneTopKDError
from tune_topkd.findings import Figure
from tune_topkd.sweep import Status
from tune_topkd.sweep import Sweep
from tune_topkd.sweep import Workspace
from tune_topkd.sweep.wording import counted
from tune_topkd.sweep.wording import duration
from tune_topkd.verdict import Interval
from tune_topkd.verdict import baseline_name

if TYPE_CHECKING:
    from tune_topkd.sweep.jobs import Job

_NUMBERS = ("trials", "top-1 %", "K", "CPU h", "GPU h")
_DROPPED_FIRST = ("description", "begun", "on", "GPU h", "CPU h", "gain over")
_SHORTEST_DESCRIPTION = 12
DAMAGED = "damaged"
"""What `status` says of a sweep whose ledger cannot be read."""


def standing_or_damage(name: str, workspace: Workspace) -> dict[str, Any]:
    """How a sweep stands, also if that is not to be found out: the others are shown all the same."""
    try:
        return standing(name, workspace)
    except TuneTopKDError as error:
        what = str(error)
    except OSError as error:
        what = f"{error.filename}: {error.strerror}"
    return {"sweep": name, "state": DAMAGED, "error": what}


def line_of(entry: dict[str, Any]) -> str:
    """How one sweep stands, in a line."""
    why = f"; {entry['error']}" if entry["error"] else ""
    if entry["state"] == DAMAGED:
        return f"{entry['sweep']}: {DAMAGED}{why}"
    counts = _counts(entry["trials"])
    best = entry["best"]
    k = f", K = {best['params']['k']}" if best and "k" in best["params"] else ""
    tail = f"; best {best['val_top1']:.2f} % (trial {best['number']}{k})" if best else ""
    if best and "fresh" in best:
        fresh = best["fresh"]
        error = "" if fresh["error"] is None else f" ± {fresh['error']:.2f}"
        tail = (
            f"; best {fresh['val_top1']:.2f}{error} % over {len(fresh['values'])} fresh seeds "
            f"(trial {best['number']}{k}, {best['val_top1']:.2f} % in the search)"
        )
    elif entry.get("finalists") and 0 < entry["finalists"]["done"] < entry["finalists"]["of"]:
        tail += f"; finalists: {entry['finalists']['done']} of {entry['finalists']['of']} trainings"
    if (test := entry.get("test")) is not None:
        is_done = test["done"] == test["of"] and test["top1"] is not None
        within = f" ({test['interval'][0]:.2f} to {test['interval'][1]:.2f})" if is_done and test["interval"] else ""
        tail += (
            f"; test set {test['top1']:.2f} %{within}"
            if is_done
            else f"; test: {test['done']} of {test['of']} trainings"
        )
    if (baselines := _counts(entry["baseline_trials"])) and entry["state"] != "finished":
        tail += f"; baselines: {baselines}"
    tail += f"; {entry['plateau']}" if entry["plateau"] else ""
    tail += f"; gain over {gains_in_short(entry['gains'])}" if entry["gains"] else ""
    spent = [f"{entry[f'{kind}_hours']:.2f} {kind.upper()} h" for kind in ("cpu", "gpu") if entry[f"{kind}_hours"]]
    tail += f"; {', '.join(spent)}" if spent else ""
    return f"{entry['sweep']}: {entry['state']}, {counts or 'none'} of {counted(entry['target'], 'trial')}{tail}{why}"


def _counts(trials: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {status}" for status, count in trials.items() if count)


def table_of(entries: Sequence[Mapping[str, Any]], width: int | None = None) -> str:
    """How several sweeps stand, a row for each; what is wrong with those that are damaged or failed is told below.

    Args:
        entries: as `standing_or_damage` gives them.
        width: columns of the terminal, in which the less important cells are left out where there is no room for them; None
            for as many as it takes.
    """
    cells = [_cells(entry) for entry in entries]
    names = ["sweep", *dict.fromkeys(name for row in cells for name in row if name != "sweep")]
    if not any(entry.get("gpu_hours") for entry in entries):
        names = [name for name in names if name != "GPU h"]
    widths = {name: max(cell_len(text) for text in (name, *(row.get(name, "") for row in cells))) for name in names}
    for dropped in _DROPPED_FIRST if width else ():
        if (over := sum(widths.values()) + 2 * (len(widths) - 1) - (width or 0)) <= 0:
            break
        if dropped == "description" and widths.get(dropped, 0) - over >= _SHORTEST_DESCRIPTION:
            widths[dropped] -= over
            break
        widths.pop(dropped, None)
    rows = [dict(zip(widths, widths, strict=True)), *cells]
    lines = ["  ".join(_set(row.get(name, ""), name, room) for name, room in widths.items()).rstrip() for row in rows]
    told = [f"{entry['sweep']}: {entry['state']}; {entry['error']}" for entry in entries if entry["error"]]
    return "".join(f"{line}\n" for line in [*lines, *([""] if told else []), *told])


def _set(text: str, name: str, room: int) -> str:
    """A cell in so many columns; numbers stand on the right."""
    if cell_len(text) > room:
        text = f"{set_cell_size(text, room - 1)}…"
    blanks = " " * (room - cell_len(text))
    return blanks + text if name in _NUMBERS else text + blanks


def _cells(entry: Mapping[str, Any]) -> dict[str, str]:
    """The cells of a row by heading."""
    if entry["state"] == DAMAGED:
        return {"sweep": entry["sweep"], "state": DAMAGED}
    ended = sum(entry["trials"].get(status, 0) for status in ("completed", "pruned", "failed"))
    top1, best = entry["top1"], entry["best"]
    figure = "–" if top1 is None else f"{top1['mean']:.2f}"
    if top1 is not None and top1["interval"] is not None:
        figure = Figure(top1["mean"], Interval(*top1["interval"])).of_top1()
    return {
        "sweep": entry["sweep"],
        "state": entry["state"],
        "begun": entry["begun"][:16].replace("T", " "),
        "trials": f"{ended}/{entry['target']}",
        "top-1 %": figure,
        "K": str(best["params"].get("k", "–")) if best else "–",
        "on": "" if top1 is None else top1["measured_on"],
        "gain over": gains_in_short(entry["gains"]),
        "CPU h": f"{entry['cpu_hours']:.2f}",
        "GPU h": f"{entry['gpu_hours']:.2f}",
        "description": " ".join(entry["description"].split()),
    }


def gains_in_short(gains: Mapping[str, Mapping[str, Any]]) -> str:
    """Gains over baselines in points: `ce +1.40, kd not told apart`."""
    told = []
    for arm, gain in gains.items():
        is_apart = gain["interval"] is None or gain["interval"][0] > 0 or gain["interval"][1] < 0
        told.append(f"{arm} {gain['mean']:+.2f}" if is_apart else f"{arm} not told apart")
    return ", ".join(told)


def line_of_job(job: "Job") -> str:
    """How a job on a cluster stands, in a line."""
    began = time.strftime("%Y-%m-%d %H:%M", time.localtime(job.submitted))
    took = "" if job.ended is None else f" after {duration(job.ended - job.submitted)}"
    why = f"; {job.message}" if job.status == "failed" and job.message else ""
    return f"{job.id}: {', '.join(job.sweeps)}, {job.status}{took}; submitted {began}, in {job.runs}{why}"


def standing(name: str, workspace: Workspace) -> dict[str, Any]:
    """How one sweep stands, as JSON can hold it."""
    return entry_of(Sweep(name, workspace).status())


def entry_of(found: Status) -> dict[str, Any]:
    """The same of what was asked before."""
    best, finalist = found.best, found.winner and found.winner.finalist
    entry: dict[str, Any] = {
        "sweep": found.sweep,
        "description": found.description,
        "state": found.condition,
        "begun": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(found.begun)),
        "error": found.error,
        "plateau": found.plateau,
        "trials": found.trials,
        "target": found.target,
        "baseline_trials": found.baseline_trials,
        "best": best and {"number": best.key.number, "val_top1": best.value, "params": best.params},
        "baselines": {
            method: {"val_top1": record.value, "params": record.params} for method, record in found.baselines.items()
        },
    }
    figures, arms = found.figures, {baseline_name(record): arm for arm, record in found.baselines.items()}
    entry["top1"] = figures["top1"].data() | {"measured_on": figures["measured_on"]} if figures else None
    entry["gains"] = {arms[name]: gain.data() for name, gain in figures["gains"].items()} if figures else {}
    entry["cpu_hours"], entry["gpu_hours"] = round(found.cpu_hours, 4), round(found.gpu_hours, 4)
    entry["seconds"] = {
        "trained": round(found.spend.total, 1),
        "failed": round(found.spend.failed, 1),
        "saved": round(found.spend.saved, 1),
    }
    if found.finalists is not None:
        done, of = found.finalists
        entry["finalists"] = {"done": done, "of": of}
    if best and finalist:
        values = {str(seed): value for seed, value in finalist.values.items()}
        fresh = {"val_top1": finalist.mean, "error": finalist.error, "values": values}
        entry["best"] = entry["best"] | {"fresh": fresh}
    if (verdict := found.verdict) is not None:
        done, of = verdict.trainings
        answer, interval = verdict.answer, verdict.answer.interval
        entry["test"] = {
            "look": verdict.look,
            "done": done,
            "of": of,
            "trial": answer.record.key.number,
            "top1": answer.finalist.mean,
            "interval": None if interval is None else list(interval),
            "values": {str(seed): value for seed, value in answer.finalist.values.items()},
            "gains": {
                gain.base.record.key.arm: {
                    "points": gain.mean,
                    "interval": None if gain.interval is None else list(gain.interval),
                    "is_told_apart": gain.is_told_apart,
                }
                for gain in verdict.gains
            },
            "sentence": verdict.sentence,
        }
    return entry
