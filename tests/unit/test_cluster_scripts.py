"""The scripts of scripts/clusters: what they start, wait for, run and end. The Kubernetes manifest.

srun, scontrol, ssh and Python are small stand-ins here. tests/cpu/test_cluster_nodes.py starts Ray.
"""

from __future__ import annotations

import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.unit.test_recipes import CONFIGS, recipe_argv
from vime.backends.megatron.hf.check import check_training
from vime.cli import parse_config

ROOT = Path(__file__).parents[2]
CLUSTERS = ROOT / "scripts" / "clusters"
SCRIPTS = sorted([*CLUSTERS.glob("*.sh"), *CLUSTERS.glob("*.sbatch")])
RECIPE = ROOT / "scripts" / "run-qwen3-4B.sh"

each_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)


@each_script
def test_bash_can_read_a_script(script):
    subprocess.run(["bash", "-n", str(script)], check=True)


@each_script
@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_has_no_remark_about_a_script(script):
    subprocess.run(["shellcheck", "-x", "-P", "SCRIPTDIR", str(script)], check=True)


@each_script
def test_a_script_ends_no_process_that_it_did_not_start(script):
    text = script.read_text()
    for word in ("pkill", "killall", "ray stop", "fuser", "kill -9"):
        assert word not in text


# --- a run under Slurm and by ssh, with stand-ins

PYTHON = """#!/usr/bin/env bash
# Stands for Python: notes what it is asked to do in $NOTES.
case "$*" in
   *own_address.py*) echo 10.0.0.1 ;;
   *secrets*) echo 0123456789abcdef ;;
   *wait_for_nodes.py*)
      until [ "$(ls "$NOTES" | grep -c '^ray')" -ge "$2" ]; do sleep 0.05; done
      ;;
   *"start --head"*)
      [ -z "$BREAK_HEAD" ] || { echo "port 6379 is taken"; exit 3; }
      ;;&
   *ray.scripts.scripts*start*)
      printf '%s\\n' "$*" "token=$RAY_AUTH_TOKEN" "mode=$RAY_AUTH_MODE" >"$NOTES/ray.$$"
      trap 'date +%s.%N >"$NOTES/ended.$$"; exit 0' TERM
      while :; do sleep 0.05; done
      ;;
esac
"""
SRUN = """#!/usr/bin/env bash
# Stands for srun: starts the command once for each task. Like srun, it forwards USR1 to the tasks,
# and kills them after a SIGTERM.
echo "$*" >>"$NOTES/srun"
tasks=1
while [[ "$1" == -* ]]; do
   case "$1" in --ntasks=*) tasks="${1#*=}" ;; esac
   shift
done
trap 'kill -USR1 "${pids[@]}"' USR1
trap 'kill -KILL "${pids[@]}"' TERM
for ((i = 0; i < tasks; i++)); do "$@" & pids+=($!); done
code=0
for pid in "${pids[@]}"; do
   while kill -0 "$pid" 2>/dev/null; do wait "$pid" || code=$?; done
done
exit $code
"""
SCONTROL = '#!/usr/bin/env bash\nfor ((i = 1; i <= NODES; i++)); do echo "n$i"; done\n'
SSH = """#!/usr/bin/env bash
# Stands for ssh: a shell without this one's variables.
echo "$*" >>"$NOTES/ssh"
while [[ "$1" == -* ]]; do [[ "$1" == -o ]] && shift; shift; done
shift
exec env -i HOME="$HOME" PATH="$PATH" NOTES="$NOTES" BREAK_HEAD="" "$@"
"""
DRIVER = """#!/usr/bin/env bash
# Stands for a recipe.
printf '%s\\n' "$RAY_ADDRESS" "$NUM_NODES" "$GPUS_PER_NODE" "$*" >"$NOTES/driver"
trap 'date +%s.%N >"$NOTES/driver.ended"; exit 143' TERM
for ((i = 0; i < 20 * LASTS; i++)); do sleep 0.05; done
exit 7
"""


