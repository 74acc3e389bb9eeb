"""The base of every section of a configuration, and the kinds of numbers in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

Meaning = Mapping[str, tuple[Callable[[Any], bool], str, str]]
"""An option that has no effect without others -> whether it has an effect; else why not, and what would give it one."""


class Section(BaseModel):
    """Base of every section: frozen; an unknown key is an error, and so is a value without effect by ``meaning``."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    meaning: ClassVar[Meaning] = {}
    """Options that are refused where they have no effect, unless they have their default."""

    @field_validator("*", mode="after")
    @classmethod
    def _is_text(cls, value: Any) -> Any:
        """A configuration is stored and sent as UTF-8, which knows no halves of surrogate pairs."""
        if isinstance(value, str) and any("\ud800" <= char <= "\udfff" for char in value):
            raise ValueError("it is not UTF-8")
        return value

    @model_validator(mode="after")
    def _has_an_effect(self) -> Self:
        for name, (has_effect, why, fix) in self.meaning.items():
            value, default = getattr(self, name), type(self).model_fields[name].default
            if value != default and not has_effect(self):
                raise ValueError(f"{name}={value} has no effect here: {why}; {fix}, or leave it out")
        return self


LARGEST = 2**31 - 1
"""Of what is counted: more steps, experts or hidden units than anybody has, and their products are still sizes."""


def _could_be_a_path(text: str) -> str:
    if not text or "\0" in text:
        raise ValueError(f"{'an empty text' if not text else 'a text with a null character'} is not a path")
    return text


Positive = Annotated[int, Field(gt=0, le=LARGEST)]
Count = Annotated[int, Field(ge=0, le=LARGEST)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]
PathText = Annotated[str, AfterValidator(_could_be_a_path)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
