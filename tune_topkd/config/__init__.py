"""All that a search-space YAML may say, as pydantic models, and the one error for what it may not.

A YAML is read by `load_config`, which reports every problem it finds at once: file, key, value, rule, known choices.
What needs a look at data, networks or losses (class counts, model names) is checked by the command line's preflight.

Inside: `sections` are the models, `choices` what they choose by name, `rules` what holds between their fields, `validation`
turns all into `ConfigError`, `files` reads and writes YAML, with `extends:` and `--set`, `schema` tells editors what may
stand in one.
"""

from tune_topkd.config.choices import METHODS
from tune_topkd.config.choices import SAMPLERS
from tune_topkd.config.choices import SCHEDULERS
from tune_topkd.config.choices import ChoiceConfig
from tune_topkd.config.choices import Method
from tune_topkd.config.choices import SamplerConfig
from tune_topkd.config.choices import SchedulerConfig
from tune_topkd.config.errors import ConfigError
from tune_topkd.config.errors import Override
from tune_topkd.config.errors import Problem
from tune_topkd.config.errors import unknown_choice
from tune_topkd.config.files import config_from
from tune_topkd.config.files import dump_config
from tune_topkd.config.files import load_config
from tune_topkd.config.files import load_pair
from tune_topkd.config.files import new_config
from tune_topkd.config.files import pair_from
from tune_topkd.config.files import parse_set
from tune_topkd.config.files import read_yaml
from tune_topkd.config.placement import placements
from tune_topkd.config.placement import value_at
from tune_topkd.config.placement import what
from tune_topkd.config.placement import without
from tune_topkd.config.rules import budget_problems
from tune_topkd.config.schema import json_schema
from tune_topkd.config.sections import AUTO
from tune_topkd.config.sections import BASELINE_SPACES
from tune_topkd.config.sections import DEFAULTS
from tune_topkd.config.sections import EFFECTS
from tune_topkd.config.sections import INTEGER_PARAMETERS
from tune_topkd.config.sections import LARGEST_SEED
from tune_topkd.config.sections import NO_FILES
from tune_topkd.config.sections import OBJECTIVE
from tune_topkd.config.sections import OBJECTIVE_EMA
from tune_topkd.config.sections import OBJECTIVE_TEST
from tune_topkd.config.sections import RECIPE_PARAMETERS
from tune_topkd.config.sections import SWEEP_NAME
from tune_topkd.config.sections import AshaConfig
from tune_topkd.config.sections import AugmentConfig
from tune_topkd.config.sections import BaselinesConfig
from tune_topkd.config.sections import DataConfig
from tune_topkd.config.sections import EmaConfig
from tune_topkd.config.sections import FinalistsConfig
from tune_topkd.config.sections import ModelConfig
from tune_topkd.config.sections import PairConfig
from tune_topkd.config.sections import ParameterRange
from tune_topkd.config.sections import RandAugmentConfig
from tune_topkd.config.sections import RecipeConfig
from tune_topkd.config.sections import RelativeConfig
from tune_topkd.config.sections import Scalar
from tune_topkd.config.sections import SharedFiles
from tune_topkd.config.sections import StudentConfig
from tune_topkd.config.sections import SweepConfig
from tune_topkd.config.sections import SweepSettings
from tune_topkd.config.sections import TeacherConfig
from tune_topkd.config.sections import TrialConfig
from tune_topkd.config.sections import loss_part
from tune_topkd.config.sections import recipe_part
from tune_topkd.config.sections import weight_of_effect
from tune_topkd.config.validation import validated

__all__ = [
    "AUTO",
    "BASELINE_SPACES",
    "DEFAULTS",
    "EFFECTS",
    "INTEGER_PARAMETERS",
    "LARGEST_SEED",
    "METHODS",
    "NO_FILES",
    "OBJECTIVE",
    "OBJECTIVE_EMA",
    "OBJECTIVE_TEST",
    "RECIPE_PARAMETERS",
    "SAMPLERS",
    "SCHEDULERS",
    "SWEEP_NAME",
    "AshaConfig",
    "AugmentConfig",
    "BaselinesConfig",
    "ChoiceConfig",
    "ConfigError",
    "DataConfig",
    "EmaConfig",
    "FinalistsConfig",
    "Method",
    "ModelConfig",
    "Override",
    "PairConfig",
    "ParameterRange",
    "Problem",
    "RandAugmentConfig",
    "RecipeConfig",
    "RelativeConfig",
    "SamplerConfig",
    "Scalar",
    "SchedulerConfig",
    "SharedFiles",
    "StudentConfig",
    "SweepConfig",
    "SweepSettings",
    "TeacherConfig",
    "TrialConfig",
    "budget_problems",
    "config_from",
    "dump_config",
    "json_schema",
    "load_config",
    "load_pair",
    "loss_part",
    "new_config",
    "pair_from",
    "parse_set",
    "placements",
    "read_yaml",
    "recipe_part",
    "unknown_choice",
    "validated",
    "value_at",
    "weight_of_effect",
    "what",
    "without",
]
