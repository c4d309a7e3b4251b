"""GPUs, ranks, engines and the model must fit each other."""

from __future__ import annotations

from collections.abc import Iterator

from vime.config import Config
from vime.config.evaluation import eval_datasets
from vime.config.hf_config import hf_config


def layout_fits_the_gpus(cfg: Config) -> Iterator[str]:
    layout, gpus = cfg.parallel, cfg.cluster.trainer_gpus
    for size, product in (
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
                f"{product} = {size} does not divide the {gpus} GPUs that train. Lower one of "
                f"them, or make --actor-num-nodes {cfg.cluster.actor_num_nodes} x "
                f"--actor-num-gpus-per-node {cfg.cluster.actor_gpus_per_node} a multiple of {size}."
            )


def engine_fits_the_model(cfg: Config) -> Iterator[str]:
    heads, size = hf_config(cfg).get("num_attention_heads"), cfg.cluster.gpus_per_engine
    if heads and heads % size and not cfg.debug.no_engines:
        yield (
            f"--rollout-num-gpus-per-engine {size} does not divide the model's {heads} attention "
            f"heads. Give a divisor of {heads}."
        )


def engines_fit_the_nodes(cfg: Config) -> Iterator[str]:
    """An engine lies on one node, or on several with all GPUs that the run may use there.

    Under --colocate these are the trainer's GPUs.
    """
    c, size = cfg.cluster, cfg.cluster.gpus_per_engine
    if cfg.debug.no_engines:
        return
    if c.colocate and not cfg.debug.rollout_only:
        if c.actor_num_nodes == 1:  # such an engine does not divide the trainer's GPUs
            return
        name, node = "--actor-num-gpus-per-node", c.actor_gpus_per_node
        wrong, remedy = node % size and size % node, f"a divisor or a multiple of {node}"
    else:
        name, node = "--num-gpus-per-node", c.gpus_per_node
        wrong, remedy = size > node and size % node, f"at most {node}, or a multiple of {node}"
    if wrong:
        yield (
            f"--rollout-num-gpus-per-engine {size} would put an engine on parts of two nodes, with "
            f"{name} {node}. Give {remedy}."
        )


def every_rank_gets_a_sample(cfg: Config) -> Iterator[str]:
    per_step, ranks = cfg.batch.samples // cfg.batch.steps_per_rollout, cfg.dp
    if 0 < per_step < ranks:
        lower = "Lower it, or raise" if cfg.batch.steps_per_rollout > 1 else "Raise"
        yield (
            f"--num-steps-per-rollout {cfg.batch.steps_per_rollout} leaves {per_step} samples per "
            f"step for {ranks} data-parallel ranks. {lower} --rollout-batch-size "
            f"{cfg.batch.prompts} or --n-samples-per-prompt {cfg.batch.samples_per_prompt}."
        )


def responses_fit_the_engine(cfg: Config) -> Iterator[str]:
    """vLLM refuses a request for more tokens than its context has room for."""
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
