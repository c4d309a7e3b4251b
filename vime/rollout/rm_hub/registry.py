r"""The graders that --rm-type names. A new grader is a file in this folder and a name below.

The command line imports this file, so graders import heavy packages inside their functions.
"""

from __future__ import annotations

from importlib import import_module

from vime.rollout.rm_hub.grader import Grader

GRADERS: dict[str, Grader] = {
    name: import_module(f"vime.rollout.rm_hub.{name}").GRADER
    for name in ("deepscaler", "math", "dapo", "gpqa", "f1", "ifeval", "remote_rm", "random")
}

BOXED = "boxed_"  # in front of a name: grade only what the last \boxed{} holds


def grader_of(rm_type: str) -> Grader | None:
    """The grader of "f1" or "boxed_f1"; None if there is none."""
    return GRADERS.get(rm_type.removeprefix(BOXED))


def refusal(rm_type: str) -> str | None:
    """Why --rm-type cannot have this value, as the end of a sentence; None if it can."""
    grader = grader_of(rm_type)
    if grader is None:
        return (
            f"is unknown. Choose one of {', '.join(GRADERS)}, with {BOXED} in front to grade only "
            "the boxed part, or write a --custom-rm-path."
        )
    if grader.takes_box and rm_type.startswith(BOXED):
        name = rm_type.removeprefix(BOXED)
        return f"would remove the box that {name} looks for. Use {name}."
    return None


def problems_of(
    name: str, rm_type: str | None, reward_key: str | None, rm_url: str | None
) -> list[str]:
    """The problems of a grader's settings, in the user's words.

    name  where rm_type was given: "--rm-type"
    """
    if rm_type is None:
        return []
    if problem := refusal(rm_type):
        return [f"{name} {rm_type} {problem}"]
    grader, problems = grader_of(rm_type), []
    if grader.reward_keys and not reward_key:
        keys = " and ".join(grader.reward_keys)
        problems.append(
            f"{name} {rm_type} gives a dict of {keys}. Add --reward-key {grader.reward_keys[0]}."
        )
    if grader.needs_url and not rm_url:
        problems.append(f"{name} {rm_type} needs a server. Add --rm-url http://HOST:PORT/PATH.")
    return problems
