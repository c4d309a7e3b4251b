"""One small example of every hook that the trainer calls, on each of its ranks.

Each flag takes the dotted path of a function, with the repository on PYTHONPATH. `args` holds every
flag under its own name. docs/algorithms.md has the table, and examples for losses and advantages.
"""

from __future__ import annotations

import torch


# --custom-megatron-init-path: called after the ranks connect, before the model is built.
def print_rank(args):
    print(f"rank {torch.distributed.get_rank()} of {args.world_size}")


# --custom-model-provider-path: returns a chunk of Megatron's model, changed or replaced.
def with_embeddings_held(args, model):
    if model.pre_process:
        model.embedding.requires_grad_(False)
    return model


# --custom-megatron-before-log-prob-hook-path: called with "ref_" before the reference's pass.
def announce_pass(args, model, store_prefix):
    print(f"log-probabilities of {store_prefix or 'the actor'}: {len(model)} chunks")


# --custom-megatron-before-train-step-hook-path: here it lowers the learning rate at the start.
def start_gently(args, rollout_id, step_id, model, optimizer, opt_param_scheduler):
    if rollout_id < 2:
        for group in optimizer.param_groups:
            group["lr"] = args.lr / 2
