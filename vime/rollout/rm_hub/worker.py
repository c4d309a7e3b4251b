"""A worker process: `python -m vime.rollout.rm_hub.worker` answers each line with a line of JSON.

The parent writes lines `DEADLINE_S TASK`; the task is pickled, in base64.

The worker ends shortly after the deadline of a task, so that it does not outlive a killed parent.
Its memory is limited, so that `9**9**9` costs one worker and not the machine.
"""

from __future__ import annotations

import base64
import importlib
import importlib.util
import json
import logging
import os
import pickle
import resource
import signal
import sys

from vime.rollout.rm_hub.grader import GradingFailed
from vime.rollout.rm_hub.registry import GRADERS

MEMORY_BYTES = 4 << 30


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # a grader's prints must not mix with the answers
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that it has no deadline
    for package in {grader.needs_package for grader in GRADERS.values()} - {None}:
        if importlib.util.find_spec(package):
            importlib.import_module(package)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.set_int_max_str_digits(0)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        deadline_s, task = line.split()
        # The kernel's default action ends even a computation that never returns to Python.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, float(deadline_s) + 2)
        print(run(task), file=answers, flush=True)
        signal.setitimer(signal.ITIMER_REAL, 0)


def run(task: str) -> str:
    """{"reward": ..} or {"failure": ..}, as JSON."""
    try:
        grader, *subject = pickle.loads(base64.b64decode(task))
        return json.dumps({"reward": GRADERS[grader].grade(*subject)})
    except GradingFailed as error:
        return json.dumps({"failure": str(error)})
    except Exception as error:
        return json.dumps({"failure": f"{type(error).__name__}: {error}"[:300]})


if __name__ == "__main__":
    main()
