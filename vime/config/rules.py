"""Rules across sections. Each yields problems that name flag, value and remedy.

A section checks what it alone can know (`Section.problems`). Rules look at files only as far as
"is it there", apart from the small `config.json`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from vime.algorithms.advantages import estimators_where
from vime.config import Config
from vime.config.evaluation import eval_datasets, evaluations_fit
from vime.config.hf_config import hf_config
from vime.config.own_values import own_values_are_their_own
from vime.errors import ConfigError

Rule = Callable[[Config], Iterable[str]]

VLLM_ROLLOUT = "vime.rollout.vllm_rollout.generate_rollout"
DATA_SOURCE = "vime.rollout.data_source.RolloutDataSourceWithBuffer"
SFT_ROLLOUT = "vime.rollout.sft_rollout.generate_rollout"


def checkpoint_is_there(cfg: Config) -> Iterator[str]:
    folder = Path(cfg.model.hf_checkpoint)
    name = f"--hf-checkpoint {folder}"
    if not folder.is_dir():
        yield f"{name} is not a folder. Give the folder of a downloaded Hugging Face checkpoint."
    elif not (folder / "config.json").is_file():
        yield f"{name} holds no config.json. Give the folder of a complete checkpoint."
    elif not hf_config(cfg):
        yield f"{name}: its config.json is not a JSON object. Download the checkpoint again."


def reference_is_there(cfg: Config) -> Iterator[str]:
    """A missing --load is a fresh run; a missing --ref-load is a mistake."""
    folder = cfg.checkpoint.ref_load
    if folder is not None and not Path(folder).is_dir():
        yield (
            f"--ref-load {folder} is not a folder. Make it with tools/convert_hf_to_torch_dist.py, "
            "or leave it out to start from --hf-checkpoint."
        )
    if cfg.checkpoint.ckpt_step is not None and cfg.checkpoint.load is None:
        yield f"--ckpt-step {cfg.checkpoint.ckpt_step} chooses within --load. Add --load FOLDER."
    if cfg.checkpoint.ref_ckpt_step is not None and folder is None:
        step = cfg.checkpoint.ref_ckpt_step
        yield f"--ref-ckpt-step {step} chooses within --ref-load. Add --ref-load FOLDER."


def teacher_is_there(cfg: Config) -> Iterator[str]:
    folder, a = cfg.checkpoint.opd_teacher_load, cfg.algorithm
    name = f"--opd-teacher-load {folder}"
    if folder is not None and not (a.use_opd and a.opd_type == "megatron"):
        kind = " --opd-type megatron" if a.use_opd else ""
        yield f"{name} has no effect without --use-opd{kind}. Add that, or leave it out."
    elif not a.use_opd:
        return
    elif a.opd_type == "vllm":
        yield from _served_teacher(cfg)
    elif folder is None:
        yield (
            "--use-opd has no teacher. Add --opd-teacher-load FOLDER: a checkpoint, or an HF "
            "folder, of a model of the policy's architecture."
        )
    elif not Path(folder).is_dir():
        yield f"{name} is not a folder. Give a checkpoint or an HF folder."


def _served_teacher(cfg: Config) -> Iterator[str]:
    url, rollout = cfg.algorithm.opd_teacher_url, cfg.rollout
    by_hand = (
        cfg.reward.custom_rm_path,
        rollout.custom_generate_path,
        rollout.sample_hook_paths,
        rollout.sample_filter_path,
        rollout.all_samples_path,
        rollout.convert_path,
        rollout.data_postprocess_path,
        cfg.debug.load_rollout_data,
    )
    if url is None and rollout.function_path == VLLM_ROLLOUT and not any(by_hand):
        yield (
            "--opd-type vllm has no teacher. Add --opd-teacher-url http://HOST:PORT of "
            "`vllm serve TEACHER`, or a function of yours that sets Sample.teacher_log_probs."
        )
    if url is not None and rollout.temperature != 1.0:
        yield (
            f"--opd-teacher-url {url} gives log-probabilities at temperature 1, and "
            f"--rollout-temperature {rollout.temperature} samples at another. Set it to 1, or use "
            "--opd-type megatron."
        )


def folders_can_be_made(cfg: Config) -> Iterator[str]:
    """What would otherwise end a run at its first checkpoint, or just after its start."""
    if cfg.debug.dry_run:
        return
    for name, path in (
        ("--run-dir", cfg.log.run_dir),
        ("--save", cfg.checkpoint.save),
        ("--save-hf", cfg.checkpoint.save_hf),
    ):
        if path is None:
            continue
        there = Path(path).absolute()
        while not os.path.exists(there):  # unlike Path.exists, False where one may not look
            there = there.parent
        if not (there.is_dir() and os.access(there, os.W_OK)):
            yield (
                f"{name} {path} cannot be made: {there} is not a folder that you may write to. "
                "Choose another."
            )


def run_has_a_length(cfg: Config) -> Iterator[str]:
    if cfg.batch.num_rollout is None and cfg.batch.num_epoch is None:
        yield "--num-rollout is missing. Give it, or --num-epoch in its place."


def run_has_prompts(cfg: Config) -> Iterator[str]:
    own_source = cfg.data.data_source_path == DATA_SOURCE
    if not cfg.data.global_dataset:
        yield from _rollout_finds_its_own_prompts(cfg)
    elif cfg.data.prompt_data is None and own_source:
        yield "--prompt-data is missing. Add --prompt-data FILE.jsonl, or a --data-source-path."


def _rollout_finds_its_own_prompts(cfg: Config) -> Iterator[str]:
    name, rollout = "--disable-rollout-global-dataset", cfg.rollout
    if cfg.data.prompt_data is not None:
        yield f"{name} leaves --prompt-data {cfg.data.prompt_data} unread. Drop one of the two."
    if cfg.batch.num_epoch is not None:
        yield f"{name} has no epochs. Give --num-rollout in place of --num-epoch."
    if rollout.function_path == VLLM_ROLLOUT and rollout.custom_generate_path is None:
        yield (
            f"{name} hands out samples without prompts. Add a --custom-generate-function-path or a "
            "--rollout-function-path that makes its own."
        )


def layout_fits_the_gpus(cfg: Config) -> Iterator[str]:
    layout, gpus = cfg.parallel, cfg.cluster.trainer_gpus
    for size, what in (
        (
            layout.tp * layout.pp * layout.cp,
            f"--tensor-model-parallel-size {layout.tp} x --pipeline-model-parallel-size {layout.pp}"
            f" x --context-parallel-size {layout.cp}",
        ),
        (
            layout.etp * layout.ep * layout.pp,
            f"--expert-tensor-parallel-size {layout.etp} x --expert-model-parallel-size {layout.ep}"
            f" x --pipeline-model-parallel-size {layout.pp}",
        ),
    ):
        if gpus % size:
            yield (
                f"{what} = {size} does not divide the {gpus} GPUs that train. Lower one of them, "
                f"or make --actor-num-nodes {cfg.cluster.actor_num_nodes} x "
                f"--actor-num-gpus-per-node {cfg.cluster.actor_gpus_per_node} a multiple of {size}."
            )


def engine_fits_the_model(cfg: Config) -> Iterator[str]:
    heads, size = hf_config(cfg).get("num_attention_heads"), cfg.cluster.gpus_per_engine
    if heads and heads % size and not cfg.debug.no_engines:
        yield (
            f"--rollout-num-gpus-per-engine {size} does not divide the model's {heads} attention "
            f"heads. Give a divisor of {heads}."
        )


def engines_fit_a_node(cfg: Config) -> Iterator[str]:
    size, node = cfg.cluster.gpus_per_engine, cfg.cluster.gpus_per_node
    if size > node:
        yield (
            f"--rollout-num-gpus-per-engine {size} is more than --num-gpus-per-node {node}, and an "
            "engine lives on one node. Lower the first."
        )


def every_rank_gets_a_sample(cfg: Config) -> Iterator[str]:
    per_step, ranks = cfg.batch.samples // cfg.batch.steps_per_rollout, cfg.dp
    if 0 < per_step < ranks:
        lower = "Lower it, or raise" if cfg.batch.steps_per_rollout > 1 else "Raise"
        yield (
            f"--num-steps-per-rollout {cfg.batch.steps_per_rollout} leaves {per_step} samples a "
            f"step for {ranks} data-parallel ranks. {lower} --rollout-batch-size "
            f"{cfg.batch.prompts} or --n-samples-per-prompt {cfg.batch.samples_per_prompt}."
        )


def over_sampling_covers_the_batch(cfg: Config) -> Iterator[str]:
    asked, wanted = cfg.rollout.over_sampling, cfg.batch.prompts
    if asked is not None and asked < wanted:
        yield (
            f"--over-sampling-batch-size {asked} is below --rollout-batch-size {wanted}. "
            f"Give more than {wanted}, for example {2 * wanted}."
        )


def responses_fit_the_engine(cfg: Config) -> Iterator[str]:
    """vLLM refuses a request that asks for more tokens than its context holds."""
    given = cfg.engine.vllm_args.get("max_model_len")
    positions = hf_config(cfg).get("max_position_embeddings")
    limit = int(str(given)) if str(given).isdigit() else positions
    if not limit or cfg.debug.no_engines:
        return
    name = f"--vllm-max-model-len {given}" if given else f"the model's {limit} positions"
    lengths = [("--rollout-max-response-len", cfg.rollout.max_response_len)]
    if cfg.eval.interval is not None and cfg.eval.max_response_len is not None:
        lengths.append(("--eval-max-response-len", cfg.eval.max_response_len))
    if cfg.eval.interval is not None and cfg.eval.config is not None:
        lengths += [
            (f"--eval-config, {d.name}: max_response_len", d.cfg.rollout.max_response_len)
            for d in eval_datasets(cfg)
        ]
    for flag, length in lengths:
        if length >= limit:
            yield f"{flag} {length} leaves no room for a prompt in {name}. Lower it."


def reference_is_in_every_checkpoint(cfg: Config) -> Iterator[str]:
    """The reference is the actor of an earlier rollout, and only actors are saved."""
    interval, save = cfg.algorithm.ref_update_interval, cfg.checkpoint.save_interval
    if interval is not None and save is not None and save % interval:
        yield (
            f"--ref-update-interval {interval} does not divide --save-interval {save}: a run that "
            f"continues would not have its reference. Give a multiple of {interval} to the second."
        )


def overlong_buffer_fits(cfg: Config) -> Iterator[str]:
    buffer, longest = cfg.algorithm.overlong_buffer_len, cfg.rollout.max_response_len
    if buffer is not None and buffer > longest:
        yield (
            f"--overlong-buffer-len {buffer} is more than --rollout-max-response-len {longest}. "
            "Lower it."
        )


def weights_are_due_in_time(cfg: Config) -> Iterator[str]:
    """What reads the engines' weights, or continues from a checkpoint, expects the newest there."""
    interval = cfg.engine.update_weights_interval
    name = f"--update-weights-interval {interval}"
    if interval > 1 and cfg.cluster.offload_rollout:
        yield (
            f"{name}: under --colocate engines drop their weights while the trainer works. Add "
            "--no-offload-rollout, or leave the interval out."
        )
    for other, value in (
        ("--eval-interval", cfg.eval.interval),
        ("--save-interval", cfg.checkpoint.save_interval),
    ):
        if value is not None and value % interval:
            yield (
                f"{name} does not divide {other} {value}. Give a multiple of {interval} to the "
                "second."
            )


