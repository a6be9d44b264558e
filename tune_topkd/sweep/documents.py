"""What people read of a sweep in MLflow: its config, its answer and its report as files, and a description."""

from collections.abc import Callable
from collections.abc import Iterator
from typing import TYPE_CHECKING

from tune_topkd.export import TUNED_FILE
from tune_topkd.export import as_yaml
from tune_topkd.findings import Findings
from tune_topkd.ledger import LEDGER_FILE
from tune_topkd.ledger import read_state
from tune_topkd.sweep.page import REPORT_FILE
from tune_topkd.sweep.page import findings_from
from tune_topkd.sweep.page import page_of
from tune_topkd.sweep.page import plain_command
from tune_topkd.sweep.result import answer
from tune_topkd.sweep.workspace import CONFIG_FILE
from tune_topkd.sweep.workspace import Workspace
from tune_topkd.sweep.workspace import frozen_config
from tune_topkd.sweep.workspace import stopped_as

if TYPE_CHECKING:
    from tune_topkd.tracking import Documents


def author_of(sweep: str, workspace: Workspace) -> "Callable[[bool], Documents]":
    """What makes the documents of a sweep: its config, and, if it is told so, its answer and its report as well.

    The returned function raises `ConfigError` if the config has been changed by hand, and `LedgerError` if the ledger is
    damaged.
    """

    def documents(are_all: bool) -> "Documents":
        from tune_topkd.tracking import Documents

        folder = workspace.folder(sweep)
        files = {CONFIG_FILE: (folder / CONFIG_FILE).read_text()}
        if not are_all:
            return Documents(files)
        state = read_state(folder / LEDGER_FILE)
        config = frozen_config(folder, state)
        found = findings_from(config, state, folder, stopped_as(state), plain_command(workspace))
        if state.ranked():
            files[TUNED_FILE] = as_yaml(answer(config, state))
        return Documents(files | {REPORT_FILE: page_of([found])}, description(found))

    return documents


def without_artifacts(sweep: str, reason: str) -> str:
    """That the sweep's run in MLflow lacks its artifacts, why, and how to send them later."""
    return (
        f"the sweep's config, answer and report are not among MLflow's artifacts: {reason}; `track {sweep}` sends them"
    )


def description(found: Findings) -> str:
    """The answer, what to know before relying on it and how to get it again, as Markdown."""
    from tune_topkd.tracking import SWEEP_NOTE

    return "\n".join([*_description(found), "---", "", SWEEP_NOTE])


def _description(found: Findings) -> Iterator[str]:
    yield from filter(None, [f"**{_escaped(found.lead)}** {_escaped(found.sentence)}".strip(), ""])
    yield ""
    if found.notes:
        yield from ["**Before you rely on it**", ""]
        yield from (f"- **{_escaped(note.title)}.** {_escaped(note.text)}" for note in found.notes)
        yield ""
    if found.commands:
        yield from ["**Reproduce it**", "", "```bash"]
        yield from (line for each in found.commands for line in (f"# {each.purpose}", each.text))
        yield from ["```", ""]


def _escaped(text: str) -> str:
    """A text of any origin, in which nothing is Markdown or HTML."""
    for sign in "\\`*_[]<>":
        text = text.replace(sign, f"\\{sign}")
    return " ".join(text.split())
