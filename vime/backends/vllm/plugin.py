"""vLLM calls `register` in each of its processes (entry point group vllm.general_plugins).

Importing vime's plugin changes nothing for other users of vLLM: transports are registered by name,
and the rest happens only in servers that `VLLMEngine` started, which `SERVED_BY_VIME` marks.
"""

from __future__ import annotations

import os

from vime.backends.vllm.guard import die_with_parent

SERVED_BY_VIME = "VIME_ENGINE"  # set in the environment of the servers that vime starts
FORK_ENGINE_CORE = "VIME_FORK_ENGINE_CORE"  # CPU, one worker: fork EngineCore instead of spawning
SEEDS_ON_CPU = "VIME_SEEDS_ON_CPU"  # CPU: let a seeded request's prompt be split over steps

ROTARY_ON_CPU = "VIME_ROTARY_ON_CPU"  # CPU: rotate all heads of latent attention

TRANSFER_ENGINES = {
    "vime_shm": "SharedMemoryEngine",
    "vime_gloo": "GlooEngine",
    "vime_nccl": "NcclEngine",
    "vime_ipc": "CudaIpcEngine",
}


def register() -> None:
    """Make the weight transports known, and tie this process's life to its parent's."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory as factory

    for name, cls in TRANSFER_ENGINES.items():
        if name not in factory._registry:
            factory.register_engine(name, "vime.backends.vllm.plugin_transfer", cls)
    if os.environ.get(SERVED_BY_VIME):
        die_with_parent()
        os.register_at_fork(after_in_child=die_with_parent)
        inspect_models_here()
    if os.environ.get(FORK_ENGINE_CORE):
        fork_engine_core()
    if os.environ.get(SEEDS_ON_CPU):
        from vllm.v1.worker.cpu_model_runner import CPUModelRunner

        keep_seeds_of_split_prompts(CPUModelRunner)
    if os.environ.get(ROTARY_ON_CPU):
        from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

        rotate_every_head(RotaryEmbedding)


def inspect_models_here() -> None:
    """Let a server look at the model's class in its own process.

    vLLM asks a new process, lest the import make use of CUDA before it forks, and keeps the answer
    in a cache. The first start on a machine waits for it: 15 s on 2 cores, 27 s beside an H100; the
    import itself takes 2 s, and EngineCore, which is forked, needs it anyway. Where CUDA is in use
    vLLM spawns EngineCore instead.
    """
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda inspect: inspect()


def fork_engine_core() -> None:
    """Let EngineCore inherit the server's imported modules, which saves about 11 s on 2 cores.

    vLLM forks on GPUs, and spawns on CPU for the sake of thread binding in worker processes. With
    one worker inside EngineCore there is none to bind.
    """
    from vllm.platforms.cpu import CpuPlatform

    check = CpuPlatform.check_and_update_config
    if getattr(check, "forks", False):
        return

    def check_then_fork(cls, vllm_config) -> None:
        check(vllm_config)
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"

    check_then_fork.forks = True
    CpuPlatform.check_and_update_config = classmethod(check_then_fork)


def keep_seeds_of_split_prompts(runner: type) -> None:
    """Let a step that only prefills part of a prompt leave that request's generator alone.

    vLLM (0.25 to 0.32) samples for such a request too, throws the token away and rewinds the
    generator with `set_offset`, which torch's CPU generators refuse: the engine dies. Here these
    generators are out of sight while that step samples, so there is nothing to rewind.
    """
    if getattr(runner, "keeps_seeds", False) or not all(
        hasattr(runner, name) for name in ("_sample", "_bookkeeping_sync")
    ):
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
    runner.keeps_seeds = True


def rotate_every_head(rotary: type) -> None:
    """Let latent attention on CPU rotate its queries by vLLM's own PyTorch code.

    It passes queries as [tokens, heads, channels]. The compiled function of vLLM 0.32 is right for
    [tokens, heads x channels] alone, which all other models pass: answers of Moonlight were noise.
    tests/cpu/test_vllm_symbols.py fails once it is right for both; this can go then.
    """
    if getattr(rotary, "rotates_every_head", False) or not hasattr(rotary, "forward_native"):
        return
    compiled = rotary.forward_cpu

    def forward_cpu(self, positions, query, key=None):
        forward = compiled if query.dim() == 2 else type(self).forward_native
        return forward(self, positions, query, key)

    rotary.forward_cpu = forward_cpu
    rotary.rotates_every_head = True
