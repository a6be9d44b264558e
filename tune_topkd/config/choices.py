"""What a config chooses by name: of this project, or `package.module:object` of the user's code."""

import re
from typing import Annotated
from typing import Any

from pydantic import AfterValidator
from pydantic import BaseModel
from pydantic import ConfigDict
from pydantic import Field
from pydantic import JsonValue
from pydantic import WithJsonSchema
from pydantic import field_validator
from pydantic import model_validator

from tune_topkd.config.errors import unknown_choice
from tune_topkd.user_code import is_users

METHODS: tuple[str, ...] = ("topkd", "kd", "dkd", "lskd", "kd+topkd", "dkd+topkd", "lskd+topkd", "ce")

SAMPLERS = ("cmaes", "gp", "qmc", "random", "tpe")
"""What may propose the trials, by name."""

ASHA = "asha"

SCHEDULERS = (ASHA,)
"""What may stop trials early, by name."""

_USER_NAME = r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*"
_USER_METHOD = re.compile(rf"{_USER_NAME}(\+topkd)?")


def _known_method(value: str) -> str:
    if value not in METHODS and not _USER_METHOD.fullmatch(value):
        raise ValueError(f"{unknown_choice(value, METHODS)}; or a callable of your own: package.module:loss")
    return value


Method = Annotated[
    str,
    AfterValidator(_known_method),
    WithJsonSchema({"anyOf": [{"enum": list(METHODS)}, {"type": "string", "pattern": f"^{_USER_METHOD.pattern}$"}]}),
]
"""One of `METHODS`, or `package.module:loss`, a callable of the user's; `+topkd` makes either the base of the plug-in."""


class ChoiceConfig(BaseModel):
    """One of several by its name; what else is given goes to it by keyword. A bare name may stand for the whole section."""

    model_config = ConfigDict(
        extra="allow", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
    __pydantic_extra__: dict[str, JsonValue] = Field(init=False)

    name: str
    """Which one; what is given beside it are its options."""

    @property
    def options(self) -> dict[str, JsonValue]:
        """What is given besides the name."""
        return dict(self.__pydantic_extra__)

    @model_validator(mode="before")
    @classmethod
    def _bare_name(cls, value: Any) -> Any:
        if value is None:
            value = "none"  # as people say it, to be told what there is
        return {"name": value} if isinstance(value, str) else value


def _known_choice(value: str, known: tuple[str, ...]) -> str:
    if value not in known and not (re.fullmatch(_USER_NAME, value) and is_users(value)):
        raise ValueError(f"{unknown_choice(value, known)}; or a factory of your own: package.module:factory")
    return value


class SamplerConfig(ChoiceConfig):
    """What proposes the trials: one of this project, or `package.module:factory`, called with axes, seed and options."""

    @field_validator("name")
    @classmethod
    def _known(cls, value: str) -> str:
        return _known_choice(value, SAMPLERS)


class SchedulerConfig(ChoiceConfig):
    """What stops trials early: one of this project, or `package.module:factory`, called with config and options."""

    @field_validator("name")
    @classmethod
    def _known(cls, value: str) -> str:
        if value == "none":
            raise ValueError("is no scheduler; to let every trial run to the end, set sweep.asha to null")
        return _known_choice(value, SCHEDULERS)
