"""`ctcgrpo scenarios new`: a complete record to start from, and notes on every field of it.

JSON has no comments, so the notes stand in a file beside the record.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ctcgrpo.environments.eibench.records import SCENES
from ctcgrpo.environments.eibench.scenario_format import record_fields, scene_problem
from ctcgrpo.environments.eibench.scenarios import read_records
from ctcgrpo.errors import OutputError, RecipeError
from ctcgrpo.factory.layout import layouts
from ctcgrpo.simulator.scripted.knowledge import script_fields
from ctcgrpo.util.files import write_whole

PACK_OF = {"en": "english", "zh": "chinese"}
"""By language the bundled pack that examples are taken from."""
_REPEATED = ("prompt", "licence", "seed")
"""What the packs' records hold beside what a record needs."""


def example(scene: str, language: str) -> dict[str, Any]:
    """A complete record, `script` included, that keeps every rule of `ctcgrpo scenarios validate`; of a scene of one's
    own one of support, under its name."""
    shown = scene if scene in SCENES else "support"
    record = next(r for _, r in read_records(PACK_OF[language], "train") if r["scene_tag"] == shown)
    own = {key: value for key, value in record.items() if key not in _REPEATED}
    return own | {"id": f"my-{scene}-01", "scene_tag": scene, "data_source": "own"}


def write_example(file: Path, scene: str, language: str) -> tuple[Path, Path]:
    """Write an example to FILE.jsonl and the notes to FILE.md; gives both. Raises RecipeError for a name that no scene can have
    or that does not end in .jsonl, OutputError where one of them exists or cannot be written."""
    if problem := scene_problem(scene):
        raise RecipeError(f"--scene {scene!r}: {problem}")
    if file.suffix != ".jsonl":
        raise RecipeError(f"{file}: expected a name that ends in .jsonl; try {file.with_suffix('.jsonl')}")
    beside = file.with_suffix(".md")
    for path in (file, beside):
        if path.exists():
            raise OutputError(f"{path} exists already and is not overwritten; choose another name")
    record = example(scene, language)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(record, ensure_ascii=False) + "\n")
        write_whole(beside, notes(record, file, scene, language))
    except OSError as error:
        raise OutputError(f"cannot write to {file.parent} ({error.strerror}); choose another folder") from None
    return file, beside


def notes(record: Mapping[str, Any], file: Path, scene: str, language: str) -> str:
    """What each field of the record is for, and how to go on, in Markdown."""
    rows = [f"| `{field}` | {'yes' if needed else 'no'} | {told} |" for field, needed, told in record_fields()]
    rows += [
        f"| `{field}` | no | {told} |"
        for field, told in script_fields()
        if field.split(".")[1].removesuffix("[]") in record["script"]
    ]
    titles = {
        role: ", ".join(f"`### {names[0]}`" for names in layouts()[language].titles[role]) for role in ("user", "policy")
    }
    facts = "`, `".join(
        sorted(names[0] for names in layouts()[language].titles["user"] if names[0] in layouts()[language].facts)
    )
    draft = file.with_suffix(".json").name
    return _NOTES.format(
        file=file,
        name=file.name,
        scene=scene,
        rows="\n".join(rows),
        user=titles["user"],
        policy=titles["policy"],
        facts=facts,
        draft=draft,
    )


_NOTES = """# Notes on {name}

`{name}` holds one complete scenario, one JSON object on one line. Each further scenario is a further line. Change its
texts to yours, and keep the form.

To edit it with line breaks, and to put it back as one line:

```
python -m json.tool --no-ensure-ascii {name} > {draft}
python -m json.tool --no-ensure-ascii --no-indent {draft} > {name}      # >> adds a line to a set
```

Then:

```
ctcgrpo scenarios validate {file}      # every problem, with file, line and field
ctcgrpo scenarios gate {file}          # whether the scripted user tells good replies from bad ones
ctcgrpo chat --scenarios {file}        # play the policy yourself
ctcgrpo check recipes/quickstart.yaml scenarios.train={file} "scenarios.scenes=[{scene}]" scenarios.per_step=1
```

## Fields

| field | required | what it is for |
|---|---|---|
{rows}

A record loads with the required fields. `validate` also asks for the other fields above `script`, and for all six numbers.

Other keys are kept and not read. A key that occurs twice is an error.

## Personas

A persona has sections, in this order, each a title line with text below it.

- user (`aggressor_profile.system_prompt`): {user}
- policy (`defender_profile.system_prompt`): {policy}

`{facts}` is a numbered list: `1. ...`, one fact a line. Each persona holds the facts that its side
knows.

## Numbers

Anger and trust lie in [0, 100], in steps of 5. A turn changes each by at most 10. Trust: worst < initial < target. Anger: target <
initial < worst; in defense the target may lie above the initial anger, since holding a boundary may cost some, and in scenes of
your own.
"""