class Cluster:
    """Stand-ins in a folder, and the files in which they note their calls."""

    def __init__(self, folder: Path, num_nodes: int) -> None:
        self.notes = folder / "notes"
        self.ray_folder = folder / "ray"
        self.notes.mkdir()
        bin = folder / "bin"
        bin.mkdir()
        programs = {"srun": SRUN, "scontrol": SCONTROL, "ssh": SSH, "python": PYTHON}
        for name, text in {**programs, "driver": DRIVER}.items():
            (bin / name).write_text(text)
            (bin / name).chmod(0o755)
        self.driver = str(bin / "driver")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "SLURM_"))}
        self.env = kept | {
            "PATH": f"{bin}:{os.environ['PATH']}",
            "PYTHON": str(bin / "python"),
            "HOME": str(folder),
            "NOTES": str(self.notes),
            "NODES": str(num_nodes),
            "LASTS": "0",
            "BREAK_HEAD": "",
            "SLURM_SUBMIT_DIR": str(ROOT),
            "SLURM_JOB_ID": "77",
            "SLURM_JOB_NODELIST": f"n[1-{num_nodes}]",
            "SLURM_GPUS_ON_NODE": "4",
            "HOSTS": " ".join(f"n{i}" for i in range(2, num_nodes + 1)),
            "RAY_TMPDIR": str(self.ray_folder),
            "REMOVE_RAY_TMPDIR": "1",
            "STOP_PATIENCE_S": "5",
        }

    def start(self, script: str, *words: str, **env: str) -> subprocess.Popen:
        return subprocess.Popen(
            ["bash", str(CLUSTERS / script), self.driver, *words],
            env=self.env | env,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
        )

    def rays(self) -> list[str]:
        return sorted(path.read_text() for path in self.notes.glob("ray.*"))

    def ended(self) -> list[float]:
        return [float(path.read_text()) for path in self.notes.glob("ended.*")]

    def assert_nothing_is_left(self) -> None:
        deadline = time.monotonic() + 5
        while left := with_word(str(self.notes.parent)):
            assert time.monotonic() < deadline, left
            time.sleep(0.1)
        assert not self.ray_folder.exists()


