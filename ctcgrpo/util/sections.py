"""Typed sections of a YAML file (recipes, simulator configurations): reading, and messages that name file, field and value."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from ctcgrpo.errors import RecipeError
from ctcgrpo.util.naming import cut, did_you_mean
from ctcgrpo.util.strict_yaml import MAX_CHARACTERS, load_yaml

_LONGEST_MESSAGE = 600  # characters of what a rule says, which may quote a value
_S = TypeVar("_S", bound="Section")


class Section(BaseModel):
    """Frozen, without unknown fields, and strict about numbers. `moved`: what to write in place of fields that there were."""

    moved: ClassVar[Mapping[str, str]] = {}

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, data: Any) -> Any:
        for name, value in data.items() if isinstance(data, Mapping) else ():
            field = cls.model_fields.get(name)
            if isinstance(value, bool) and field is not None and field.annotation in (int, float):
                raise ValueError(f"{name} is {str(value).lower()}; expected a number")
        return data


_OF_SECRETS = re.compile(r"sk_|(?:hf|gsk|ghp|gho|xai|r8|pk|rk|nvapi|pplx|github_pat)_(?=\w{16})|AIza|eyJ")
"""How keys of common providers begin."""


def environment_name(value: str) -> str:
    """For fields that name an environment variable (SKYWORK_API_KEY, my_key); raises ValueError for what may be the secret itself,
    without quoting it: keys begin in known ways, or hold a long run of letters and digits."""
    run = max(map(len, value.split("_")), default=0)
    digits = sum(c.isdigit() for c in value)
    if re.fullmatch(r"[A-Z_][A-Z0-9_]*", value):
        is_name = run < 20 or digits < 4
    else:
        mixed = digits or (value.lower() != value and value.upper() != value)
        is_name = re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", value) is not None
        is_name = is_name and not _OF_SECRETS.match(value) and run < (16 if mixed else 24)
    if not is_name:
        raise ValueError("name an environment variable here, never the secret itself")
    return value


def read_text(path: Path, what: str) -> str:
    """The text of a file. Raises RecipeError for a missing file, with a suggestion, and for one that is not UTF-8."""
    if not path.is_file():
        near = [str(p) for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        hint = did_you_mean(str(path), near) if near else f"no {what}s there"
        raise RecipeError(f"{what} {str(path)!r} not found; {hint}")
    try:
        with path.open(encoding="utf-8") as file:
            return file.read(MAX_CHARACTERS + 1)  # one more than load_yaml takes
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text: {error}") from None


def parse_mapping(text: str, path: Path, model: type[Section], what: str) -> dict[str, Any]:
    """YAML text as a mapping; raises RecipeError for anything else."""
    try:
        data = load_yaml(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(data, dict):
        raise RecipeError(f"{path}: expected a {what}: a mapping of sections ({', '.join(model.model_fields)})")
    return data


def named_value(text: str, what: str, form: str) -> tuple[str, Any]:
    """Name and value of NAME=VALUE, the value parsed as YAML. Raises RecipeError, with `what` it is and the expected `form`."""
    name, sign, value = text.partition("=")
    if not sign or not name:
        raise RecipeError(f"{what} {text[:80]!r}; expected {form}")
    try:
        return name, load_yaml(value)
    except yaml.YAMLError as error:
        reason = getattr(error, "problem", None) or error
        raise RecipeError(f"{what} {text[:80]!r}: the value is not valid YAML: {reason}") from None


def validated(
    data: Mapping[str, Any], model: type[_S], path: Path, origin: Callable[[Sequence[str | int]], Path] | None = None
) -> _S:
    """Raises RecipeError that names file, field, value and what is expected. `origin`: the file of a field, where not all come from
    `path`."""
    refuse_unknown(data, model, str(path))
    try:
        return model.model_validate(data)
    except ValidationError as error:
        file = path if origin is None else origin(error.errors()[0]["loc"])
        raise RecipeError(f"{file}: {_explain(error)}") from None


def refuse_unknown(data: Mapping[str, Any], model: type[BaseModel], file: str, path: str = "") -> None:
    """Raises RecipeError for a field that the model does not have; `path` is that of the section, with a dot at its end."""
    for key, value in data.items():
        field = model.model_fields.get(key)
        if field is None:
            moved: Mapping[str, str] = getattr(model, "moved", {})
            instead = moved.get(str(key)) or did_you_mean(str(key), model.model_fields)
            raise RecipeError(f"{file}: unknown field {cut(f'{path}{key}')}; {instead}")
        section = section_type(field.annotation)
        if section is None:
            continue
        parts: Iterable[tuple[Any, Any]] = [("", value)]
        if get_origin(field.annotation) is dict and isinstance(value, Mapping):  # by a name that is the file's own
            parts = ((f".{k}", part) for k, part in value.items())
        elif isinstance(value, list):
            parts = ((f".{k}", part) for k, part in enumerate(value))
        for below, part in parts:
            if isinstance(part, Mapping):
                refuse_unknown(part, section, file, f"{path}{key}{below}.")


def section_type(annotation: Any) -> type[BaseModel] | None:
    candidates = [annotation, *getattr(annotation, "__args__", ())]
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, Section)), None)


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    field = cut(".".join(map(str, first["loc"])))
    message = cut(first["msg"].removeprefix("Value error, "), _LONGEST_MESSAGE)
    if not field:
        return message
    if first["type"] == "missing":
        return f"{field} is missing"
    # A rule between the fields of a section; or a field where somebody may have put a secret.
    if isinstance(first["input"], Mapping | BaseModel) or field.endswith("_env"):
        return f"{field}: {message}"
    shown = re.sub(r"//[^/@]*@", "//[secret]@", repr(first["input"]))
    shown = cut(re.sub(r"([?&][^=&]+=)[^&'\"]+", r"\1[...]", shown))  # of a URL, where a secret may be
    return f"{field} is {shown}; {message[:1].lower()}{message[1:]}"
