"""`ctcgrpo scenarios new`: a complete example record, and a file with notes on each of its fields (notes.md)."""

import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from ctcgrpo.environments.eibench.records import SCENES
from ctcgrpo.environments.eibench.scenario_format import record_fields, scene_problem
from ctcgrpo.environments.eibench.scenarios import read_records
from ctcgrpo.errors import OutputError, RecipeError
from ctcgrpo.factory.layout import layouts
from ctcgrpo.simulator.scripted.knowledge import script_fields
from ctcgrpo.util.files import write_whole

PACK_OF = {"en": "english", "zh": "chinese"}  # by language: the bundled pack that examples come from
_REPEATED = ("prompt", "licence", "seed")  # fields of the packs' records that a record does not need


def example(scene: str, language: str) -> dict[str, Any]:
    """A complete and valid record with a `script`. For a custom scene it is a record of support under that name."""
    shown = scene if scene in SCENES else "support"
    record = next(r for _, r in read_records(PACK_OF[language], "train") if r["scene_tag"] == shown)
    own = {key: value for key, value in record.items() if key not in _REPEATED}
    return own | {"id": f"my-{scene}-01", "scene_tag": scene, "data_source": "own"}


def write_example(file: Path, scene: str, language: str) -> tuple[Path, Path]:
    """Write an example to FILE.jsonl and the notes to FILE.md; returns both. Raises RecipeError for an invalid scene or
    a file name that does not end in .jsonl, OutputError if a file exists or cannot be written."""
    if problem := scene_problem(scene):
        raise RecipeError(f"--scene {scene!r}: {problem}")
    if file.suffix != ".jsonl":
        raise RecipeError(f"{file}: expected a name that ends in .jsonl; try {file.with_suffix('.jsonl')}")
    beside = file.with_suffix(".md")
    if there := next((path for path in (file, beside) if path.exists()), None):
        raise OutputError(f"{there} exists already and is not overwritten; choose another name")
    record = example(scene, language)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(record, ensure_ascii=False) + "\n")
        write_whole(beside, notes(record, file, scene, language))
    except OSError as error:
        raise OutputError(f"cannot write to {file.parent} ({error.strerror}); choose another folder") from None
    return file, beside


def notes(record: Mapping[str, Any], file: Path, scene: str, language: str) -> str:
    """Markdown: the purpose of each field, and the next steps."""
    rows = [f"| `{field}` | {'yes' if needed else 'no'} | {purpose} |" for field, needed, purpose in record_fields()]
    own = [(field, purpose) for field, purpose in script_fields() if field.split(".")[1].removesuffix("[]") in record["script"]]
    rows += [f"| `{field}` | no | {purpose} |" for field, purpose in own]
    layout = layouts()[language]
    titles = {role: ", ".join(f"`### {names[0]}`" for names in of_role) for role, of_role in layout.titles.items()}
    facts = "`, `".join(sorted(names[0] for names in layout.titles["user"] if names[0] in layout.facts))
    places = {"file": file, "name": file.name, "draft": file.with_suffix(".json").name}
    text = (files("ctcgrpo.factory") / "notes.md").read_text(encoding="utf-8")
    return text.format(**places, **titles, scene=scene, rows="\n".join(rows), facts=facts)
