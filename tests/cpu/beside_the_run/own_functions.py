"""A user's functions, in a folder that no node has on its path: --working-dir brings it there.

They write down where they run and which environment they find.
"""

import json
import os
import re
import socket
import urllib.error
import urllib.request
from pathlib import Path

NAMES = ("VLLM_API_KEY", "OWN_VARIABLE", "http_proxy")


def note(args, **facts) -> None:
    facts |= {"host": socket.gethostname(), "env": {n: os.environ.get(n) for n in NAMES}}
    with open(Path(args.run_dir) / "notes.jsonl", "a") as f:
        f.write(json.dumps(facts) + "\n")


def at_a_ranks_start(args) -> None:
    import torch.distributed as dist

    note(args, rank=dist.get_rank())


async def share_of_sevens(args, sample, **kwargs) -> float:
    if sample.index == 0:
        logs = sorted(Path(args.run_dir).glob("logs/engine-*.log"))
        note(args, without_key={log.name: asked_without_key(log) for log in logs})
    return sample.response.count("7") / max(1, sample.response_length)


def asked_without_key(log: Path) -> list:
    """[the address on which an engine listens, the status of a request without a key]"""
    host, port = re.search(r"'host': '(\S+)', 'port': (\d+)", log.read_text()).groups()
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        return [host, direct.open(f"{url}/v1/models", timeout=10).status]
    except urllib.error.HTTPError as error:
        return [host, error.code]
