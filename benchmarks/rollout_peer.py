"""The peer of `benchmarks/rollout.py` and `gpu_rollout.py`: the engine in process, without HTTP.

`python benchmarks/rollout_peer.py MODEL ENGINE_ARGS` takes ENGINE_ARGS in JSON and prints "ready".
Then it reads JSON lines {"prompts": [token ids, ..], "max_tokens": n}, and answers each with the
seconds and the CPU seconds of its generation.
"""

from __future__ import annotations

import json
import os
import sys
import time


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM's output must not mix with the answers
    from vllm import LLM, SamplingParams, TokensPrompt

    llm = LLM(
        model=sys.argv[1],
        disable_log_stats=True,
        logprobs_mode="processed_logprobs",
        enable_prefix_caching=True,
        **json.loads(sys.argv[2]),
    )
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        params = SamplingParams(
            temperature=1.0,
            max_tokens=task["max_tokens"],
            ignore_eos=True,
            logprobs=0,
            detokenize=False,
        )
        prompts = [TokensPrompt(prompt_token_ids=ids) for ids in task["prompts"]]
        before, started = os.times(), time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        after, seconds = os.times(), time.perf_counter() - started
        assert all(len(o.outputs[0].token_ids) == task["max_tokens"] for o in outputs)
        cpu_s = sum(after[:2]) - sum(before[:2])
        print(json.dumps({"seconds": seconds, "cpu_s": cpu_s}), file=answers, flush=True)


if __name__ == "__main__":
    main()
