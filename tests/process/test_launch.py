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
        assert f"simulator.config=null simulator.url=[http://localhost:{cluster.simulator}]" in line and line.endswith(
            " token"
        )
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
    assert job.returncode == 1 and "a server ended before http://127.0.0.1:" in out
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
        ({"SERVE_NODES": "3"}, "4 nodes leave none to train"),
        ({"POLICY_MODEL": ""}, "POLICY_MODEL is not set"),
        ({"SIMULATOR_MODEL": ""}, "SIMULATOR_MODEL is not set"),
        ({"SLURM_SUBMIT_DIR": "/"}, "submit it from the project's folder"),
    ],
)
def test_what_is_missing_is_said_at_once(cluster: Cluster, environment: dict[str, str], reason: str) -> None:
    job = cluster.start(**environment)
    out, _ = job.communicate(timeout=30)
    assert job.returncode == 2 and reason in out and not cluster.lines()
