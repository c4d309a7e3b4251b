"""Between Hugging Face folders and Megatron's model: names, layouts, files, by model family.

Nothing here imports Megatron before it is used: the driver checks configurations with it too.
"""

from vime.backends.megatron.hf.check import check_model_args, check_training
from vime.backends.megatron.hf.export import export_hf
from vime.backends.megatron.hf.family import Family
from vime.backends.megatron.hf.files import read_config
from vime.backends.megatron.hf.folder import save_hf
from vime.backends.megatron.hf.load import load_hf_weights
from vime.backends.megatron.hf.registry import (
    FAMILIES,
    described_by,
    family_for,
    in_stored_dtype,
    model_args,
)

__all__ = [
    "FAMILIES",
    "Family",
    "check_model_args",
    "check_training",
    "described_by",
    "export_hf",
    "family_for",
    "in_stored_dtype",
    "load_hf_weights",
    "model_args",
    "read_config",
    "save_hf",
]
