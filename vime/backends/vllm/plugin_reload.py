"""How a bucket of new weights gets into a vLLM model; runs inside vLLM's workers.

Tensors go through vLLM's layerwise reload. `load_weights` alone fails for a linear layer that vLLM
has packed, because its plain weight is gone.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.distributed.weight_transfer.base import WeightTransferEngine
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from vime.weight_sync import wire

# On CUDA these methods leave weights as loaded, so new weights can be written in place.
PLAIN_METHODS = {"UnquantizedLinearMethod", "UnquantizedEmbeddingMethod"}


class ReloadingReceiver(WeightTransferEngine):
    """One update: start, any number of buckets, finish. Subclasses receive the buckets.

    If a bucket fails, the model keeps its previous weights, except for tensors that were written in
    place. The trainer marks this engine as broken, and the next update writes all tensors.
    """

    in_place = False

    def start_weight_update(self) -> None:
        self.loaded: set[str] = set()
        self.in_place = self.device.type == "cuda" and keeps_plain_weights(self.model)
        self.wanted = parameter_names(self.model)
        if not self.in_place:
            initialize_layerwise_reload(self.model)
            # The model now has the parameters that it was built with. Tied weights are gone, and
            # so are derived tensors, such as W_UK_T of latent attention. The end of the update
            # derives them again, so the trainer need not send them.
            self.wanted &= parameter_names(self.model)

    def update_weights(self, update_info: dict) -> None:
        try:
            self.receive_weights(self.parse_update_info(update_info))
            if self.device.type != "cpu":
                torch.accelerator.synchronize()
        except BaseException:
            self._finish_reload()
            raise

    def load(self, packed: torch.Tensor, entries: list[wire.Entry]) -> None:
        """Load a bucket.

        Unless weights are written in place, `packed` must not change until the update ends: a layer
        keeps views of it until the layer's last tensor has arrived.
        """
        self.loaded |= self.model.load_weights(wire.unpack(packed, entries)) or set()

    def finish_weight_update(self) -> None:
        self._finish_reload()
        loaded, self.loaded = self.loaded, set()  # a clean-up may finish the update a second time
        missing = self.wanted - loaded
        if missing and loaded and self.model_config.quantization is None:
            raise RuntimeError(f"this update left old weights in {sorted(missing)[:8]}")

    def _finish_reload(self) -> None:
        if self.in_place:
            return
        finalize_layerwise_reload(self.model, self.model_config)
        if self.device.type == "cpu":
            repack_for_cpu(self.model)

    def shutdown(self) -> None:
        pass

    @staticmethod
    def trainer_send_weights(iterator: Any, trainer_args: Any) -> None:
        """vLLM 0.25 requires this method. vime's trainer sends with `weight_sync.WeightSender`."""
        raise TypeError("weights for this engine are sent by vime.weight_sync.WeightSender")


def parameter_names(model: torch.nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters()}


def keeps_plain_weights(model: torch.nn.Module) -> bool:
    """Whether loading can write each weight in place: nothing is packed, merged or quantized.

    Experts may be packed, and latent attention keeps products of its weights.
    """
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if method is not None and type(method).__name__ not in PLAIN_METHODS:
            return False
        if type(module).__name__.startswith("MLA"):
            return False
    return True


def repack_for_cpu(model: torch.nn.Module) -> None:
    """Refresh the packed copies that vLLM's layerwise reload forgets on CPU (0.32).

    A tied lm_head shares its weight with the embedding, so it is not reloaded and keeps its old
    packed copy. Unquantized MoE experts are packed on the first load only. This can go when the
    reload packs both; `tests/cpu/test_live_engine.py` compares the outputs.
    """
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    head = getattr(model, "lm_head", None)
    embedding = getattr(getattr(model, "model", None), "embed_tokens", None)
    tied = embedding is not None and getattr(head, "weight", None) is embedding.weight
    if tied and hasattr(head, "cpu_linear"):
        dispatch_cpu_unquantized_gemm(head, remove_weight=False)
    for module in model.modules():
        kernel = getattr(getattr(module, "quant_method", None), "moe_kernel", None)
        if kernel is not None and hasattr(module, "w13_weight"):
            kernel.fused_experts.process_weights_after_loading(module)