def the_critic_has_a_part(cfg: Config) -> Iterator[str]:
    a, o, total = cfg.algorithm, cfg.optimizer, cfg.batch.num_rollout
    if a.needs_critic and total is not None and a.num_critic_only_steps >= total:
        yield (
            f"--num-critic-only-steps {a.num_critic_only_steps} leaves nothing of --num-rollout "
            f"{total} to train the actor. Lower the first, or raise the second."
        )
    for name, value in (
        ("--critic-lr", o.critic_lr),
        ("--critic-lr-warmup-iters", o.critic_lr_warmup_iters),
    ):
        if value is not None and not a.needs_critic:
            yield (
                f"{name} {value} has no effect without a critic. Add --advantage-estimator "
                f"{estimators_where(lambda e: e.critic)}, or leave it out."
            )
    if not o.critic_overrides:
        return
    name = f"--megatron-config-path {o.role_file}"
    if not a.needs_critic:
        yield (
            f"{name}: there is no critic. Add --advantage-estimator "
            f"{estimators_where(lambda e: e.critic)}, or drop its entry."
        )
    try:
        assert o.of_critic
    except ConfigError as error:
        yield from (f"{name}: of the critic, {problem}" for problem in error.problems)


def schedules_fit_the_run(cfg: Config) -> Iterator[str]:
    if cfg.debug.rollout_only:
        return
    problem = _problem_of_schedule(cfg, "--lr-warmup-iters")
    if problem is not None:
        yield problem
    elif cfg.algorithm.needs_critic:
        own = cfg.optimizer.critic_lr_warmup_iters is not None
        try:
            critic = cfg.of_critic
        except ConfigError:  # `the_critic_has_a_part` says why
            return
        flag = "--critic-lr-warmup-iters" if own else "--lr-warmup-iters"
        problem = _problem_of_schedule(critic, flag)
        if problem is not None:
            yield f"Of the critic: {problem}"


