"""What to try next and what to stop: all of Optuna, and the one class of Ray's that decides.

`search` takes every decision and writes it into the ledger first; `samplers` propose, `schedulers` stop, `choosing` has
those that a config names, `failing` sees when all trials fail alike, `audit` takes every decision again. `conformance`
runs a sampler or a scheduler from outside against what they must hold. Nothing here knows workers.
"""

from tune_topkd.search.audit import audit_decisions
from tune_topkd.search.choosing import ChoiceError
from tune_topkd.search.choosing import choice_problems
from tune_topkd.search.choosing import sampler_of
from tune_topkd.search.choosing import scheduler_of
from tune_topkd.search.samplers import CmaesSampler
from tune_topkd.search.samplers import GpSampler
from tune_topkd.search.samplers import QmcSampler
from tune_topkd.search.samplers import RandomSampler
from tune_topkd.search.samplers import Sampler
from tune_topkd.search.samplers import SamplerFactory
from tune_topkd.search.samplers import TpeSampler
from tune_topkd.search.schedulers import Asha
from tune_topkd.search.schedulers import Scheduler
from tune_topkd.search.search import Search

__all__ = [
    "Asha",
    "ChoiceError",
    "CmaesSampler",
    "GpSampler",
    "QmcSampler",
    "RandomSampler",
    "Sampler",
    "SamplerFactory",
    "Scheduler",
    "Search",
    "TpeSampler",
    "audit_decisions",
    "choice_problems",
    "sampler_of",
    "scheduler_of",
]
