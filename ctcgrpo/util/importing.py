"""Imports objects that a recipe names as `module:attribute`: custom credits, centerings, scales and environments."""

import importlib
import sys
import sysconfig
import traceback
from pathlib import Path
from typing import Any

from ctcgrpo.errors import RecipeError
from ctcgrpo.util.naming import did_you_mean, quoted

_PACKAGE, _PYTHON = Path(__file__).parents[1], Path(sysconfig.get_path("stdlib"))
_INSTALLED = [Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")]
FORM = "module:attribute, for example my_module:my_function"


def installing(extras: str) -> str:
    """The command that installs extras, as a user types it: the project is installed from a clone."""
    return f"pip install '.[{extras}]' in the clone of ctcgrpo"


def is_reference(name: str) -> bool:
    """Whether a name has the form `module:attribute`."""
    return ":" in name


def load_object(reference: str, what: str, folder: Path | None = None) -> Any:
    """The function or class that `module:attribute` names; both parts may be dotted.

    `what` is the field that errors name (credit.centering). The module is looked for in `folder` (a recipe's), in the current
    directory, and where Python looks. Raises RecipeError for a reference of another form, a module that is not found or cannot be
    imported, an attribute that it lacks, and an object that cannot be called.
    """
    where = f"{what} = {quoted(reference)}"
    module, colon, attribute = reference.partition(":")
    if not colon or not all(part.isidentifier() for part in [*module.split("."), *attribute.split(".")]):
        raise RecipeError(f"{where}; expected {FORM}")
    found: Any = _import(module, where, [Path.cwd()] if folder is None else [folder.resolve(), Path.cwd()])
    for name in attribute.split("."):
        if not hasattr(found, name):
            public = [n for n in vars(found) if not n.startswith("_")] if hasattr(found, "__dict__") else []
            raise RecipeError(f"{where}: {_named(module)} has no {name!r}; {did_you_mean(name, public)}")
        found = getattr(found, name)
    if not callable(found):
        what = f"{attribute} of {_named(module)} is a {type(found).__name__}"
        raise RecipeError(f"{where}: {what}; expected a function or a class")
    return found


def source_of(reference: str) -> Path | None:
    """The file of the module of a reference that was loaded; None for a module without a file."""
    file = getattr(sys.modules.get(reference.partition(":")[0]), "__file__", None)
    return None if file is None else Path(file)


def _import(module: str, where: str, folders: list[Path]) -> Any:
    here = [str(folder) for folder in folders]
    before = list(sys.path)
    sys.path[:0] = here
    try:
        # A file that was written after Python had listed its folder would not be found.
        importlib.invalidate_caches()
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module}.".startswith(f"{error.name}."):
            looked = ", ".join(dict.fromkeys(here))
            raise RecipeError(
                f"{where}: there is no module {error.name!r} in {looked} or installed; put {error.name.replace('.', '/')}.py "
                "there, or set PYTHONPATH"
            ) from None
        raise RecipeError(f"{where}: importing {module} failed: {blame(error)}") from error
    except Exception as error:  # whatever a user's module does when it is imported
        raise RecipeError(f"{where}: importing {module} failed: {blame(error)}") from error
    finally:
        # At the end the folders hide nothing from other imports, and the module can still import its neighbours later.
        sys.path[:] = before + [folder for folder in dict.fromkeys(here) if folder not in before]


def blame(error: BaseException) -> str:
    """Describes an error of a user's code: type, text, and the last line of that code in the traceback; a library's line only where
    there is no other."""
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if isinstance(error, SyntaxError):  # its text names file and line
        return text
    frames = [(Path(frame.filename), frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    outside = [(f, line) for f, line in frames if f.is_absolute() and not any(map(f.is_relative_to, (_PACKAGE, _PYTHON)))]
    own = [(f, line) for f, line in outside if not any(map(f.is_relative_to, _INSTALLED))] or outside
    return f"{text} ({own[-1][0]}, line {own[-1][1]})" if own else text


def _named(module: str) -> str:
    file = source_of(f"{module}:")
    return module if file is None else f"{module} ({file})"
