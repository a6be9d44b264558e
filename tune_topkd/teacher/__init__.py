"""The teacher and its logits.

Inside: `training` trains a teacher once and keeps it under a content hash, or takes a given checkpoint; `network` runs it;
`bank` caches its logits on the disk; `logits` gives a training its teacher's logits, from the bank or from the network.
"""

from tune_topkd.teacher.bank import BankSize
from tune_topkd.teacher.bank import LogitBank
from tune_topkd.teacher.bank import StoredBank
from tune_topkd.teacher.bank import bank_path
from tune_topkd.teacher.bank import has_room
from tune_topkd.teacher.bank import stored_banks
from tune_topkd.teacher.logits import TeacherLogits
from tune_topkd.teacher.logits import bank_file
from tune_topkd.teacher.logits import bank_size
from tune_topkd.teacher.logits import fill_bank
from tune_topkd.teacher.logits import in_config
from tune_topkd.teacher.logits import teacher_identity
from tune_topkd.teacher.network import TeacherError
from tune_topkd.teacher.network import TeacherNetwork
from tune_topkd.teacher.training import WEIGHTS_NAME
from tune_topkd.teacher.training import Teacher
from tune_topkd.teacher.training import ensure_teacher
from tune_topkd.teacher.training import load_teacher
from tune_topkd.teacher.training import teacher_key

__all__ = [
    "WEIGHTS_NAME",
    "BankSize",
    "LogitBank",
    "StoredBank",
    "Teacher",
    "TeacherError",
    "TeacherLogits",
    "TeacherNetwork",
    "bank_file",
    "bank_path",
    "bank_size",
    "ensure_teacher",
    "fill_bank",
    "has_room",
    "in_config",
    "load_teacher",
    "stored_banks",
    "teacher_identity",
    "teacher_key",
]
