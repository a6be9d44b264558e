"""The ledger: the append-only file that is the truth about a sweep.

Every suggestion, report, decision and end is one line of `ledger.jsonl`, on the disk before it is acted on. All else
(Optuna's study, ASHA's rungs, the MLflow runs, the tables) is a view that can be rebuilt from it.

Inside: `events` are the lines, `state` is what they tell, `finalists` is which trial is the answer, `looks` is what it
gives on the test set, `baselines` is how many trials these have, `endings` is when a search ends early, `log` is the
file, `mirror` is the ledger in a store, `trackers` is who watches.
"""

from tune_topkd.ledger.baselines import baseline_target
from tune_topkd.ledger.baselines import baseline_to_come
from tune_topkd.ledger.baselines import is_searched
from tune_topkd.ledger.endings import CPU_HOURS
from tune_topkd.ledger.endings import EPOCH_SECONDS
from tune_topkd.ledger.endings import GPU_HOURS
from tune_topkd.ledger.endings import Hours
from tune_topkd.ledger.endings import HoursSpent
from tune_topkd.ledger.endings import due_plateau
from tune_topkd.ledger.endings import has_collapsed
from tune_topkd.ledger.endings import is_near_chance
from tune_topkd.ledger.events import FELL_APART
from tune_topkd.ledger.events import LEDGER_VERSION
from tune_topkd.ledger.events import REPEAT
from tune_topkd.ledger.events import REPEATING
from tune_topkd.ledger.events import SEARCH
from tune_topkd.ledger.events import TEST
from tune_topkd.ledger.events import Confirm
from tune_topkd.ledger.events import Content
from tune_topkd.ledger.events import Decision
from tune_topkd.ledger.events import Driver
from tune_topkd.ledger.events import End
from tune_topkd.ledger.events import Event
from tune_topkd.ledger.events import Finalists
from tune_topkd.ledger.events import Header
from tune_topkd.ledger.events import LedgerError
from tune_topkd.ledger.events import Look
from tune_topkd.ledger.events import Plateau
from tune_topkd.ledger.events import Prepared
from tune_topkd.ledger.events import Repeat
from tune_topkd.ledger.events import Report
from tune_topkd.ledger.events import Retry
from tune_topkd.ledger.events import Share
from tune_topkd.ledger.events import Start
from tune_topkd.ledger.events import Stop
from tune_topkd.ledger.events import Suggest
from tune_topkd.ledger.events import TeacherFile
from tune_topkd.ledger.events import TrialContent
from tune_topkd.ledger.events import TrialKey
from tune_topkd.ledger.events import TrialStatus
from tune_topkd.ledger.finalists import Finalist
from tune_topkd.ledger.finalists import Winner
from tune_topkd.ledger.finalists import apart_by_seed
from tune_topkd.ledger.finalists import apart_from_baselines
from tune_topkd.ledger.finalists import baseline_trial
from tune_topkd.ledger.finalists import baseline_trials
from tune_topkd.ledger.finalists import baselines_to_repeat
from tune_topkd.ledger.finalists import different
from tune_topkd.ledger.finalists import finalist_of
from tune_topkd.ledger.finalists import finalist_trials
from tune_topkd.ledger.finalists import finalists
from tune_topkd.ledger.finalists import finalists_done
from tune_topkd.ledger.finalists import finalists_to_repeat
from tune_topkd.ledger.finalists import former_finalists
from tune_topkd.ledger.finalists import fresh_seeds
from tune_topkd.ledger.finalists import repeats_of
from tune_topkd.ledger.finalists import standings
from tune_topkd.ledger.finalists import unrepeated
from tune_topkd.ledger.finalists import winner_of
from tune_topkd.ledger.log import LEDGER_FILE
from tune_topkd.ledger.log import Ledger
from tune_topkd.ledger.log import header_of
from tune_topkd.ledger.log import is_driven
from tune_topkd.ledger.log import read_events
from tune_topkd.ledger.log import read_header
from tune_topkd.ledger.log import read_state
from tune_topkd.ledger.looks import MOST_SEEDS
from tune_topkd.ledger.looks import candidates
from tune_topkd.ledger.looks import confirmation
from tune_topkd.ledger.looks import due_look
from tune_topkd.ledger.looks import has_looked
from tune_topkd.ledger.looks import is_confirmed
from tune_topkd.ledger.looks import is_of_the_answer
from tune_topkd.ledger.looks import largest_seed
from tune_topkd.ledger.looks import measured
from tune_topkd.ledger.looks import measured_done
from tune_topkd.ledger.looks import to_measure
from tune_topkd.ledger.mirror import Mirror
from tune_topkd.ledger.mirror import TakenOverError
from tune_topkd.ledger.state import SweepState
from tune_topkd.ledger.state import TrialRecord
from tune_topkd.ledger.trackers import Tracker
from tune_topkd.ledger.trackers import tell_all

__all__ = [
    "CPU_HOURS",
    "EPOCH_SECONDS",
    "FELL_APART",
    "GPU_HOURS",
    "LEDGER_FILE",
    "LEDGER_VERSION",
    "MOST_SEEDS",
    "REPEAT",
    "REPEATING",
    "SEARCH",
    "TEST",
    "Confirm",
    "Content",
    "Decision",
    "Driver",
    "End",
    "Event",
    "Finalist",
    "Finalists",
    "Header",
    "Hours",
    "HoursSpent",
    "Ledger",
    "LedgerError",
    "Look",
    "Mirror",
    "Plateau",
    "Prepared",
    "Repeat",
    "Report",
    "Retry",
    "Share",
    "Start",
    "Stop",
    "Suggest",
    "SweepState",
    "TakenOverError",
    "TeacherFile",
    "Tracker",
    "TrialContent",
    "TrialKey",
    "TrialRecord",
    "TrialStatus",
    "Winner",
    "apart_by_seed",
    "apart_from_baselines",
    "baseline_target",
    "baseline_to_come",
    "baseline_trial",
    "baseline_trials",
    "baselines_to_repeat",
    "candidates",
    "confirmation",
    "different",
    "due_look",
    "due_plateau",
    "finalist_of",
    "finalist_trials",
    "finalists",
    "finalists_done",
    "finalists_to_repeat",
    "former_finalists",
    "fresh_seeds",
    "has_collapsed",
    "has_looked",
    "header_of",
    "is_confirmed",
    "is_driven",
    "is_near_chance",
    "is_of_the_answer",
    "is_searched",
    "largest_seed",
    "measured",
    "measured_done",
    "read_events",
    "read_header",
    "read_state",
    "repeats_of",
    "standings",
    "tell_all",
    "to_measure",
    "unrepeated",
    "winner_of",
]
