"""The parts of vLLM that vime uses although they are no public API exist in this release."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys

import pytest
import torch

from tests.cpu.tiny import make_config, write_tiny_hf
from vime.backends.vllm.cpu import HEAD_SIZES
from vime.backends.vllm.flags import check_vllm_flags
from vime.backends.vllm.plugin_patches import PATCHES
from vime.patches import Patch, resolve

vllm = pytest.importorskip("vllm", reason="needs vLLM")


@pytest.mark.parametrize("patch", PATCHES, ids=lambda p: p.name)
def test_every_patched_symbol_exists(patch: Patch):
    for symbol in patch.symbols:
        resolve(symbol)
    assert patch.why
    assert patch.until


def test_the_plugin_registers_its_transports():
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory as factory

    from vime.backends.vllm import plugin

    plugin.register()
    plugin.register()  # vLLM may call it more than once
    names = [plugin.vllm_name(transport) for transport in plugin.RECEIVERS]
    assert sorted(names) == sorted(n for n in factory._registry if n.startswith("vime_"))
    assert len(names) == 4
    for name in names:
        engine = factory._registry[name]()
        assert not engine.__abstractmethods__
        assert callable(engine.trainer_send_weights), "abstract in vLLM 0.25"


def test_vllm_runs_the_part_of_an_engine_that_has_no_server():
    from vllm.config import ParallelConfig
    from vllm.entrypoints.cli.serve import run_headless

    from vime.backends.vllm.plugin_flags import serve_parser

    assert list(inspect.signature(run_headless).parameters) == ["args"]
    given = ["--nnodes", "2", "--node-rank", "1", "--master-addr", "fd00::1"]
    args = serve_parser().parse_args([*given, "--master-port", "29501", "--headless"])
    assert (args.nnodes, args.node_rank, args.master_port) == (2, 1, 29501)
    assert hasattr(args, "api_server_count")
    assert hasattr(ParallelConfig, "node_rank_within_dp")


def test_a_worker_reads_the_file_of_its_own_node(tmp_path, monkeypatch):
    from vime.backends.vllm.plugin_receivers import SharedBucket, SharedMemoryReceiver
    from vime.weight_sync import wire
    from vime.weight_sync.choice import NODE

    entries = wire.entries_of([("w", torch.zeros(16))])
    paths = {}
    for number, host in enumerate(("10.0.0.1", "fd00::2")):
        paths[host] = str(tmp_path / str(number))
        torch.from_file(paths[host], shared=True, size=16, dtype=torch.float32).fill_(number)
    receiver, got = object.__new__(SharedMemoryReceiver), []
    receiver.load = lambda packed, entries: got.append(dict(wire.unpack(packed, entries))["w"])
    monkeypatch.setenv(NODE, "fd00::2")
    receiver.receive_weights(SharedBucket(entries, paths))
    assert torch.equal(got[0], torch.ones(16))
    monkeypatch.setenv(NODE, "10.0.0.9")
    with pytest.raises(RuntimeError, match="node 10.0.0.9; trainer ranks are on 10.0.0.1, fd00::2"):
        receiver.receive_weights(SharedBucket(entries, paths))


def test_a_server_of_vime_looks_at_the_model_without_another_process(tmp_path):
    """In a process like a server's, with the empty cache of a new machine."""
    script = """
import sys
from vllm.config import ModelConfig
from vllm.model_executor.models import registry
from vime.backends.vllm.plugin_patches import INSPECT_MODELS_HERE
assert registry._SUBPROCESS_COMMAND
registry._SUBPROCESS_COMMAND = ["false"]  # a call of another process fails
INSPECT_MODELS_HERE.apply()
print(ModelConfig(model=sys.argv[1], skip_tokenizer_init=True).architecture)
"""
    folder = write_tiny_hf(tmp_path / "hf")
    env = {**os.environ, "VLLM_CACHE_ROOT": str(tmp_path / "cache")}
    words = [sys.executable, "-c", script, str(folder)]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1:] == ["Qwen3ForCausalLM"], done.stderr
    assert [p.stem.rsplit("-")[-1] for p in (tmp_path / "cache/modelinfos").iterdir()] == [
        "Qwen3ForCausalLM"
    ]


def test_vllm_finds_the_plugin():
    from importlib.metadata import entry_points

    found = {e.name: e.value for e in entry_points(group="vllm.general_plugins")}
    assert found["vime_weights"] == "vime.backends.vllm.plugin:register"


