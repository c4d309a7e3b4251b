"""`--rm-type remote_rm`: POST {prompt, response, label} to --rm-url; the answer is the reward."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

from vime.rollout.rm_hub.grader import Grader, GradingFailed, GradingTimeout

if TYPE_CHECKING:
    from vime.types import Sample

NUM_TRIES = 10


async def grade(args: Any, sample: Sample) -> float | dict[str, Any]:
    """Tries up to 10 times after temporary errors. A 4xx or a body without JSON is final.

    Raises GradingFailed.
    """
    import aiohttp  # imported here, because the command line reads the registry and needs no HTTP

    reward = args.config.reward
    payload = {"prompt": sample.prompt, "response": sample.response, "label": sample.label}
    timeout = aiohttp.ClientTimeout(total=reward.timeout_s)
    last = ""
    async with aiohttp.ClientSession(timeout=timeout) as session:
        for i in range(NUM_TRIES):
            try:
                async with session.post(reward.rm_url, json=payload) as response:
                    if response.status == 200:
                        return _reward_in(await response.read(), reward.rm_url)
                    last = f"HTTP {response.status}: {(await response.text())[:200]}"
                    if response.status < 500:
                        break
            except TimeoutError:
                raise GradingTimeout(
                    f"--rm-url {reward.rm_url} took longer than {reward.timeout_s:g} s "
                    "(--rm-timeout-secs)"
                ) from None
            except aiohttp.ClientError as error:
                last = f"{type(error).__name__}: {error}"
            await asyncio.sleep(min(0.1 * 2**i, 5.0))
    raise GradingFailed(f"--rm-url {reward.rm_url} gave no reward: {last}")


def _reward_in(body: bytes, url: str) -> Any:
    try:
        return json.loads(body)
    except ValueError:  # a gateway's page, for example
        shown = body[:200].decode(errors="replace")
        raise GradingFailed(f"--rm-url {url} answered without JSON: {shown!r}") from None


GRADER = Grader(
    grade,
    gives="the answer of the server at `--rm-url` to `{prompt, response, label}`",
    takes_sample=True,
    needs_url=True,
)
