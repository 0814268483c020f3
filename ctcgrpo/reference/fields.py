"""The fields of recipes and of the other YAML files, as their typed sections declare them: names, types, ranges, defaults, meaning.

Nothing is written down here: the JSON schema of each section (pydantic) is the source.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, get_origin

from ctcgrpo.audit.commands import Kinds
from ctcgrpo.errors import RecipeError
from ctcgrpo.experiments.spec import Sweep
from ctcgrpo.factory.config import FactoryConfig
from ctcgrpo.run.recipe import Recipe
from ctcgrpo.simulator.config import SimulatorConfig
from ctcgrpo.util.naming import did_you_mean, nearest
from ctcgrpo.util.sections import Section, section_type

RECIPE = "recipe"
FILES: Mapping[str, tuple[type[Section], str]] = {
    RECIPE: (Recipe, "recipes/*.yaml"),
    "simulator-config": (SimulatorConfig, "configs/simulator/*.yaml"),
    "factory-config": (FactoryConfig, "configs/factory/*.yaml"),
    "sweep": (Sweep, "configs/sweeps/*.yaml"),
    "audit-credits": (Kinds, "ctcgrpo audit --credits FILE"),
}
"""By the name that `ctcgrpo fields` takes: the section that a whole file is, and where such files are."""


@dataclass(frozen=True, slots=True)
class Field:
    """One field. `path` as in the file, `key` without the marks of lists ([]) and names (NAME); `default` as YAML; `option` is its
    name in CTCGRPOConfig where it is an option of the trainer."""

    path: str
    key: str
    allowed: str
    default: str
    meaning: str
    option: str = ""


@dataclass(frozen=True, slots=True)
class Fields:
    """A section with its own fields, without those of the sections in it; `note` says where it may be absent or repeated."""

    path: str
    key: str
    meaning: str
    note: str
    fields: tuple[Field, ...]


def sections_of(file: str) -> list[Fields]:
    """All sections of a kind of file (a name of FILES), outermost first."""
    return list(_walk(FILES[file][0], path="", key="" if file == RECIPE else file, note=""))


def select(name: str | None) -> tuple[str, list[Fields]]:
    """The kind of file and the sections that a name means: None or "recipe" for all of a recipe, another kind of file, a section
    with the sections in it, or one field. Raises RecipeError for a name that there is not, with the nearest ones."""
    if name is None or name in FILES:
        return name or RECIPE, sections_of(name or RECIPE)
    keys: set[str] = set(FILES)
    for file in FILES:
        sections = sections_of(file)
        if found := [s for s in sections if s.key == name or s.key.startswith(f"{name}.")]:
            return file, found
        for section in sections:
            if one := tuple(field for field in section.fields if field.key == name):
                return file, [replace(section, fields=one)]
        keys |= {s.key for s in sections if s.key} | {field.key for s in sections for field in s.fields}
    raise RecipeError(f"unknown section or field {name!r}; {_suggestion(name, keys)}")


def _suggestion(name: str, keys: set[str]) -> str:
    """Names that end so, the nearest name, or the sections."""
    if ends := sorted(key for key in keys if key.endswith(f".{name}")):
        return f"did you mean {' or '.join(ends)}?"
    if nearest(name, keys) is None and (last := nearest(name, {key.rpartition(".")[2] for key in keys})):
        return _suggestion(last, keys)
    outermost = {key for key in keys if "." not in key} if nearest(name, keys) is None else keys
    return did_you_mean(name, outermost)


def _walk(model: type[Section], *, path: str, key: str, note: str) -> Iterator[Fields]:
    schema = model.model_json_schema()
    own, below = [], []
    for name, field in model.model_fields.items():
        here, its_key = f"{path}.{name}".removeprefix("."), f"{key}.{name}".removeprefix(".")
        section = section_type(field.annotation)
        if section is None:
            field_schema = schema["properties"][name]
            default = "required" if field.is_required() else json.dumps(field_schema.get("default"), ensure_ascii=False)
            kind = allowed(field_schema, schema.get("$defs", {}))
            own.append(Field(here, its_key, kind, default, field.description or "", field_schema.get("option", "")))
            continue
        assert issubclass(section, Section)
        notes = ["required"] if field.is_required() else []
        if get_origin(field.annotation) is dict:
            here, notes = f"{here}.NAME", [*notes, "one for each name"]
        elif get_origin(field.annotation) is tuple:
            here, notes = f"{here}[]", [*notes, "a list: one for each entry"]
        elif not field.is_required() and field.default is None:
            notes = ["absent by default"]
        below.append(_walk(section, path=here, key=its_key, note="; ".join(notes)))
    yield Fields(path, key, " ".join((model.__doc__ or "").split()), note, tuple(own))
    for sections in below:
        yield from sections


_BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


def allowed(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    """What a JSON schema admits, in words: type, choices, range."""
    if "$ref" in schema:
        return allowed(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    if "enum" in schema:
        return f"one of {', '.join(map(str, schema['enum']))}"
    if "const" in schema:
        return f"always {schema['const']}"
    if "anyOf" in schema:
        options = [allowed(option, definitions) for option in schema["anyOf"]]
        return ", or ".join(dict.fromkeys(o for o in options if o != "integer" or "number" not in options))
    kind = schema.get("type")
    if kind in ("integer", "number"):
        bounds = ", ".join(f"{sign} {schema[name]}" for name, sign in _BOUNDS.items() if name in schema)
        return f"{kind} {bounds}".strip()
    if kind == "array":
        if "prefixItems" in schema:
            items = [allowed(item, definitions) for item in schema["prefixItems"]]
            return f"list of {len(items)}: {', '.join(items)}"
        return f"list{_least(schema, 'minItems')} of {allowed(schema['items'], definitions)}"
    if kind == "object":
        return _mapping(schema, definitions)
    if kind == "string" and "pattern" in schema:
        return f"text that matches {schema['pattern']}"
    if kind == "string" and schema.get("format") == "path":
        return "path"
    return {"string": "text", "boolean": "true or false", "null": "null"}.get(str(kind), "any value")


def _mapping(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    if "properties" in schema:  # a record of its own
        return str(schema["title"])
    names = allowed(schema["propertyNames"], definitions) if "propertyNames" in schema else "any name"
    values = schema.get("additionalProperties")
    values_of = allowed(values, definitions) if isinstance(values, Mapping) else "any value"
    return f"mapping{_least(schema, 'minProperties')} of {names} to {values_of}"


def _least(schema: Mapping[str, Any], name: str) -> str:
    return f" ({schema[name]} or more)" if schema.get(name) else ""
