"""Megatron-core as the trainer. Only this package, and tests, import megatron."""

import logging
import warnings

# megatron-core says at import, once per module, that these optional accelerators are absent.
warnings.filterwarnings("ignore", message=r".*(Transformer Engine|Apex).*[Ff]alling back.*")
warnings.filterwarnings("ignore", message=r"full scope is deprecated.*")  # not our setting
# 0.19, of parts that nothing here uses:
warnings.filterwarnings("ignore", message=r"Mimo\w+ is experimental.*")
warnings.filterwarnings("ignore", category=SyntaxWarning, module=r".*megatron.*")
# The only warning of this module in 0.19 names GPTModel's successor; in 0.16 there is none.
logging.getLogger("megatron.core.models.gpt.gpt_model").setLevel(logging.ERROR)