def _problem_of_schedule(cfg: Config, warmup_flag: str) -> str | None:
    o, total = cfg.optimizer, cfg.decay_steps
    warmup = f"{warmup_flag} {o.lr_warmup_iters}"
    if o.lr_warmup_fraction:
        warmup = f"--lr-warmup-fraction {o.lr_warmup_fraction}"
    decay = f"--lr-decay-style {o.lr_decay_style}"
    if total is None and (o.decay_ends or o.lr_warmup_fraction):
        return (
            f"{decay if o.decay_ends else warmup} depends on the length of the run, which the data "
            "decides. Give --num-rollout or --lr-decay-iters."
        )
    if total is not None and o.decay_ends and o.warmup_steps(total) >= total:
        longer = "--num-rollout" if o.lr_decay_iters is None else "--lr-decay-iters"
        return (
            f"{warmup} leaves none of {total} optimizer steps to {decay}. Lower it, or raise "
            f"{longer}."
        )
    return None


def loss_and_rollout_agree(cfg: Config) -> Iterator[str]:
    function, loss = cfg.rollout.function_path, cfg.algorithm.loss_type
    if loss == "sft_loss" and function == VLLM_ROLLOUT:
        yield (
            f"--loss-type sft_loss learns from given answers, and --rollout-function-path "
            f"{function} samples new ones. Add --rollout-function-path {SFT_ROLLOUT}."
        )
    if cfg.algorithm.wants_reward and function == SFT_ROLLOUT:
        yield (
            f"--rollout-function-path {function} makes no rewards, which --loss-type {loss} "
            "needs. Add --loss-type sft_loss."
        )
    loads = cfg.debug.load_rollout_data is not None
    if cfg.debug.train_only and not loads and function == VLLM_ROLLOUT:
        yield (
            f"--debug-train-only starts no engines, which --rollout-function-path {function} "
            "needs. Give a function that reads data itself, or drop --debug-train-only."
        )
    if cfg.debug.no_engines and cfg.eval.interval is not None and cfg.eval.function_path is None:
        name = "--debug-train-only" if cfg.debug.train_only else "--load-debug-rollout-data"
        yield (
            f"--eval-interval {cfg.eval.interval} needs engines, and {name} starts none. "
            "Drop one of the two."
        )
    if cfg.debug.rollout_only and (cfg.checkpoint.save or cfg.checkpoint.save_hf):
        yield (
            "--debug-rollout-only has no trainer whose weights --save or --save-hf could write. "
            "Drop them; --save-debug-rollout-data keeps the samples."
        )


RULES: tuple[Rule, ...] = (
    own_values_are_their_own,
    checkpoint_is_there,
    reference_is_there,
    teacher_is_there,
    folders_can_be_made,
    run_has_a_length,
    run_has_prompts,
    layout_fits_the_gpus,
    engine_fits_the_model,
    engines_fit_a_node,
    every_rank_gets_a_sample,
    over_sampling_covers_the_batch,
    responses_fit_the_engine,
    overlong_buffer_fits,
    reference_is_in_every_checkpoint,
    weights_are_due_in_time,
    the_critic_has_a_part,
    schedules_fit_the_run,
    loss_and_rollout_agree,
    evaluations_fit,
)


def converter_has_a_target(cfg: Config) -> Iterator[str]:
    if cfg.checkpoint.save is None:
        yield "--save is missing. Add --save FOLDER, where the converted checkpoint goes."


CONVERT_RULES: tuple[Rule, ...] = (checkpoint_is_there, converter_has_a_target)
