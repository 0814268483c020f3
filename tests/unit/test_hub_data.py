"""Data sets on the Hub: split, configuration, file, revision; JSON as it was written, tables without what records lack; the cache
serves without a network; a run records the commit, and its resumption notices another; errors say what to do.

The Hub is a server over loopback, the library of the Hub and `datasets` are the real ones."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from ctcgrpo.environments.eibench.scenarios import PACKS, load_scenarios, load_set, read_records
from ctcgrpo.errors import RecipeError, ScenarioError
from ctcgrpo.factory.storage import to_dataset
from ctcgrpo.run.data_digest import refuse_other_commits
from ctcgrpo.run.run_tasks import read_tasks
from ctcgrpo.util import hub_data
from ctcgrpo.util.hub_data import commit_of, hub_source, unpinned
from tests.conftest import ROOT, Command
from tests.fake_hub import FakeHub
from tests.unit.test_run import FAST, TINY

PACK = {str(f.relative_to(PACKS / "english")): f.read_bytes() for f in sorted((PACKS / "english").glob("*/*.jsonl"))}
CARD = b"---\nlicense: apache-2.0\n---\n# Talks\n"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A Hub, a cache of its own, and a network."""
    import datasets
    from huggingface_hub import constants

    with FakeHub().serving() as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", served.url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")
        hub_data._resolved.cache_clear()
        yield served
    hub_data._resolved.cache_clear()


