"""The stages of the quickstart: their files and commands."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from scripts.quickstart.data import write_data
from scripts.quickstart.model import write_checkpoint
from scripts.quickstart.stages import Stage

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
MODEL_ARGS_SCRIPT = ROOT / "scripts/models/qwen3-tiny.sh"
GRPO_SCRIPT = ROOT / "scripts/run-tiny-cpu.sh"
EVAL_NAME = "addition"
NUM_ROLLOUT = 60
SFT_STEPS = 400
STOP_TIMEOUT_S = 120.0  # a command has this long to end its own processes after Ctrl-C


class Terminated(KeyboardInterrupt):
    """SIGTERM, which reached this process only. Ctrl-C also reaches the commands it started."""


class StageFailed(RuntimeError):
    """A command of a stage failed; the message has the end of its log."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """One quickstart run in `run_dir`."""

    run_dir: Path
    seed: int
    num_rollout: int = NUM_ROLLOUT

    @property
    def data(self) -> Path:
        return self.run_dir / "data"

    @property
    def blank_model(self) -> Path:
        return self.run_dir / "blank/hf"

    @property
    def sft(self) -> Path:
        return self.run_dir / "sft"

    @property
    def warm_model(self) -> Path:
        return self.run_dir / "warm/hf"

    @property
    def warm_torch_dist(self) -> Path:
        return self.run_dir / "warm/torch_dist"

    @property
    def checkpoints(self) -> Path:
        return self.run_dir / "grpo"

    @property
    def hf_exports(self) -> Path:
        return self.run_dir / "hf"

    @property
    def metrics(self) -> Path:
        return self.run_dir / "metrics.jsonl"

    def stages(self) -> list[Stage]:
        sources = tuple((HERE / f).read_text() for f in ("task.py", "data.py", "model.py"))
        sft = self.sft_command()
        grpo = self.grpo_command()
        variables = self.grpo_variables()
        return [
            Stage(
                "assets",
                "make a tiny Qwen3, its tokenizer and the data",
                self.make_assets,
                (self.blank_model, self.data),
                (str(self.seed), *sources),
            ),
            Stage(
                "sft",
                f"warm up: SFT on a careless pupil's work, {SFT_STEPS} steps",
                lambda: self.make_warm_model(sft),
                (self.sft, self.warm_model),
                tuple(sft[1:]),
            ),
            Stage(
                "convert",
                "convert the Hugging Face checkpoint to Megatron's torch_dist",
                lambda: self.call("convert", self.convert_command()),
                (self.warm_torch_dist,),
                (MODEL_ARGS_SCRIPT.read_text(),),
            ),
            Stage(
                "grpo",
                f"GRPO, {self.num_rollout} rollouts of 32 prompts x 8 samples",
                lambda: self.call("grpo", grpo, variables),
                (self.metrics, self.checkpoints, self.hf_exports),
                (GRPO_SCRIPT.read_text(), *grpo, *(f"{k}={v}" for k, v in variables.items())),
            ),
        ]

    def make_assets(self) -> None:
        self.data.mkdir(parents=True)
        write_data(self.data, self.seed)
        write_checkpoint(self.blank_model, self.seed)

    def sft_command(self) -> list[str]:
        return [
            sys.executable, "train.py",
            "--loss-type", "sft_loss", "--calculate-per-token-loss",
            "--debug-train-only",
            "--rollout-function-path", "vime.rollout.sft_rollout.generate_rollout",
            "--hf-checkpoint", str(self.blank_model),
            "--prompt-data", str(self.data / "sft.jsonl"), "--input-key", "messages",
            "--apply-chat-template",
            "--num-rollout", str(SFT_STEPS), "--rollout-batch-size", "32",
            "--use-dynamic-batch-size", "--max-tokens-per-gpu", "4096",
            "--actor-num-gpus-per-node", "1",
            "--optimizer", "adam", "--lr", "3e-3", "--lr-decay-style", "linear", "--min-lr", "1e-3",
            "--lr-warmup-iters", "20", "--weight-decay", "0",
            "--adam-beta1", "0.9", "--adam-beta2", "0.95", "--clip-grad", "1",
            "--seed", str(self.seed), "--rollout-seed", str(self.seed),
            "--save-interval", str(SFT_STEPS), "--save-hf", str(self.sft / "hf/{rollout_id}"),
            "--run-dir", str(self.sft),
        ]  # fmt: skip

    def make_warm_model(self, command: list[str]) -> None:
        self.call("sft", command)
        self.warm_model.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(latest_export(self.sft / "hf"), self.warm_model)

    def convert_command(self) -> list[str]:
        # As for every model, MODEL_ARGS come from a script in scripts/models/.
        script = (
            'source "$1"; shift; '
            'exec "$0" tools/convert_hf_to_torch_dist.py "${MODEL_ARGS[@]}" "$@"'
        )
        return [
            "bash", "-c", script, sys.executable, str(MODEL_ARGS_SCRIPT),
            "--hf-checkpoint", str(self.warm_model), "--save", str(self.warm_torch_dist),
        ]  # fmt: skip

    def grpo_command(self) -> list[str]:
        exports = str(self.hf_exports / "{rollout_id}")
        return ["bash", str(GRPO_SCRIPT.relative_to(ROOT)), "--save-hf", exports]

    def grpo_variables(self, num_rollout: int | None = None) -> dict[str, str]:
        """The environment of scripts/run-tiny-cpu.sh, which derives the other paths."""
        return {
            "RUN_DIR": str(self.run_dir),
            "SEED": str(self.seed),
            "NUM_ROLLOUT": str(num_rollout or self.num_rollout),
        }

    def continue_command(self, num_trained: int) -> str:
        """A shell command that continues from the last checkpoint and trains twice as long."""
        variables = self.grpo_variables(2 * num_trained)
        words = [f"{name}={shlex.quote(value)}" for name, value in variables.items()]
        return " ".join([*words, *map(shlex.quote, self.grpo_command())])

    def call(self, name: str, command: list[str], variables: dict[str, str] | None = None) -> None:
        """Run a command of a stage; progress goes to the terminal, log lines go to a file."""
        log = self.run_dir / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        bin_dir = str(Path(sys.executable).parent)
        env = (
            os.environ
            | {"PATH": f"{bin_dir}:{os.environ['PATH']}", "PYTHON": sys.executable}
            | (variables or {})
        )
        with log.open("w") as log_file:
            process = subprocess.Popen(
                command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stderr=log_file
            )
            try:
                code = process.wait()
            except KeyboardInterrupt as interrupt:
                if isinstance(interrupt, Terminated):
                    process.terminate()
                stop(process)
                raise
        if code != 0:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-40:])
            raise StageFailed(f"{tail}\n\nstage {name} ended with code {code}; its log: {log}")


def stop(process: subprocess.Popen) -> None:
    """Wait until an interrupted command has ended its own processes; Ctrl-C reached it too."""
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.terminate()
        process.wait(STOP_TIMEOUT_S)


def latest_export(folder: Path) -> Path:
    """The export of the highest rollout in `folder`. Raises FileNotFoundError without one."""
    exports = [p for p in folder.glob("*") if p.name.isdigit()] if folder.exists() else []
    if not exports:
        raise FileNotFoundError(f"no Hugging Face export in {folder}")
    return max(exports, key=lambda p: int(p.name))