def with_word(word: str) -> list[str]:
    """Command lines and environments of live processes that have this word, less this one's."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            text = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
        except OSError:
            continue
        if word.encode() in text and process.name != str(os.getpid()):
            found.append(text[:200].decode(errors="replace"))
    return found


each_launcher = pytest.mark.parametrize("script", ["slurm.sbatch", "ssh.sh"])


@each_launcher
@pytest.mark.parametrize("num_nodes", [1, 2, 32])
def test_a_run_starts_on_all_nodes_and_leaves_none(script, num_nodes, tmp_path):
    if script == "ssh.sh" and num_nodes == 1:
        pytest.skip("ssh.sh is for two nodes and more")
    cluster = Cluster(tmp_path, num_nodes)
    run = cluster.start(script, "--num-rollout", "3")
    _, said = run.communicate(timeout=60)
    assert run.returncode == 7, said
    gpus = "4" if script == "slurm.sbatch" else ""
    address, nodes, *rest = (cluster.notes / "driver").read_text().splitlines()
    assert (address, nodes, rest) == ("10.0.0.1:6379", str(num_nodes), [gpus, "--num-rollout 3"])
    heads = [text for text in cluster.rays() if "--head" in text]
    others = [text for text in cluster.rays() if "--address 10.0.0.1:6379" in text]
    assert (len(heads), len(others)) == (1, num_nodes - 1)
    assert "--node-ip-address 10.0.0.1" in heads[0]
    for text in [*heads, *others]:
        assert "token=0123456789abcdef\nmode=token" in text
        assert ("--num-gpus 4" in text) == (script == "slurm.sbatch")
        assert "--min-worker-port 11000 --max-worker-port 12999" in text
    cluster.assert_nothing_is_left()


@each_launcher
def test_a_cancelled_run_ends_the_driver_before_the_nodes(script, tmp_path):
    cluster = Cluster(tmp_path, 3)
    run = cluster.start(script, LASTS="60")
    deadline = time.monotonic() + 30
    while not (cluster.notes / "driver").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.2)
    run.send_signal(signal.SIGTERM)
    run.communicate(timeout=30)
    assert run.returncode == 143
    assert len(cluster.ended()) == 3
    assert float((cluster.notes / "driver.ended").read_text()) < min(cluster.ended())
    cluster.assert_nothing_is_left()


@each_launcher
def test_a_head_that_does_not_start_is_told_at_once(script, tmp_path):
    cluster = Cluster(tmp_path, 2)
    run = cluster.start(script, BREAK_HEAD="yes")
    _, said = run.communicate(timeout=30)
    assert run.returncode == 2
    assert "Ray ended here with exit code 3. Its last words:\nport 6379 is taken" in said
    assert "a node ended before all of them had started" in said
    assert not (cluster.notes / "driver").exists()
    cluster.assert_nothing_is_left()


def test_steps_of_slurm_name_their_nodes(tmp_path):
    cluster = Cluster(tmp_path, 3)
    cluster.start("slurm.sbatch").communicate(timeout=30)
    head, rest = sorted((cluster.notes / "srun").read_text().splitlines(), key=len)
    assert "--nodes=1 --ntasks=1 --nodelist=n1 " in head
    assert "--nodes=2 --ntasks=2 --nodelist=n2,n3 " in rest
    for step in (head, rest):
        assert "--overlap --ntasks-per-node=1 --cpu-bind=none" in step


def test_the_token_is_on_no_command_line(tmp_path):
    cluster = Cluster(tmp_path, 2)
    cluster.start("ssh.sh").communicate(timeout=30)
    assert (cluster.notes / "ssh").read_text().endswith(" n2 bash -s\n")
    flags = [text.splitlines()[0] for text in cluster.rays()]
    assert not any("0123456789abcdef" in line for line in flags)


def test_a_node_without_the_token_is_refused(tmp_path):
    cluster = Cluster(tmp_path, 2)
    command = ["bash", str(CLUSTERS / "node.sh"), "10.0.0.1:6379"]
    done = subprocess.run(command, env=cluster.env, capture_output=True, text=True, timeout=30)
    assert done.returncode == 2
    assert "Copy ~/.ray/auth_token from the head" in done.stderr


def test_ipv6_addresses_get_brackets():
    command = f"source {CLUSTERS}/common.sh; at fd00::2 6379; at 10.0.0.1 6379; at node1 6379"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[fd00::2]:6379", "10.0.0.1:6379", "node1:6379"]


def test_waiting_for_a_head_that_is_not_there_says_where_to_look():
    wait = runpy.run_path(str(CLUSTERS / "wait_for_nodes.py"))["wait"]
    problem = wait("127.0.0.1:1", 2, timeout_s=0.0)
    assert "nothing listens at 127.0.0.1:1" in problem
    assert "firewall" in problem


@pytest.mark.stack
def test_ray_has_the_flags_that_scripts_use(tmp_path):
    pytest.importorskip("ray", reason="needs Ray")
    cluster = Cluster(tmp_path, 2)
    everything = {"NUM_CPUS": "3", "OBJECT_STORE_BYTES": "1", "NODE_ADDRESS": "10.0.0.1"}
    cluster.start("slurm.sbatch", **everything).communicate(timeout=30)
    said = " ".join(text.splitlines()[0] for text in cluster.rays())
    used = set(re.findall(r"--[a-z-]+", said))
    assert len(used) > 15
    known = set(re.findall(r"^  (--[a-z-]+)", ray_help("start"), re.M))
    assert used - known == set()
    assert "--generate" in ray_help("get-auth-token")


def ray_help(command: str) -> str:
    ray = [sys.executable, "-m", "ray.scripts.scripts", command, "--help"]
    return subprocess.run(ray, capture_output=True, text=True, check=True).stdout


# --- the founding recipe on several nodes


@pytest.mark.parametrize("num_nodes", [2, 32])
@pytest.mark.parametrize("mode", ["colocated", "decoupled", "async"])
def test_the_founding_recipe_is_planned_for_several_nodes(mode, num_nodes, tmp_path):
    entry, argv = recipe_argv(
        RECIPE, tmp_path, CONFIGS["qwen3-4B"], MODE=mode, NUM_NODES=str(num_nodes)
    )
    cfg = parse_config([*argv, "--num-rollout", "2"], checks=[check_training])
    assert entry == ("train_async.py" if mode == "async" else "train.py")
    assert cfg.cluster.total_gpus == 8 * num_nodes
    train = 8 if mode == "colocated" else 2
    assert cfg.cluster.trainer_gpus == train * num_nodes
    assert cfg.cluster.actor_num_nodes == num_nodes


def test_whole_nodes_may_train_while_others_generate(tmp_path):
    shape = {"NUM_NODES": "4", "TRAIN_NODES": "1", "TRAIN_GPUS": "8", "MODE": "decoupled"}
    _, argv = recipe_argv(RECIPE, tmp_path, CONFIGS["qwen3-4B"], **shape)
    cfg = parse_config(argv, checks=[check_training])
    assert (cfg.cluster.trainer_gpus, cfg.cluster.rollout_gpus) == (8, 24)


# --- the manifest

# Fields that KubeRay's v1 definitions ask for (True) or allow. Pods are Kubernetes' own.
GROUP = {"rayStartParams": False, "template": True}
CLUSTER = {
    "rayVersion": True,  # token authentication needs it
    "authOptions": {"mode": True},
    "headGroupSpec": GROUP,
    "workerGroupSpecs": [
        GROUP | {"groupName": True, "replicas": True, "minReplicas": True, "maxReplicas": True}
    ],
}
RAY_JOB = {
    "apiVersion": True,
    "kind": True,
    "metadata": {"name": True},
    "spec": {
        "entrypoint": True,
        "runtimeEnvYAML": False,
        "backoffLimit": False,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": False,
        "rayClusterSpec": CLUSTER,
    },
}


def mismatches(value: Any, schema: Any, place: str = "") -> list[str]:
    """Fields that `value` lacks, or has without a place in the schema."""
    if isinstance(schema, list):
        return [
            m for i, each in enumerate(value) for m in mismatches(each, schema[0], f"{place}[{i}]")
        ]
    if not isinstance(schema, dict):
        return []
    lacks = [f"{place}.{k} is missing" for k, need in schema.items() if need and k not in value]
    extra = [f"{place}.{k} is unknown" for k in value if k not in schema]
    inner = [
        m for k in value.keys() & schema for m in mismatches(value[k], schema[k], f"{place}.{k}")
    ]
    return lacks + extra + inner


def manifest() -> tuple[dict, dict]:
    return tuple(yaml.safe_load_all((CLUSTERS / "kuberay.yaml").read_text()))


def pods(job: dict) -> list[dict]:
    cluster = job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


def test_the_manifest_has_the_fields_of_a_rayjob():
    _, job = manifest()
    assert mismatches(job, RAY_JOB) == []
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        # KubeRay's map of strings refuses numbers
        assert all(isinstance(v, str) for v in group["rayStartParams"].values())


def test_a_manifest_with_a_wrong_field_is_noticed():
    _, job = manifest()
    job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replica"] = 2
    del job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]
    place = ".spec.rayClusterSpec"
    assert sorted(mismatches(job, RAY_JOB)) == [
        f"{place}.headGroupSpec.template is missing",
        f"{place}.workerGroupSpecs[0].replica is unknown",
    ]


def test_the_manifest_names_the_ray_of_the_lock_file():
    lock = (ROOT / "requirements/gpu.txt").read_text()
    (locked,) = re.findall(r"^ray==(\S+)", lock, re.MULTILINE)
    _, job = manifest()
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == locked


def test_pods_of_the_manifest_mount_what_exists_and_fit_their_memory():
    claim, job = manifest()
    for pod in pods(job):
        (container,) = pod["containers"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounts == {"shared": "/shared", "shm": "/dev/shm"}
        assert mounts.keys() == volumes.keys()
        wanted = volumes["shared"]["persistentVolumeClaim"]["claimName"]
        assert wanted == claim["metadata"]["name"]
        shm = volumes["shm"]["emptyDir"]
        limits = container["resources"]["limits"]
        assert shm["medium"] == "Memory"
        assert int(shm["sizeLimit"][:-2]) <= int(limits["memory"][:-2]) / 2
        assert container["resources"]["requests"] == limits
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


def test_nodes_of_the_manifest_are_the_recipes_nodes(tmp_path):
    _, job = manifest()
    env = yaml.safe_load(job["spec"]["runtimeEnvYAML"])["env_vars"]
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert {group[k] for k in ("replicas", "minReplicas", "maxReplicas")} == {int(env["NUM_NODES"])}
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert env["GPUS_PER_NODE"] == limits["nvidia.com/gpu"] == group["rayStartParams"]["num-gpus"]
    assert env["ROOT"] == "/shared"
    shell, script = job["spec"]["entrypoint"].split()
    assert shell == "bash"
    assert ROOT / Path(script).relative_to("/root/vime") == RECIPE
    _, argv = recipe_argv(RECIPE, tmp_path, CONFIGS["qwen3-4B"], **env)
    cfg = parse_config(argv, checks=[check_training])
    assert cfg.cluster.total_gpus == int(env["NUM_NODES"]) * int(env["GPUS_PER_NODE"])


def test_the_image_has_the_programs_that_kuberay_calls():
    dockerfile = (ROOT / "docker/Dockerfile").read_text()
    assert re.search(r"\bwget\b[^\n]*\\\n", dockerfile)  # health checks
    assert "PATH=/opt/venv/bin" in dockerfile  # ray
