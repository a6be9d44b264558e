"""How sweeps stand, as `status` prints it."""

import time
from typing import TYPE_CHECKING
from typing import Any

from tune_topkd.errors import TuneTopKDError
from tune_topkd.sweep import Sweep
from tune_topkd.sweep import Workspace
from tune_topkd.sweep.wording import duration

if TYPE_CHECKING:
    from tune_topkd.sweep.jobs import Job

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
    counts = ", ".join(f"{n} {what}" for what, n in entry["trials"].items() if n)
    best = entry["best"]
    tail = f"; best {best['val_top1']:.2f} % (trial {best['number']})" if best else ""
    if best and "fresh" in best:
        fresh = best["fresh"]
        error = "" if fresh["error"] is None else f" ± {fresh['error']:.2f}"
        tail = (
            f"; best {fresh['val_top1']:.2f}{error} % over {len(fresh['values'])} fresh seeds "
            f"(trial {best['number']}, {best['val_top1']:.2f} % in the search)"
        )
    elif entry.get("finalists") and entry["finalists"]["done"] < entry["finalists"]["of"]:
        tail += f"; finalists: {entry['finalists']['done']} of {entry['finalists']['of']} trainings"
    if (test := entry.get("test")) is not None:
        is_done = test["done"] == test["of"] and test["top1"] is not None
        within = f" ({test['interval'][0]:.2f} to {test['interval'][1]:.2f})" if is_done and test["interval"] else ""
        tail += (
            f"; test set {test['top1']:.2f} %{within}"
            if is_done
            else f"; test: {test['done']} of {test['of']} trainings"
        )
    tail += f"; {entry['plateau']}" if entry["plateau"] else ""
    return f"{entry['sweep']}: {entry['state']}, {counts or 'no trials'} of {entry['target']}{tail}{why}"


def line_of_job(job: "Job") -> str:
    """How a job on a cluster stands, in a line."""
    began = time.strftime("%Y-%m-%d %H:%M", time.localtime(job.submitted))
    took = "" if job.ended is None else f" after {duration(job.ended - job.submitted)}"
    why = f"; {job.message}" if job.status == "failed" and job.message else ""
    return f"{job.id}: {', '.join(job.sweeps)}, {job.status}{took}; submitted {began}, in {job.runs}{why}"


def standing(name: str, workspace: Workspace) -> dict[str, Any]:
    """How one sweep stands, as JSON can hold it."""
    found = Sweep(name, workspace).status()
    best, finalist = found.best, found.winner and found.winner.finalist
    entry: dict[str, Any] = {
        "sweep": name,
        "state": found.condition,
        "error": found.error,
        "plateau": found.plateau,
        "trials": found.trials,
        "target": found.target,
        "best": best and {"number": best.key.number, "val_top1": best.value, "params": best.params},
        "baselines": {
            method: {"val_top1": record.value, "params": record.params} for method, record in found.baselines.items()
        },
    }
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
