"""The answer of a sweep, for other projects.

They need only this and `tune_topkd.loss`:

    from tune_topkd.export import load_tuned_config
    from tune_topkd.loss import build_loss

    tuned = load_tuned_config("tuned.yaml")
    criterion = build_loss(tuned.method, tuned.loss)
"""

from tune_topkd.export.bundles import BUNDLES
from tune_topkd.export.folders import write_files
from tune_topkd.export.student import STUDENT_FILE
from tune_topkd.export.student import STUDENT_WRITERS
from tune_topkd.export.student import Student
from tune_topkd.export.student import StudentError
from tune_topkd.export.tuned import SCHEMA_FILE
from tune_topkd.export.tuned import SCHEMA_VERSION
from tune_topkd.export.tuned import TUNED_FILE
from tune_topkd.export.tuned import BaselineEvidence
from tune_topkd.export.tuned import Evidence
from tune_topkd.export.tuned import FreshEvidence
from tune_topkd.export.tuned import GainEvidence
from tune_topkd.export.tuned import NoAnswerError
from tune_topkd.export.tuned import TestEvidence
from tune_topkd.export.tuned import TunedConfig
from tune_topkd.export.tuned import TunedTeacher
from tune_topkd.export.tuned import json_schema
from tune_topkd.export.tuned import load_tuned_config
from tune_topkd.export.tuned import tuned_config
from tune_topkd.export.writers import WRITERS
from tune_topkd.export.writers import as_json
from tune_topkd.export.writers import as_python
from tune_topkd.export.writers import as_yaml

__all__ = [
    "BUNDLES",
    "SCHEMA_FILE",
    "SCHEMA_VERSION",
    "STUDENT_FILE",
    "STUDENT_WRITERS",
    "TUNED_FILE",
    "WRITERS",
    "BaselineEvidence",
    "Evidence",
    "FreshEvidence",
    "GainEvidence",
    "NoAnswerError",
    "Student",
    "StudentError",
    "TestEvidence",
    "TunedConfig",
    "TunedTeacher",
    "as_json",
    "as_python",
    "as_yaml",
    "json_schema",
    "load_tuned_config",
    "tuned_config",
    "write_files",
]
