"""Reading a recipe file: overrides, `extends`, and messages that name file, field and value.

A recipe file is valid YAML and valid Python (see recipes/tiny.yaml). Python reads one string, then the call that runs the
recipe. YAML reads the opening of that string as a key named `'`, which the loader drops. `extends: other.yaml` (relative to
the file) inherits the fields of that recipe; fields of this one override them.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ctcgrpo.errors import RecipeError
from ctcgrpo.run.recipe import Recipe
from ctcgrpo.util.importing import load_object
from ctcgrpo.util.naming import did_you_mean, quoted
from ctcgrpo.util.sections import named_value, parse_mapping, read_text, refuse_unknown, validated

_PYTHON_KEY = "'"
_EXTENDS = "extends"  # the key that names the recipe whose fields this one inherits
_OWN_VARIABLES = "CTCGRPO_"
_OPENING, _CLOSING = "'''':", "# '''; from ctcgrpo.cli import run_recipe"


def load_recipe(file: str | Path, overrides: Sequence[str] = (), *, changes: Sequence[str] = ()) -> Recipe:
    """Read, override, validate. Raises RecipeError that names file, field, value and what is expected.

    `overrides` come from the command line; `changes` have the same form and come from a file (a sweep). What
    simulator.token_env names is sent to simulator.url, so a file may only name variables that begin with CTCGRPO_; a user may
    name another one on the command line.
    """
    path = Path(file)
    layers = _layers(path)
    data, changed, typed = dict[str, Any](), dict[str, Any](), dict[str, Any]()
    for _, fields in reversed(layers):
        data = _merged(data, fields)
    for change in [*changes, *overrides]:
        _apply(data, change)
        _apply(changed, change)
    for override in overrides:
        _apply(typed, override)

    def origin(field: Sequence[str | int]) -> Path:
        """The file that sets a field; `path` for a field that no file sets, or that was overridden."""
        if _has(changed, field):
            return path
        return next((file for file, fields in layers if _has(fields, field)), path)

    if isinstance(own := data.get("environment"), dict):
        own.setdefault("folder", str(origin(("environment", "factory")).parent))
    recipe = validated(data, Recipe, path, origin)
    for field, named in recipe.own_functions().items():
        file = origin(("credit", field))
        load_object(named, f"{file}: credit.{field}", file.parent)
    name, file = recipe.simulator.token_env, origin(("simulator", "token_env"))
    if not name.startswith(_OWN_VARIABLES) and "token_env" not in typed.get("simulator", {}):
        raise RecipeError(
            f"{file}: simulator.token_env = {name!r}; expected a name that begins with {_OWN_VARIABLES}, since the value of the "
            f"variable is sent to simulator.url; to allow {name}, pass simulator.token_env={name} on the command line"
        )
    return recipe


def resolved_recipe(file: str | Path) -> Recipe:
    """The recipe in a run's folder, for readers of the run. Does not check simulator.token_env: readers send nothing to the
    simulator. Raises RecipeError as `load_recipe` does."""
    path = Path(file)
    return validated(parse_mapping(read_text(path, "recipe"), path, Recipe, "recipe"), Recipe, path)


def overrides(chosen: Mapping[str, Any]) -> list[str]:
    """Values as overrides of a recipe, as YAML reads them."""
    return [f"{name}={v if isinstance(v, str) else json.dumps(v, default=str)}" for name, v in chosen.items()]


def _layers(path: Path, extending: tuple[Path, ...] = ()) -> list[tuple[Path, dict[str, Any]]]:
    """The recipe's own fields, then those of the recipe that it extends, and so on, each with its file. Raises RecipeError for
    unknown fields, a missing file, and recipes that extend each other."""
    chain = (*extending, path)
    if path.resolve() in [file.resolve() for file in extending]:
        shown = " -> ".join(str(file) for file in chain)
        raise RecipeError(f"{chain[-2]}: {_EXTENDS}: {shown}; expected a recipe that does not extend this one")
    fields = _parse(path)
    base = fields.pop(_EXTENDS, None)
    refuse_unknown(fields, Recipe, str(path))
    if base is None:
        return [(path, fields)]
    where = f"{path}: {_EXTENDS} = {quoted(base)}"
    if not isinstance(base, str):
        raise RecipeError(f"{where}; expected a recipe file, relative to this one")
    file = path.parent / base
    if not file.is_file():
        near = [f.name for f in file.parent.glob("*.yaml")]
        raise RecipeError(f"{where}: no such file {file}; {did_you_mean(file.name, near)}")
    return [(path, fields), *_layers(file, chain)]


def _has(fields: Any, field: Sequence[str | int]) -> bool:
    """Whether a mapping of sections sets a field, or has a value that is no section on the way to it."""
    for name in field:
        if not isinstance(fields, dict):
            break
        if name not in fields:
            return False
        fields = fields[name]
    return True


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Sections field by field; lists and values whole."""
    both = {k: _merged(base[k], v) for k, v in over.items() if isinstance(v, dict) and isinstance(base.get(k), dict)}
    return {**base, **over, **both}


def _parse(path: Path) -> dict[str, Any]:
    text = read_text(path, "recipe")
    body = "\n".join(line for line in text.splitlines() if not line.startswith((_OPENING, _CLOSING)))
    if "'''" in body or "\\" in body:
        raise RecipeError(f"{path}: a recipe must contain neither ''' nor a backslash: it is also read as a Python string")
    data = parse_mapping(text, path, Recipe, "recipe")
    data.pop(_PYTHON_KEY, None)
    return data


def _apply(data: dict[str, Any], override: str) -> None:
    name, value = named_value(override, "override", "section.field=value, for example credit.alpha=10")
    *parents, last = name.split(".")
    target = data
    for parent in parents:
        below = target.get(parent)
        if below is None:
            below = target[parent] = {}
        if not isinstance(below, dict):
            raise RecipeError(f"override {quoted(override)}: {quoted(parent)} is not a section")
        target = below
    target[last] = value