def lines(records: list[Any]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def parquet(rows: list[dict[str, Any]] | Any, file: Path) -> bytes:
    import datasets

    (datasets.Dataset.from_list(rows) if isinstance(rows, list) else rows).to_parquet(str(file))
    return file.read_bytes()


def test_the_bundled_pack_is_the_same_from_the_hub(hub: FakeHub) -> None:
    hub.push("me/talks", {**PACK, "README.md": CARD, "train/._charm_final.jsonl": b"\0", "report.pdf": b"%PDF"})
    assert load_scenarios("hf://datasets/me/talks") == load_scenarios("english/train")
    assert load_scenarios("hf://datasets/me/talks", "test") == load_scenarios("english/test", "test")
    assert load_scenarios("hf://datasets/me/talks/test", "test") == load_scenarios("english/test", "test")
    one = load_scenarios("hf://datasets/me/talks/train/charm_final.jsonl")
    assert one == load_scenarios(PACKS / "english" / "train" / "charm_final.jsonl")
    assert not any("report.pdf" in request for request in hub.requests)  # only data is fetched


@pytest.mark.parametrize("layout", ["columns", "converted", "json", "gzip"])
def test_records_are_the_same_in_every_format(hub: FakeHub, tmp_path: Path, layout: str) -> None:
    records = [record for _, record in read_records("english/train")]
    file = {
        "columns": lambda: ("data/train-00000-of-00001.parquet", parquet(records, tmp_path / "a.parquet")),
        "converted": lambda: ("data/train-00000-of-00001.parquet", parquet(to_dataset(records), tmp_path / "a.parquet")),
        "json": lambda: ("train.json", json.dumps(records).encode()),
        "gzip": lambda: ("train.jsonl.gz", gzip.compress(lines(records))),
    }[layout]()
    hub.push("me/talks", dict([file]))
    assert load_scenarios("hf://datasets/me/talks") == load_scenarios("english/train")
    assert [record for _, record in read_records("hf://datasets/me/talks")] == records


def test_places_name_the_data_set_its_commit_and_the_line(hub: FakeHub, tmp_path: Path) -> None:
    good = [record for _, record in read_records("english/train")][:3]
    bad = {**good[0], "id": "bad", "scene_tag": "suport"}
    commit = hub.push("me/talks", {"train.jsonl": lines([*good, bad]) + b"{\n"})
    found = load_set("hf://datasets/me/talks")
    where = f"hf://datasets/me/talks@{commit[:12]}/train.jsonl"
    assert [fault.place for fault in found.faults] == [f"{where}, line 4", f"{where}, line 5"] and len(found.scenarios) == 3
    commit = hub.push("me/rows", {"train.parquet": parquet([*good, bad], tmp_path / "a.parquet")})
    found = load_set("hf://datasets/me/rows")
    assert [fault.place for fault in found.faults] == [f"hf://datasets/me/rows@{commit[:12]}, train, row 4"]
    broken = [{"record": "{"}, {"record": "[1]"}, *({"record": json.dumps(record)} for record in good)]
    hub.push("me/broken", {"train.parquet": parquet(broken, tmp_path / "b.parquet")})
    told = [str(fault) for fault in load_set("hf://datasets/me/broken").faults]
    assert len(told) == 2 and "row 1: its column 'record' is not valid JSON" in told[0] and "row 2" in told[1]


def test_revisions_and_configurations(hub: FakeHub) -> None:
    first = hub.push("me/talks", {"train.jsonl": lines([{"id": "a"}])})
    second = hub.push("me/talks", {"train.jsonl": lines([{"id": "b"}])})
    hub.push("me/talks", {"train.jsonl": lines([{"id": "c"}])}, "refs/pr/1")
    hub.refs["me/talks"]["v1"] = first

    def ids(source: str) -> list[str]:
        return [task.id for task in read_tasks(source, "environment.tasks")]

    assert ids("hf://datasets/me/talks") == ids("hf://datasets/me/talks@main/train") == ["b"]
    assert ids("hf://datasets/me/talks@v1") == ids(f"hf://datasets/me/talks@{first}/train.jsonl") == ["a"]
    assert ids("hf://datasets/me/talks@refs%2Fpr%2F1") == ["c"]
    assert commit_of("hf://datasets/me/talks", RecipeError) == second
    card = b"---\nconfigs:\n- {config_name: long, data_files: long/*}\n- {config_name: short, data_files: short/*}\n---\n"
    hub.push("me/two", {"README.md": card, "long/a.jsonl": lines([{"id": "l"}]), "short/a.jsonl": lines([{"id": "s"}])})
    assert ids("hf://datasets/me/two/short/train") == ["s"]
    with pytest.raises(RecipeError, match=r"several configurations \(long, short\).*try hf://datasets/me/two/long/train"):
        ids("hf://datasets/me/two")
    with pytest.raises(RecipeError, match="no configuration 'shrt'; did you mean 'short'"):
        ids("hf://datasets/me/two/shrt/train")


def test_tasks_of_a_table_keep_every_column(hub: FakeHub, tmp_path: Path) -> None:
    rows = [{"question": "a", "hint": None, "tag": "x"}, {"question": "b", "hint": "c", "tag": "y"}]
    hub.push("me/tasks", {"train.parquet": parquet(rows, tmp_path / "a"), "test.parquet": parquet(rows[1:], tmp_path / "b")})
    tasks = read_tasks("hf://datasets/me/tasks", "environment.tasks")
    assert [(task.id, task.tag, task.data) for task in tasks] == [("0", "x", rows[0]), ("1", "y", rows[1])]
    [held] = read_tasks("hf://datasets/me/tasks", "validation.tasks", None, "test")
    assert held.data == rows[1] and [held] == read_tasks("hf://datasets/me/tasks/test", "validation.tasks")
    hub.push("me/sheet", {"a/Sheet.csv": b"id,question\nheld,d\n"})
    [task] = read_tasks("hf://datasets/me/sheet/a/Sheet.csv", "environment.tasks")
    assert task.id == "held" and task.data == {"id": "held", "question": "d"}


def test_the_cache_serves_without_a_network(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    hub.push("me/talks", PACK)
    online = load_scenarios("hf://datasets/me/talks")
    hub_data._resolved.cache_clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert load_scenarios("hf://datasets/me/talks") == online and not hub.requests
    advice = (
        r"not completely in the cache .*hub-cache.*HF_HUB_OFFLINE.*try `hf download me/other --repo-type dataset --revision v2`"
    )
    with pytest.raises(ScenarioError, match=advice):
        load_scenarios("hf://datasets/me/other@v2")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody is there
    assert load_scenarios("hf://datasets/me/talks") == online
    with pytest.raises(ScenarioError, match=r"the Hub at http://127.0.0.1:9 cannot be reached; try `hf download me/other"):
        load_scenarios("hf://datasets/me/other")


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("hf://datasets/me/absent", "no such data set at http://.*check OWNER/NAME"),
        ("hf://datasets/me/closed", "terms accepted on its page; try `hf auth login`"),
        ("hf://datasets/me/talks@v9", "no revision 'v9'; expected a branch"),
        ("hf://datasets/me/talks/dev", "no split 'dev'; it has train; try hf://datasets/me/talks/train"),
        ("hf://datasets/me/talks/absent.jsonl", "no such file at commit [0-9a-f]{12}; try hf://datasets/me/talks for"),
        ("hf://datasets/me/talks/../../etc.jsonl", "expected hf://datasets/OWNER/NAME"),
        ("hf://datasets/", "expected hf://datasets/OWNER/NAME"),
        ("hf://datasets/me/talks@a@b", "expected hf://datasets/OWNER/NAME"),
        ("hf://datasets/me/pictures", "data files|DataFiles"),
        ("hf://datasets/me/broken", "train.jsonl.gz: cannot be decompressed"),
    ],
)
def test_errors_say_what_to_do(hub: FakeHub, source: str, problem: str) -> None:
    hub.push("me/talks", {"train.jsonl": lines([{"id": "a"}])})
    hub.push("me/pictures", {"README.md": CARD})
    hub.push("me/broken", {"train.jsonl.gz": b"{}"})
    hub.gated.add("me/closed")
    for read in (lambda: load_scenarios(source), lambda: read_tasks(source, "environment.tasks")):
        with pytest.raises((ScenarioError, RecipeError), match=problem) as raised:
            read()
        assert "hf://datasets/" in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "name", "revision", "part", "without"),
    [
        ("hf://datasets/a/b", "a/b", None, "", "hf://datasets/a/b"),
        ("hf://datasets/squad", "squad", None, "", "hf://datasets/squad"),
        ("hf://datasets/squad@v1/train", "squad", "v1", "train", "hf://datasets/squad/train"),
        ("hf://datasets/a/b@v1/c/train", "a/b", "v1", "c/train", "hf://datasets/a/b/c/train"),
        ("hf://datasets/a/b/data/x.jsonl.gz", "a/b", None, "data/x.jsonl.gz", "hf://datasets/a/b/data/x.jsonl.gz"),
    ],
)
def test_the_parts_of_a_source(text: str, name: str, revision: str | None, part: str, without: str) -> None:
    assert hub_source(text, RecipeError) == (text, name, revision, part) and unpinned(text) == without
    assert unpinned("mine@home/x.jsonl") == "mine@home/x.jsonl"  # a path


