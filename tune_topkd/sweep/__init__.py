"""What a person does with a sweep, as Python; it prints nothing.

`Sweep` is the whole of it for a caller, `Callback` what may watch. Inside: `workspace` knows the runs folder, `preflight`
finds what is wrong before anything is spent, `prepare` has ready what trials share, `driver` is a process's turn at a sweep,
`maintenance` audits one and completes MLflow, `single` trains one config without a sweep.
"""

from tune_topkd.sweep.api import Status
from tune_topkd.sweep.api import Sweep
from tune_topkd.sweep.callbacks import Callback
from tune_topkd.sweep.callbacks import Kind
from tune_topkd.sweep.maintenance import audit
from tune_topkd.sweep.maintenance import audit_sweep
from tune_topkd.sweep.maintenance import track
from tune_topkd.sweep.register import registered
from tune_topkd.sweep.result import Gain
from tune_topkd.sweep.result import Result
from tune_topkd.sweep.workspace import Workspace

__all__ = [
    "Callback",
    "Gain",
    "Kind",
    "Result",
    "Status",
    "Sweep",
    "Workspace",
    "audit",
    "audit_sweep",
    "registered",
    "track",
]
