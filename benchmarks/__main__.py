"""`python -m benchmarks [NAME ...] [--quick] [--write]`: run benchmarks and give their ratios as one Markdown table."""

import argparse
import importlib
import os
import platform
import re
import statistics
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

from benchmarks.ratio import Ratio

NAMES = (
    "loss_cost",
    "data",
    "step",
    "reading",
    "bank",
    "packing",
    "sweep_overhead",
    "ema",
    "audit",
    "simulation",
    "mlflow_outage",
    "mlflow_catch_up",
)
PACKAGES = ("torch", "ray", "optuna", "mlflow")
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(prog="benchmarks", description=sys.modules["benchmarks"].__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which ones, of {', '.join(NAMES)}; default: all")
    parser.add_argument("--quick", action="store_true", help="small and rough: shows that they run")
    parser.add_argument("--write", action="store_true", help=f"also keep the page in {RESULTS}, unless it is quick")
    args = parser.parse_args()
    if unknown := set(args.names) - set(NAMES):
        parser.error(f"unknown benchmark {', '.join(sorted(unknown))}; known are {', '.join(NAMES)}")
    lines = [f"# Benchmarks, {date.today()}{', quick' if args.quick else ''}", "", *machine(), ""]
    print("\n".join(lines))
    for name in args.names or NAMES:
        print(f"{name} ...", file=sys.stderr)
        module = importlib.import_module(f"benchmarks.{name}")
        lines += (found := section(module, module.run(args.quick)))
        print("\n".join(found), flush=True)  # all of them take more than an hour
    if args.quick or not args.write:
        return
    slug = re.sub(r"[^a-z0-9]+", "-", f"{cpu_model()} {cores()} cores".lower()).strip("-")
    path = RESULTS / f"{date.today()}-{slug}.md"
    RESULTS.mkdir(exist_ok=True)
    path.write_text("\n".join(lines))
    print(path, file=sys.stderr)


def machine() -> list[str]:
    """What the ratios were taken on, and with what."""
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    return [
        f"- {cpu_model()}, {cores()} cores; load average at the start {load} (1, 5, 15 minutes)",
        f"- Python {platform.python_version()}, {', '.join(f'{name} {version(name)}' for name in PACKAGES)}",
        "- ratio: the median over the turns, and from the lowest to the highest turn. In a turn the two were measured one "
        "after the other; below 1 means less than the baseline",
    ]


def section(module: ModuleType, ratios: list[Ratio]) -> list[str]:
    """A benchmark's part of the page."""
    name = module.__name__.rpartition(".")[2]
    table = ["| what | against | ratio | lowest – highest | turns | medians | goal |", "|---|---|---|---|---|---|---|"]
    return [f"## {name}", "", *(module.__doc__ or "").strip().splitlines(), "", *table, *map(row, ratios), ""]


def row(ratio: Ratio) -> str:
    """A line of the table."""
    turns = ratio.by_turn
    medians = [in_unit(statistics.median(values), ratio.unit) for values in (ratio.values, ratio.baseline)]
    cells = [
        ratio.what, ratio.against, f"{ratio.median:.3g}", f"{min(turns):.3g} – {max(turns):.3g}", str(len(turns)),
        " / ".join(medians), ratio.goal,
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def in_unit(value: float, unit: str) -> str:
    """A value with its unit; of seconds that one which gives it digits before the point."""
    if unit == "s" and value < 1:
        value, unit = (1e3 * value, "ms") if value >= 1e-3 else (1e6 * value, "µs")
    return f"{value:.3g} {unit}"


def cpu_model() -> str:
    """The processor's name."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    main()
