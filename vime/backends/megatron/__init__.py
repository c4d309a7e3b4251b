"""The trainer, on Megatron-core. Only this package and tests import megatron."""

import logging
import warnings

# Each megatron-core module warns at import that these optional packages are absent.
warnings.filterwarnings("ignore", message=r".*(Transformer Engine|Apex).*[Ff]alling back.*")
warnings.filterwarnings("ignore", message=r"full scope is deprecated.*")  # vime does not set it
# megatron-core 0.19 warns about parts that vime does not use.
warnings.filterwarnings("ignore", message=r"Mimo\w+ is experimental.*")
warnings.filterwarnings("ignore", category=SyntaxWarning, module=r".*megatron.*")
# The only warning of this module, in 0.19, names the successor of GPTModel.
logging.getLogger("megatron.core.models.gpt.gpt_model").setLevel(logging.ERROR)
# It takes the mark of an unfinished save, which vime writes first, for an old checkpoint.
logging.getLogger("megatron.core.dist_checkpointing.serialization").setLevel(logging.ERROR)
