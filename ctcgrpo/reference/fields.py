"""The fields of recipes and of the other YAML files, as their typed sections declare them: names, types, ranges, defaults, meaning.

Nothing is written down here: the JSON schema of each section (pydantic) is the source.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_origin

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
}
"""By the name that `ctcgrpo fields` takes: the section that a whole file is, and where such files are."""


@dataclass(frozen=True, slots=True)
class Field:
    """One field. `path` as in the file, `key` without the marks of lists ([]) and names (NAME); `default` as YAML."""

    path: str
    key: str
    allowed: str
    default: str
    meaning: str


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
    model, _ = FILES[file]
    return list(_walk(model, path="", key="" if file == RECIPE else file, note=""))


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
                return file, [Fields(section.path, section.key, section.meaning, section.note, one)]
        keys |= {s.key for s in sections if s.key} | {field.key for s in sections for field in s.fields}
    raise RecipeError(f"no section or field is called {name!r}; {_suggestion(name, keys)}")


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
    definitions = schema.get("$defs", {})
    own, below = [], []
    for name, field in model.model_fields.items():
        here = {"path": _joined(path, name), "key": _joined(key, name)}
        said = schema["properties"][name]
        section = section_type(field.annotation)
        if section is None:
            default = "required" if field.is_required() else json.dumps(said.get("default"), ensure_ascii=False)
            own.append(Field(**here, allowed=allowed(said, definitions), default=default, meaning=field.description or ""))
            continue
        if get_origin(field.annotation) is dict:
            where, told = f"{here['path']}.NAME", "one for each name"
        elif get_origin(field.annotation) is tuple:
            where, told = f"{here['path']}[]", "a list: one for each entry"
        else:
            optional = not field.is_required() and field.default is None
            where, told = here["path"], "absent by default" if optional else ""
        if field.is_required():
            told = f"required; {told}" if told else "required"
        below.append((section, where, here["key"], told))
    meaning = " ".join((model.__doc__ or "").split())
    yield Fields(path, key, meaning, note, tuple(own))
    for section, where, name, told in below:
        assert issubclass(section, Section)
        yield from _walk(section, path=where, key=name, note=told)


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def allowed(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    """What a JSON schema admits, in words: type, choices, range."""
    if "$ref" in schema:
        return allowed(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    if "enum" in schema:
        return f"one of {', '.join(map(str, schema['enum']))}"
    if "const" in schema:
        return f"always {schema['const']}"
    if "anyOf" in schema:
        return _either([allowed(option, definitions) for option in schema["anyOf"]])
    kind = schema.get("type")
    if kind in ("integer", "number"):
        return f"{kind}{_range(schema)}"
    if kind == "array":
        return _array(schema, definitions)
    if kind == "object":
        return _mapping(schema, definitions)
    if kind == "string" and "pattern" in schema:
        return f"text that matches {schema['pattern']}"
    if kind == "string" and schema.get("format") == "path":
        return "path"
    return {"string": "text", "boolean": "true or false", "null": "null"}.get(str(kind), "any value")


def _either(options: list[str]) -> str:
    if {"integer", "number"} <= set(options):
        options = [option for option in options if option != "integer"]
    return ", or ".join(dict.fromkeys(options))


def _range(schema: Mapping[str, Any]) -> str:
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {schema[name]}" for name, sign in signs.items() if name in schema]
    return f" {', '.join(bounds)}" if bounds else ""


def _array(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    if "prefixItems" in schema:
        return f"list of {len(schema['prefixItems'])}: {', '.join(allowed(item, definitions) for item in schema['prefixItems'])}"
    least = f" ({schema['minItems']} or more)" if schema.get("minItems") else ""
    return f"list{least} of {allowed(schema['items'], definitions)}"


def _mapping(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    if "properties" in schema:  # a record of its own
        return str(schema["title"])
    names = allowed(schema["propertyNames"], definitions) if "propertyNames" in schema else "any name"
    values = schema.get("additionalProperties")
    held = allowed(values, definitions) if isinstance(values, Mapping) else "any value"
    least = f" ({schema['minProperties']} or more)" if schema.get("minProperties") else ""
    return f"mapping{least} of {names} to {held}"
