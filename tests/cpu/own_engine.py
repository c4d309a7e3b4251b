"""Runs one decoupled engine until killed: `python -m tests.cpu.own_engine HF_DIR RUN_DIR`.

It listens on an IPv6 address if this machine has one.
"""

from __future__ import annotations

import sys
import time

from tests.cpu.tiny import make_config
from tests.unit.test_addresses import has_ipv6
from vime.addresses import LOOPBACK
from vime.backends.vllm.engine import VLLMEngine

LIFETIME_S = 3600


def main() -> None:
    hf_dir, run_dir = sys.argv[1:]
    cfg = make_config(hf_dir, cluster={"actor_gpus_per_node": 1}, log={"run_dir": run_dir})
    engine = VLLMEngine(cfg, 1, [0], host="::1" if has_ipv6() else LOOPBACK)
    url = engine.start()
    print(url, engine.process.guard.pid, flush=True)
    time.sleep(LIFETIME_S)


if __name__ == "__main__":
    main()
