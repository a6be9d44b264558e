"""After a sweep: does all that is kept of it agree?"""

from pathlib import Path

from tune_topkd.config import SweepConfig
from tune_topkd.execution.checkpoints import checkpoint_findings
from tune_topkd.ledger import LEDGER_FILE
from tune_topkd.ledger import LedgerError
from tune_topkd.ledger import read_events
from tune_topkd.search import ChoiceError
from tune_topkd.search import audit_decisions


def audit_sweep(config: SweepConfig, folder: Path) -> list[str]:
    """Check the ledger and the checkpoints of a sweep that no process drives at the moment.

    Args:
        config: the sweep's frozen config.
        folder: the sweep's.

    Returns:
        What is wrong, a line each; empty if nothing is.
    """
    try:
        findings, state = audit_decisions(config, read_events(folder / LEDGER_FILE)[0])
    except (ChoiceError, LedgerError) as error:
        return [str(error)]
    return findings + list(checkpoint_findings(state, folder))
