# SPDX-License-Identifier: Apache-2.0
"""Kinds of things that grow by one record: a precision, an aggregation method, a start rule."""

from collections.abc import Iterator
from typing import Any, ClassVar, Self, TypeVar

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, SchemaSerializer, core_schema

T = TypeVar("T")


class Kind(type):
    """The class of a kind; iterating over it gives its records in the order of their registration."""

    known: dict[str, Any]

    def __iter__(cls: type[T]) -> Iterator[T]:
        return iter(list(cls.known.values()))  # type: ignore[attr-defined]


class Record(str, metaclass=Kind):
    """One record of a kind: equal to its name, and written as it; creating it registers it.

    A kind is a frozen dataclass without `eq` whose first field is `name`. In a model only registered names
    are valid. Copies and pickles are the record itself.
    """

    known: ClassVar[dict[str, Any]]
    # In a default pydantic would write the fields of a dataclass.
    __pydantic_serializer__: ClassVar[SchemaSerializer] = SchemaSerializer(
        core_schema.any_schema(serialization=core_schema.to_string_ser_schema())
    )
    name: str

    def __init_subclass__(cls) -> None:
        cls.known = {}

    def __new__(cls, name: str, *_: object, **__: object) -> Self:
        """Create the name."""
        return super().__new__(cls, name)

    def __post_init__(self) -> None:
        if self.name in self.known:
            raise ValueError(f"{self.name} is registered twice")
        self.known[self.name] = self

    @classmethod
    def of(cls, name: object) -> Self:
        """Return the record of a name; raises ValueError where there is none."""
        found = cls.known.get(name) if isinstance(name, str) else None
        if found is None:
            *names, last = (repr(name) for name in cls.known)
            wanted = f"{', '.join(names)} or {last}"
            raise PydanticCustomError("enum", "Input should be {expected}", {"expected": wanted})
        return found  # type: ignore[no-any-return]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).of, (str(self),)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Return a schema that takes a registered name and gives its record."""
        return core_schema.no_info_plain_validator_function(
            cls.of, ref=cls.__qualname__, serialization=core_schema.to_string_ser_schema()
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Return the names registered so far."""
        meaning = (cls.__doc__ or "").partition("\n\n")[0]
        return {"type": "string", "enum": list(cls.known), "description": meaning}
