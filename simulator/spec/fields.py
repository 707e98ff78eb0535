"""What every field of the contracts shares: frozen models, refused unknown keys, units, descriptions and examples.

The field is the one source of documentation: its description, unit and example appear in the JSON Schema (editor
hovers), in ``docs/fields.md`` and in error messages.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

from simulator import units

T = TypeVar("T")


class Contract(BaseModel):
    """Base of every contract: frozen, closed to unknown keys, finite numbers only."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)


def described(description: str, *, example: Any, unit: str | None = None, default: Any = ..., **bounds: Any) -> Any:
    """Declare a field with its meaning, an example and, where it has one, its unit."""
    if callable(default):
        bounds["default_factory"] = default
    elif default is not ...:
        bounds["default"] = default
    return Field(
        description=description, examples=[example], json_schema_extra={"unit": unit} if unit else None, **bounds
    )


@dataclass(frozen=True)
class Quantity:
    """Reads a text with a unit into SI, and writes it back so that it reads as the same number."""

    dimension: units.Dimension
    title: str
    positive: bool = True

    def read(self, value: object) -> float:
        """Parse a text of this dimension; a bare number only for counts."""
        number = units.parse(value, self.dimension)
        if number < 0 or (self.positive and number == 0):
            bound = "greater than" if self.positive else "at least"
            raise ValueError(f"must be {bound} zero (got {units.shown(value)})")
        return number

    def write(self, value: float) -> str | int | float:
        """Render an SI value with its unit."""
        return units.render(value, self.dimension)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        write = core_schema.plain_serializer_function_ser_schema(self.write)
        return core_schema.no_info_plain_validator_function(self.read, serialization=write)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        example = self.dimension.example
        text = {
            "type": "string",
            "pattern": self.dimension.pattern(),
            "patternErrorMessage": f"Not {self.dimension.name}. Write for example {example}",
            "examples": [example],
        }
        if self.dimension is not units.COUNT:
            return {"title": self.title, **text}
        bound = "exclusiveMinimum" if self.positive else "minimum"
        return {"title": self.title, "anyOf": [{"type": "number", bound: 0}, text]}


Bytes = Annotated[float, Quantity(units.BYTES, "Bytes")]
BytesPerSecond = Annotated[float, Quantity(units.BYTES_PER_S, "BytesPerSecond")]
FlopPerSecond = Annotated[float, Quantity(units.FLOP_PER_S, "FlopPerSecond")]
Seconds = Annotated[float, Quantity(units.SECONDS, "Seconds", positive=False)]
UsdPerHour = Annotated[float, Quantity(units.USD_PER_HOUR, "UsdPerHour", positive=False)]
Watts = Annotated[float, Quantity(units.WATTS, "Watts", positive=False)]
Count = Annotated[float, Quantity(units.COUNT, "Count")]

# Strict: a text such as "1.25" or "yes" is no number and no boolean, and true is not 1.
Fraction = Annotated[float, Field(ge=0, le=1, strict=True, title="Fraction")]
PositiveFraction = Annotated[float, Field(gt=0, le=1, strict=True, title="PositiveFraction")]
ProperFraction = Annotated[float, Field(ge=0, lt=1, strict=True, title="ProperFraction")]
Correlation = Annotated[float, Field(gt=-1, lt=1, strict=True, title="Correlation")]
Sigma = Annotated[float, Field(ge=0, le=20, strict=True, title="Sigma")]
Positive = Annotated[float, Field(gt=0, le=1e30, strict=True, title="Positive")]
NonNegative = Annotated[float, Field(ge=0, le=1e30, strict=True, title="NonNegative")]
Whole = Annotated[int, Field(ge=1, le=10**9, strict=True, title="Whole")]
WholeOrZero = Annotated[int, Field(ge=0, le=10**9, strict=True, title="WholeOrZero")]
Depth = Annotated[int, Field(ge=1, le=10_000, strict=True, title="Depth")]  # every layer is expanded
Flag = Annotated[bool, Field(strict=True)]


def _read_day(value: object) -> object:
    if isinstance(value, date) or (isinstance(value, str) and re.fullmatch(r"\d{4}-\d\d-\d\d", value, re.ASCII)):
        return value
    raise ValueError(f"must be a date such as 2024-12-27 (got {units.shown(value)})")


Day = Annotated[date, BeforeValidator(_read_day)]

Format = Literal["fp32", "tf32", "bf16", "fp16", "fp8", "e5m6", "int8"]

ELEMENT_BYTES: dict[str, float] = {
    "fp32": 4.0,
    "tf32": 4.0,
    "bf16": 2.0,
    "fp16": 2.0,
    # One FP32 scale for each tile of 128 elements, as DeepSeek-V3 quantises (arXiv 2412.19437, section 3.3.2).
    "fp8": 1.0 + 4.0 / 128.0,
    # 12 bits, DeepSeek-V3's format for the inputs of the linear after attention (arXiv 2412.19437, section 3.3.3).
    "e5m6": 1.5,
    "int8": 1.0,
}
"""Bytes of one stored element [format]."""


class Sourced(Contract, Generic[T]):
    """A number with its provenance: where it comes from and how much it can be trusted."""

    value: T = described("The number itself.", example="989.4 TFLOP/s")
    source: str = described("Key of the profile's `sources` table.", example="nvidia-h100")
    kind: Literal["datasheet", "fitted", "measured", "assumed"] = described(
        "How the number was obtained: printed by the vendor, fitted to measurements, measured, or assumed.",
        example="datasheet",
    )
    error: str | None = described(
        "For fitted numbers: the out-of-sample error, in words.", example="6.1 % MAPE on unseen shapes", default=None
    )
    note: str | None = described("What a reader should know.", example="upper end: cold chip, zero data", default=None)


def sourced_numbers(node: object, path: str = "") -> Iterator[tuple[str, Sourced[Any]]]:
    """Every number with a provenance inside a contract, by dotted path; members of a list are called by their name."""
    children: list[tuple[object, object]] = []
    if isinstance(node, Sourced):
        yield path, node
    elif isinstance(node, Contract):
        children = [(name, getattr(node, name)) for name in type(node).model_fields]
    elif isinstance(node, dict):
        children = list(node.items())
    elif isinstance(node, tuple):
        children = [(getattr(value, "name", index), value) for index, value in enumerate(node)]
    for name, value in children:
        yield from sourced_numbers(value, f"{path}.{name}" if path else str(name))
