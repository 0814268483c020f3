"""Checks of folders that a user names, with suggestions for likely mistakes."""

from pathlib import Path

from ctcgrpo.errors import OutputError, PolicyError
from ctcgrpo.run.run_folder import RunFolder
from ctcgrpo.util.naming import cut, is_path, nearest, quoted

_MODEL_FILES = ("config.json", "adapter_config.json")


def require_folder(folder: Path) -> Path:
    """The folder, if it exists. Raises OutputError with the closest existing name."""
    try:
        if folder.is_dir():
            return folder
    except OSError as error:
        raise OutputError(f"{cut(str(folder))}: {error.strerror}") from None
    raise OutputError(f"{folder}: " + ("is a file; expected a folder" if folder.exists() else f"no such folder{_meant(folder)}"))


def _meant(path: Path) -> str:
    """A clause with the existing path that is closest to a missing one."""
    missing = next(part for part in reversed([path, *path.parents]) if not part.exists())
    siblings = [part.name for part in missing.parent.iterdir()] if missing.parent.is_dir() else []
    match = nearest(missing.name, siblings)
    found = None if match is None else missing.parent / match / path.relative_to(missing)
    return f"; did you mean {str(found)!r}?" if found is not None and found.exists() else ""


def require_run(folder: Path) -> RunFolder:
    """The run in a folder. Raises OutputError where the folder does not exist, or has no run."""
    require_folder(folder)
    if RunFolder(folder).recipe_file.exists():
        return RunFolder(folder)
    hint = f"; the run is {folder.parent}" if RunFolder(folder.parent).recipe_file.exists() else ""
    if not hint and (folder / "data.json").exists():
        hint = "; the run there ended before its first step: run its command again"
    elif not hint and RunFolder(folder).traces.is_dir():
        hint = "; it is the output of a CTCGRPOTrainer, with its dialogues in traces/"
    raise OutputError(f"{folder}: expected a run folder; it has no recipe.yaml{hint}")


def is_model(folder: Path) -> bool:
    """Whether a folder contains a model or an adapter."""
    return any((folder / name).exists() for name in _MODEL_FILES)


def check_model(model: str, field: str) -> None:
    """Raises PolicyError for a path that does not exist, and for a folder without a model. Names that are no paths (a Hub model,
    builtin/NAME) pass. `field` opens the message."""
    try:
        folder = Path(model).expanduser()
        there = folder.exists()
    except (OSError, RuntimeError) as error:  # a name that is too long, a user that does not exist
        reason = error.strerror if isinstance(error, OSError) else error
        raise PolicyError(f"{field} {quoted(model)} cannot be loaded: {reason}") from None
    if not there:
        if is_path(model):
            raise PolicyError(f"{field} {model!r} cannot be loaded: no such folder{_meant(folder)}")
        return
    if is_model(folder):
        return
    what = "it is a file, not a folder" if folder.is_file() else "it has no config.json"
    if RunFolder(folder).recipe_file.exists():
        what = "it is a run folder"
    trained = [name for name in ("final", "best") if is_model(folder / name)]
    below = [*trained, *sorted(path.parent.name for path in folder.glob("*/config.json"))]
    found = "its trained policy is" if trained else "a model is in"
    hint = f"; {found} {folder / below[0]}" if below else ""
    raise PolicyError(f"{field} {model!r} cannot be loaded: {what}{hint}")
