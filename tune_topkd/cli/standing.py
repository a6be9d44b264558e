"""How sweeps stand, as `status` prints it."""

from typing import Any

from tune_topkd.errors import TuneTopKDError
from tune_topkd.sweep import Sweep
from tune_topkd.sweep import Workspace

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
    return f"{entry['sweep']}: {entry['state']}, {counts or 'no trials'} of {entry['target']}{tail}{why}"


def standing(name: str, workspace: Workspace) -> dict[str, Any]:
    """How one sweep stands, as JSON can hold it."""
    found = Sweep(name, workspace).status()
    best = found.best
    return {
        "sweep": name,
        "state": found.condition,
        "error": found.error,
        "trials": found.trials,
        "target": found.target,
        "best": best and {"number": best.key.number, "val_top1": best.value, "params": best.params},
        "baselines": {
            method: {"val_top1": record.value, "params": record.params} for method, record in found.baselines.items()
        },
    }
