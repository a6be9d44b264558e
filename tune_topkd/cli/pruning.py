"""The room that the banks of teachers' logits take, given back."""

from collections.abc import Iterator
from typing import Any

from tune_topkd.cli import running
from tune_topkd.cli.terminal import Console
from tune_topkd.config import ConfigError
from tune_topkd.config import SweepConfig
from tune_topkd.config import config_from
from tune_topkd.config import read_yaml


def prune(place: running.Place, console: Console) -> None:
    """Remove the banks that no sweep of the runs folder names, and say which and how large they were.

    Nothing is lost but time: a teacher that is asked again says the same. Teachers stay, also those of no sweep.
    """
    from tune_topkd.teacher import stored_banks

    named = list(_named(place, console))
    kept = freed = 0
    for bank in stored_banks(place.runs / "teachers"):
        if any(all(bank.content.get(name) == value for name, value in sweep.items()) for sweep in named):
            kept += bank.bytes
            continue
        try:
            bank.remove()
        except OSError as error:
            _say(console, f"note: {bank.path} is left there: {error.strerror or error}", style="yellow")
            continue
        freed += bank.bytes
        _say(console, f"removed {_gigabytes(bank.bytes)}: {bank.path}")
    _say(console, f"banks: {_gigabytes(freed)} removed, {_gigabytes(kept)} kept for the sweeps in {place.runs}")


def _named(place: running.Place, console: Console) -> Iterator[dict[str, Any]]:
    """What each sweep says of the bank that it uses."""
    from tune_topkd.teacher import in_config

    for sweep in place.sweeps():
        path = place.folder(sweep) / running.CONFIG_FILE
        try:
            config = config_from(read_yaml(path), str(path))
        except ConfigError as error:
            _say(
                console, f"note: {sweep}: its bank is not known, and is asked for again by a resume: {error}", "yellow"
            )
            continue
        if isinstance(config, SweepConfig) and config.teacher is not None:
            yield in_config(config.data, config.teacher.model, config.sweep.seed)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:,.3f} GB"


def _say(console: Console, text: str, style: str | None = None) -> None:
    console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)
