"""Megatron-core as the trainer. Only this package, and tests, import megatron."""

import warnings

# megatron-core says at import, once per module, that these optional accelerators are absent.
warnings.filterwarnings("ignore", message=r".*(Transformer Engine|Apex).*[Ff]alling back.*")
warnings.filterwarnings("ignore", message=r"full scope is deprecated.*")  # not our setting