def test_the_packed_route_finds_what_it_uses():
    from vllm.config import ModelConfig
    from vllm.logprobs import FlatLogprobs
    from vllm.sampling_params import RequestOutputKind, SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM

    from vime.backends.vllm.plugin_route import client_errors, parse

    fields = {"flat_logprobs", "skip_clone", "output_kind", "logprobs", "detokenize"}
    assert fields <= set(SamplingParams.__struct_fields__)
    assert {"logprobs", "start_indices"} <= set(FlatLogprobs.__dataclass_fields__)
    assert "tokenizer" in ModelConfig.__dataclass_fields__
    assert "self.model_config = " in inspect.getsource(AsyncLLM.__init__)
    assert [*inspect.signature(AsyncLLM.generate).parameters][1:4] == [
        "prompt",
        "sampling_params",
        "request_id",
    ]
    prompt, params = parse(b'{"token_ids": [1, 2], "sampling_params": {"top_k": 3}, "stream": 0}')
    assert prompt["prompt_token_ids"] == [1, 2]
    assert params.top_k == 3
    assert params.output_kind is RequestOutputKind.FINAL_ONLY
    errors = client_errors()
    assert errors
    assert all(issubclass(error, Exception) for error in errors)


def test_layerwise_reload_and_the_cpu_repack_are_there():
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
    from vllm.model_executor.model_loader.reload import (
        finalize_layerwise_reload,
        initialize_layerwise_reload,
    )

    assert callable(initialize_layerwise_reload)
    assert callable(finalize_layerwise_reload)
    assert "remove_weight" in inspect.signature(dispatch_cpu_unquantized_gemm).parameters


def test_a_reload_ends_by_deriving_the_weights_of_latent_attention_again():
    """W_UK_T and W_UV are products of kv_b_proj: `finish_weight_update` does not demand them."""
    from vllm.model_executor.layers.attention import MLAAttention
    from vllm.model_executor.model_loader.reload import layerwise

    assert "kv_b_proj" in inspect.getsource(MLAAttention.process_weights_after_loading)
    assert "process_weights_after_loading(" in inspect.getsource(
        layerwise._finalize_attention_layer
    )


def test_moe_experts_can_be_packed_again():
    import importlib

    unquantized = importlib.import_module(
        "vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method"
    )
    assert "moe_kernel" in inspect.getsource(unquantized)


def test_the_cpu_platform_chooses_spawn_where_we_choose_fork():
    from vllm.platforms.cpu import CpuPlatform

    assert inspect.ismethod(CpuPlatform.check_and_update_config)
    assert "VLLM_WORKER_MULTIPROC_METHOD" in inspect.getsource(inspect.getmodule(CpuPlatform))


def test_the_cpu_runner_rewinds_generators_where_we_keep_them():
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    assert callable(CPUModelRunner._sample)
    assert "set_offset" in inspect.getsource(CPUModelRunner._bookkeeping_sync)
    assert "discard_request_mask" in inspect.getsource(CPUModelRunner._bookkeeping_sync)


def test_on_cpu_vllm_rotates_queries_of_three_dimensions_wrongly_and_the_patch_rightly():
    """The last line fails when vLLM is right: `rotate_every_head` can go then."""
    from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding

    from vime.backends.vllm.plugin_patches import rotate_every_head

    query, positions = torch.randn(5, 3, 8), torch.arange(5)
    rotary = RotaryEmbedding.__new__(RotaryEmbedding)
    torch.nn.Module.__init__(rotary)
    rotary.head_size = rotary.rotary_dim = 8
    rotary.is_neox_style, rotary.base, rotary.max_position_embeddings = False, 1e4, 16
    rotary.cos_sin_cache = RotaryEmbedding._compute_cos_sin_cache(rotary)
    wanted, _ = rotary.forward_native(positions, query.clone(), query[:, :1].clone())

    class Ours(RotaryEmbedding):
        pass

    rotate_every_head(Ours)
    found, _ = Ours.forward_cpu(rotary, positions, query.clone(), query[:, :1].clone())
    torch.testing.assert_close(found, wanted)
    theirs, _ = RotaryEmbedding.forward_cpu(rotary, positions, query.clone(), query[:, :1].clone())
    assert not torch.allclose(theirs, wanted)


