"""The JSON Schema of a search-space YAML, by which an editor completes keys, tells what they mean and marks mistakes."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from tune_topkd.config.choices import SAMPLERS
from tune_topkd.config.choices import SCHEDULERS
from tune_topkd.config.choices import ChoiceConfig
from tune_topkd.config.choices import SamplerConfig
from tune_topkd.config.choices import SchedulerConfig
from tune_topkd.config.files import EXTENDS
from tune_topkd.config.sections import ParameterRange
from tune_topkd.config.sections import PlateauConfig
from tune_topkd.config.sections import StudentConfig
from tune_topkd.config.sections import SweepConfig

_NULL = {"type": "null"}
_TEXT = {"type": "string"}

BARE_FORMS: Mapping[type[BaseModel], Mapping[str, Any]] = {
    StudentConfig: _TEXT,
    SamplerConfig: {"anyOf": [{"enum": list(SAMPLERS)}, _TEXT]},
    SchedulerConfig: {"anyOf": [{"enum": list(SCHEDULERS)}, _TEXT]},
    PlateauConfig: {"type": "number", "exclusiveMinimum": 0},
    ParameterRange: {"type": "array", "items": {"type": ["boolean", "number", "string"]}, "minItems": 1},
}
"""What may stand for a whole section: a text stands for its name, a number for its points, a list for its choices."""


def json_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a search-space YAML.

    No key is required by it, since a file may leave out what those that it extends say, and the rules between keys are
    not in it: `load_config` holds a file to both.
    """
    schema = SweepConfig.model_json_schema()
    definitions = schema["$defs"]
    for section in (schema, *definitions.values()):
        section.pop("required", None)
    for model, form in BARE_FORMS.items():
        whole = definitions[model.__name__]
        told = {key: whole.pop(key) for key in ("title", "description")}
        if issubclass(model, ChoiceConfig):
            whole["properties"]["name"].update(form)
        definitions[model.__name__] = {**told, "anyOf": [whole, dict(form)]}
    for name in ("space", "loss"):  # a null takes an entry of a parent away
        entries = schema["properties"][name]
        entries.pop("minProperties", None)
        entries["additionalProperties"] = {"anyOf": [entries["additionalProperties"], _NULL]}
    extends = {
        "anyOf": [_TEXT, {"type": "array", "items": _TEXT}],
        "description": "A file, or a list of files, to start from, relative to this one: mappings are merged key by key, "
        "everything else is replaced, and later files win.",
    }
    properties = {EXTENDS: extends, **schema.pop("properties")}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "properties": properties}