def test_a_run_records_the_commit_and_notices_another(hub: FakeHub, ctcgrpo: Command, tmp_path: Path) -> None:
    run = tmp_path / "tiny"

    def train(*overrides: str) -> tuple[int, str]:
        hub_data._resolved.cache_clear()  # as in a new process
        code, out, err = ctcgrpo("train", TINY, *FAST, f"run.output_dir={tmp_path}", f"training.max_steps={steps}", *overrides)
        return code, out + err

    def recorded() -> Mapping[str, str]:
        commits: Mapping[str, str] = json.loads((run / "data.json").read_text())["commits"]
        return commits

    steps, source = 1, "scenarios.train=hf://datasets/me/talks"
    first = hub.push("me/talks", PACK)
    code, said = train(source)
    assert code == 0, said
    assert recorded()["scenarios.train"] == first
    second = hub.push("me/talks", {**PACK, "README.md": CARD})  # the same records
    steps = 2
    code, said = train(source)
    assert (
        code == 0 and "another commit with the same records" in " ".join(said.split()) and recorded()["scenarios.train"] == second
    )
    fewer = {name: data for name, data in PACK.items() if "charm" not in name or name.startswith("test")}
    charm = PACK["train/charm_final.jsonl"].splitlines(keepends=True)
    third = hub.push("me/talks", {**fewer, "train/charm_final.jsonl": b"".join(charm[1:])})
    steps = 3
    code, said = train(source)
    said = " ".join(said.split())
    assert code == 6 and "scenarios.train: 1 removed" in said and second in said and third in said
    assert f"try scenarios.train=hf://datasets/NAME@{second}" in said
    code, said = train(f"{source}@{second}")  # as the message says
    assert code == 0 and recorded()["scenarios.train"] == second, said


def test_processes_with_different_commits_are_refused() -> None:
    refuse_other_commits({"scenarios.train": "a" * 40}, {"scenarios.train": "a" * 40})
    with pytest.raises(
        RecipeError, match=r"scenarios\.train: .*a{40}, another process b{40}; .*try scenarios\.train=hf://.*@a{40}"
    ):
        refuse_other_commits({"scenarios.train": "a" * 40}, {"scenarios.train": "b" * 40})


def test_the_command_reads_a_hub_named_by_the_environment(tmp_path: Path) -> None:
    with FakeHub().serving() as hub:
        hub.push("me/talks", PACK)
        command = [sys.executable, "-m", "ctcgrpo", "scenarios", "validate", "hf://datasets/me/talks/test", "--split", "test"]
        variables = {
            **os.environ,
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path),
            "HF_HUB_OFFLINE": "0",
            "PYTHONPATH": str(ROOT),
        }
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0 and "16 scenarios" in done.stdout and "Fetching" not in done.stderr, done.stderr