def test_latent_attention_on_cpu_can_be_chosen_where_the_cpu_has_amx(monkeypatch):
    """vLLM's own choice there refuses float32 weights."""
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.attention.selector import AttentionSelectorConfig

    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    asked = AttentionSelectorConfig(96, torch.float32, None, None, use_mla=True)
    chosen = CpuPlatform.get_attn_backend_cls(AttentionBackendEnum["CPU_MLA"], asked)
    assert chosen == AttentionBackendEnum["CPU_MLA"].get_path()
    own_choice = CpuPlatform.get_attn_backend_cls(None, asked)
    assert own_choice != chosen  # else the flag can go


def test_the_cpu_head_sizes_are_those_of_vllm():
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    assert tuple(CPUAttentionBackend.get_supported_head_sizes()) == HEAD_SIZES


def test_workers_have_what_the_extension_needs():
    from vllm.v1.worker.worker_base import WorkerBase

    from vime.backends.vllm.plugin_worker import WorkerExtension

    ours = {n for n in vars(WorkerExtension) if not n.startswith("__")}
    assert not ours & set(dir(WorkerBase)), "vLLM refuses an extension that shadows its own"
    assert "rank" in inspect.signature(WorkerBase.__init__).parameters


def test_wrong_flags_are_refused_with_the_nearest_name_and_right_ones_remembered(
    tied_checkpoint, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    given = {"max_num_sequences": "8", "block_size": "many", "swap": True, "stream_interval": "4"}
    cfg = make_config(tied_checkpoint, engine={"vllm_args": given})
    problems = {p.split()[0].rstrip(":"): p for p in check_vllm_flags(cfg)}
    assert "Did you mean --vllm-max-num-seqs?" in problems["--vllm-max-num-sequences"]
    assert "many" in problems["--vllm-block-size"]
    assert "no such flag" in problems["--vllm-swap"]
    assert "--vllm-stream-interval" not in problems

    monkeypatch.setattr("vime.backends.vllm.flags.subprocess", None)  # the cache must answer
    right = make_config(tied_checkpoint, engine={"vllm_args": {"stream_interval": "4"}})
    assert check_vllm_flags(right) == []
    wrong = make_config(tied_checkpoint, engine={"vllm_args": {"stream_intervall": "4"}})
    assert "Did you mean --vllm-stream-interval?" in check_vllm_flags(wrong)[0]
    again = {p.split()[0].rstrip(":"): p for p in check_vllm_flags(cfg)}
    assert again == problems


def test_importing_our_rooms_does_not_import_vllm():
    code = (
        "import sys, json, vime.weight_sync, vime.backends.vllm.engine, vime.backends.vllm.flags;"
        "import vime.backends.vllm.router;"
        "print(json.dumps([m for m in ('vllm', 'ray', 'megatron') if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert json.loads(done.stdout.splitlines()[-1]) == []


def test_vllm_still_logs_how_much_memory_it_lacks():
    """`engine_remedy` reads these sentences."""
    from importlib.util import find_spec
    from pathlib import Path

    folder = Path(find_spec("vllm").origin).parent / "v1"
    source = "".join((folder / name).read_text() for name in MEMORY_SPEAKERS)
    said = "".join(part for part in re.split(r'"\n\s*f?"', source))
    for sentence in (
        "GiB) on startup is less than desired GPU memory utilization (",
        "No available memory for the cache blocks",
        "To serve at least one request with the model's max seq len ",
        "GiB KV cache is needed, which is larger than the available KV cache memory (",
        "the estimated maximum model length is {",
    ):
        assert sentence in said


MEMORY_SPEAKERS = ("worker/utils.py", "core/kv_cache_utils.py")


def test_the_server_knows_how_many_tokens_a_request_has():
    """The versions of tokens, for releases that do not report them, rely on these names."""
    from vllm.v1.engine import detokenizer, output_processor
    from vllm.v1.engine.async_llm import AsyncLLM

    states = inspect.getsource(output_processor.OutputProcessor.__init__)
    assert "self.request_states" in states
    assert "external_req_id" in inspect.signature(output_processor.RequestState).parameters
    assert callable(detokenizer.IncrementalDetokenizer.num_output_tokens)
    reports = (
        "weight_version"
        in inspect.signature(output_processor.OutputProcessor.process_outputs).parameters
    )
    assert hasattr(AsyncLLM, "update_weight_version") == reports


def test_a_request_can_have_a_prefix_cache_of_its_own():
    from vllm.inputs.engine import tokens_input

    assert tokens_input([1], cache_salt="3")["cache_salt"] == "3"
