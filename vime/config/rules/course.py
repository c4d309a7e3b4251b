"""The course of a run: its prompts and length, its rollouts, saves and evaluations."""

from __future__ import annotations

from collections.abc import Iterator

from vime.config import Config
from vime.config.sections.prompts import DATA_SOURCE_PATH
from vime.config.sections.rollout import ENGINE_ROLLOUTS, SFT_ROLLOUT


def run_has_a_length(cfg: Config) -> Iterator[str]:
    if cfg.batch.num_rollout is None and cfg.batch.num_epoch is None:
        yield "--num-rollout is missing. Give --num-rollout or --num-epoch."


def run_has_prompts(cfg: Config) -> Iterator[str]:
    own_source = cfg.data.data_source_path == DATA_SOURCE_PATH
    if not cfg.data.global_dataset:
        yield from _rollout_makes_its_prompts(cfg)
    elif cfg.data.prompt_data is None and own_source:
        yield "--prompt-data is missing. Add --prompt-data FILE.jsonl, or a --data-source-path."


def _rollout_makes_its_prompts(cfg: Config) -> Iterator[str]:
    name, rollout = "--disable-rollout-global-dataset", cfg.rollout
    if cfg.data.prompt_data is not None:
        yield f"{name} does not read --prompt-data {cfg.data.prompt_data}. Drop one of the two."
    if cfg.batch.num_epoch is not None:
        yield f"{name} has no epochs. Give --num-rollout in place of --num-epoch."
    if rollout.function_path in ENGINE_ROLLOUTS and rollout.custom_generate_path is None:
        yield (
            f"{name} leaves samples without prompts. Add a --custom-generate-function-path or a "
            "--rollout-function-path that makes prompts."
        )


def over_sampling_covers_the_batch(cfg: Config) -> Iterator[str]:
    asked, wanted = cfg.rollout.over_sampling, cfg.batch.prompts
    if asked is not None and asked < wanted:
        yield (
            f"--over-sampling-batch-size {asked} is below --rollout-batch-size {wanted}. "
            f"Give more than {wanted}, for example {2 * wanted}."
        )


def overlong_buffer_fits(cfg: Config) -> Iterator[str]:
    buffer, longest = cfg.algorithm.overlong_buffer_len, cfg.rollout.max_response_len
    if buffer is not None and buffer > longest:
        yield (
            f"--overlong-buffer-len {buffer} is more than --rollout-max-response-len {longest}. "
            "Lower it."
        )


def reference_is_in_every_checkpoint(cfg: Config) -> Iterator[str]:
    """Checkpoints hold the actor only; a reference of an earlier rollout must equal it."""
    interval, save = cfg.algorithm.ref_update_interval, cfg.checkpoint.save_interval
    if interval is not None and save is not None and save % interval:
        yield (
            f"--ref-update-interval {interval} does not divide --save-interval {save}: a run that "
            f"resumes could not load its reference. Set the second to a multiple of {interval}."
        )


def weights_are_due_in_time(cfg: Config) -> Iterator[str]:
    """Evaluations and saves need the newest weights in the engines."""
    interval = cfg.engine.update_weights_interval
    name = f"--update-weights-interval {interval}"
    if interval > 1 and cfg.cluster.offload_rollout:
        yield (
            f"{name}: with --colocate, engines drop their weights while the trainer works. Add "
            "--no-offload-rollout, or leave --update-weights-interval out."
        )
    staleness = cfg.rollout.max_weight_staleness
    if cfg.rollout.fully_async and staleness < interval - 1:
        yield (
            f"{name} lets weights get {interval - 1} versions old, and --max-staleness "
            f"{staleness} forbids it. Raise the second, or lower the first."
        )
    for other, value in (
        ("--eval-interval", cfg.eval.interval),
        ("--save-interval", cfg.checkpoint.save_interval),
    ):
        if value is not None and value % interval:
            yield (
                f"{name} does not divide {other} {value}. Set the second to a "
                f"multiple of {interval}."
            )


def loss_and_rollout_agree(cfg: Config) -> Iterator[str]:
    function, loss = cfg.rollout.function_path, cfg.algorithm.loss_type
    if not cfg.algorithm.needs_reward and function in ENGINE_ROLLOUTS:
        yield (
            f"--loss-type {loss} learns from given answers, and --rollout-function-path {function} "
            f"samples new ones. Add --rollout-function-path {SFT_ROLLOUT}."
        )
    if cfg.algorithm.needs_reward and function == SFT_ROLLOUT:
        yield (
            f"--rollout-function-path {function} makes no rewards, and --loss-type {loss} needs "
            "rewards. Add --loss-type sft_loss."
        )


def debug_runs_have_their_parts(cfg: Config) -> Iterator[str]:
    """A debug run must not need the part that it leaves out.

    --debug-train-only and --load-debug-rollout-data start no engines; --debug-rollout-only starts
    no trainer.
    """
    debug, function = cfg.debug, cfg.rollout.function_path
    if debug.train_only and debug.load_rollout_data is None and function in ENGINE_ROLLOUTS:
        yield (
            f"--debug-train-only starts no engines, and --rollout-function-path {function} needs "
            "engines. Give a function that reads its data itself, or drop --debug-train-only."
        )
    if debug.no_engines and cfg.eval.interval is not None and cfg.eval.function_path is None:
        name = "--debug-train-only" if debug.train_only else "--load-debug-rollout-data"
        yield (
            f"--eval-interval {cfg.eval.interval} needs engines, and {name} starts none. "
            "Drop one of the two."
        )
    if debug.rollout_only and (cfg.checkpoint.save or cfg.checkpoint.save_hf):
        yield (
            "--debug-rollout-only has no trainer whose weights --save or --save-hf could write. "
            "Drop these flags; --save-debug-rollout-data saves the samples."
        )
