"""Every change that vime makes to vLLM, why, and until when.

Only the servers that vime starts are changed: `environment` in `server.py` names the patches that a
server needs, and `plugin.register` applies them in each of the server's processes.
"""

from __future__ import annotations

import os

from vime.patches import Patch


def _inspect_models_here() -> None:
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda inspect: inspect()


def _fork_processes() -> None:
    from vllm.platforms.cpu import CpuPlatform

    check = CpuPlatform.check_and_update_config

    def check_then_fork(cls, vllm_config) -> None:
        check(vllm_config)
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"

    CpuPlatform.check_and_update_config = classmethod(check_then_fork)


def _seeds_of_split_prompts() -> None:
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    keep_seeds_of_split_prompts(CPUModelRunner)


def keep_seeds_of_split_prompts(runner: type) -> None:
    """Hide the generators of half-prefilled requests from a step, so that it rewinds none."""
    if not all(hasattr(runner, name) for name in ("_sample", "_bookkeeping_sync")):
        return
    sample, keep_books = runner._sample, runner._bookkeeping_sync

    def sample_finished_prompts(self, *args, **kwargs):
        batch = self.input_batch
        unfinished = self.discard_request_mask.np[: batch.num_reqs].nonzero()[0].tolist()
        self.vime_held_back = {
            i: batch.generators.pop(i) for i in unfinished if i in batch.generators
        }
        return sample(self, *args, **kwargs)

    def keep_books_and_generators(self, *args, **kwargs):
        try:
            return keep_books(self, *args, **kwargs)
        finally:
            self.input_batch.generators.update(self.vime_held_back)

    runner._sample = sample_finished_prompts
    runner._bookkeeping_sync = keep_books_and_generators


def _rotary_of_every_head() -> None:
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    rotate_every_head(RotaryEmbedding)


def rotate_every_head(rotary: type) -> None:
    """Rotate queries of [tokens, heads, channels] by vLLM's own PyTorch code."""
    if not hasattr(rotary, "forward_native"):
        return
    compiled = rotary.forward_cpu

    def forward_cpu(self, positions, query, key=None):
        forward = compiled if query.dim() == 2 else type(self).forward_native
        return forward(self, positions, query, key)

    rotary.forward_cpu = forward_cpu


INSPECT_MODELS_HERE = Patch(
    "inspect models here",
    "vLLM looks at the model's class in a new process, so that the import cannot use CUDA before "
    "vLLM forks, and caches the answer. The first start on a machine waits for that process: 15 s "
    "on 2 cores, 27 s beside an H100. The import itself takes 2 s, and the forked EngineCore needs "
    "it anyway. Where CUDA is in use vLLM spawns EngineCore instead",
    "vLLM inspects models without another process",
    ("vllm.model_executor.models.registry._run_in_subprocess",),
    _inspect_models_here,
)
FORK_PROCESSES = Patch(
    "fork processes",
    "vLLM forks on GPUs but spawns on CPU, because it binds the threads of worker processes. vime "
    "turns that off. A forked EngineCore inherits the server's imported modules, and so do the "
    "workers of a larger engine, which saves about 11 s of CPU time for each process",
    "vLLM forks its processes on CPU where VLLM_CPU_OMP_THREADS_BIND is nobind",
    ("vllm.platforms.cpu.CpuPlatform.check_and_update_config",),
    _fork_processes,
)
SEEDS_OF_SPLIT_PROMPTS = Patch(
    "seeds of split prompts",
    "a step that prefills a part of a prompt samples for that request too, throws the token away "
    "and rewinds the request's generator with set_offset, which torch's CPU generators refuse: the "
    "engine dies (0.25 to 0.32)",
    "vLLM on CPU leaves the generators of unfinished prompts alone",
    (
        "vllm.v1.worker.cpu_model_runner.CPUModelRunner._sample",
        "vllm.v1.worker.cpu_model_runner.CPUModelRunner._bookkeeping_sync",
    ),
    _seeds_of_split_prompts,
)
ROTARY_OF_EVERY_HEAD = Patch(
    "rotary of every head",
    "latent attention passes queries as [tokens, heads, channels]. The compiled CPU function is "
    "right only for [tokens, heads x channels], the shape that all other models pass: the answers "
    "of Moonlight were noise (0.32)",
    "the compiled function is right for both shapes; a test in test_vllm_symbols.py fails then",
    (
        "vllm.model_executor.layers.rotary_embedding.base.RotaryEmbedding.forward_cpu",
        "vllm.model_executor.layers.rotary_embedding.base.RotaryEmbedding.forward_native",
    ),
    _rotary_of_every_head,
)

PATCHES = (INSPECT_MODELS_HERE, FORK_PROCESSES, SEEDS_OF_SPLIT_PROMPTS, ROTARY_OF_EVERY_HEAD)
