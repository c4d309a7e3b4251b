"""Every symbol that vime patches still exists, and the patches are what they say."""

from __future__ import annotations

import inspect

import pytest
from ranks import run_ranks

from vime.backends.megatron import compat
from vime.patches import Patch, resolve

PATCHES = [*compat.CPU_PATCHES, *compat.PATCHES]


@pytest.mark.parametrize("patch", PATCHES, ids=lambda p: p.name)
def test_every_patched_symbol_exists(patch: Patch) -> None:
    for symbol in patch.symbols:
        resolve(symbol)
    assert patch.why
    assert patch.until


def test_a_symbol_that_is_gone_is_noticed() -> None:
    with pytest.raises(AttributeError):
        resolve("megatron.core.jit.no_such_function")
    with pytest.raises(ImportError):
        resolve("no_such_package.function")


def apply_twice(rank: int, world: int, port: int) -> dict[str, bool]:
    import torch

    compat.apply()
    zeros = torch.zeros
    compat.apply()
    t = torch.zeros(2, device="cuda", pin_memory=True)
    return {
        "once": torch.zeros is zeros,
        "on cpu": t.device.type == "cpu" and t.cuda() is t,
        "type": t.type() == "torch.cuda.FloatTensor",
        "converts": t.type(torch.float64).dtype == torch.float64,
    }


def test_patches_apply_once_and_stand_in_for_cuda() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA: nothing is stood in for")
    (seen,) = run_ranks(apply_twice, 1)
    assert all(seen.values()), seen


def test_latent_attention_overrides_what_is_there() -> None:
    from megatron.core.transformer.multi_latent_attention import MLASelfAttention

    assert "submodules" in inspect.signature(MLASelfAttention.__init__).parameters
    asked = getattr(MLASelfAttention, "_resolve_qk_norm_config", None)
    if asked is not None:  # from megatron-core 0.19 on
        assert list(inspect.signature(asked).parameters) == ["self", "submodules"]
