"""The room that the banks of teachers' logits take, given back."""

from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from typing import Any

from tune_topkd.config import ConfigError
from tune_topkd.config import SweepConfig
from tune_topkd.config import config_from
from tune_topkd.config import read_yaml
from tune_topkd.sweep.callbacks import Watchers
from tune_topkd.sweep.workspace import CONFIG_FILE
from tune_topkd.sweep.workspace import Workspace


def prune(workspace: Workspace, watchers: Watchers) -> None:
    """Remove the banks that no sweep of the runs folder or store names, and say which and how large they were.

    Nothing is lost but time: the teacher gives the same logits again. Teachers stay, also those of no sweep.

    Raises:
        StoreError: the store refuses.
    """
    from tune_topkd.teacher import stored_banks

    named = list(_named(workspace, watchers))
    kept = freed = 0
    for bank in stored_banks(workspace.teachers):
        if is_named(bank.content, named):
            kept += bank.bytes
            continue
        try:
            bank.remove()
        except OSError as error:
            watchers.note(f"{bank.path} is left there: {error.strerror or error}")
            continue
        freed += bank.bytes
        watchers.info(f"removed {_gigabytes(bank.bytes)}: {bank.path}")
    if (remote := workspace.remote) is not None:
        for stored in list(remote.banks()):
            if not is_named(stored.content, named):
                remote.remove_bank(stored)
                watchers.info(f"removed {_gigabytes(stored.bytes)}: {remote.store.at(stored.name)}")
    watchers.info(f"banks: {_gigabytes(freed)} removed, {_gigabytes(kept)} kept for the sweeps in {workspace.place}")


def _named(workspace: Workspace, watchers: Watchers) -> Iterator[Mapping[str, Any]]:
    """What each sweep says of the banks that it uses."""
    for sweep in workspace.sweeps():
        path = workspace.folder(sweep) / CONFIG_FILE
        try:
            config = config_from(read_yaml(path), str(path))
        except ConfigError as error:
            watchers.note(f"{sweep}: its bank is not known, and is filled again by a resume: {error}")
            continue
        if isinstance(config, SweepConfig):
            yield from banks_of(config)


def banks_of(config: SweepConfig) -> Iterator[Mapping[str, Any]]:
    """What a sweep says of the banks that it uses, as far as a config says it."""
    from tune_topkd.teacher import in_config

    if config.teacher is not None:
        fresh = config.sweep.finalists.seeds if config.sweep.finalists else 0
        for seed in range(config.sweep.seed, config.sweep.seed + fresh + 1):
            yield in_config(config.data, config.teacher.model, seed)


def is_named(content: Mapping[str, Any], named: Iterable[Mapping[str, Any]]) -> bool:
    """Whether what is in a bank is what a sweep says of one of those that it uses."""
    return any(all(content.get(name) == value for name, value in sweep.items()) for sweep in named)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:,.3f} GB"
