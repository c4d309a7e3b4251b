"""`--rm-type ifeval`: 1 if a response follows every instruction of its prompt, else 0.

`metadata["instruction_id_list"]` names the instructions, and `metadata["kwargs"]` has a dict of
parameters for each, as in the public IFEval data (arXiv:2311.07911). The checks in
`ifeval_checks.py` give the strict scores of the public benchmark and use no model, so
`language:response_language` has none. A sample with an unknown instruction fails, because its
answer cannot be judged.
"""

from __future__ import annotations

from typing import Any

from vime.rollout.rm_hub.grader import Grader, GradingFailed
from vime.rollout.rm_hub.ifeval_checks import CHECKS


def grade(response: str, label: str | None, metadata: dict[str, Any]) -> float:
    if problem := row_problem(label, metadata):
        raise GradingFailed(problem)
    text = response.rsplit("</think>", 1)[-1].strip()
    names = metadata["instruction_id_list"]
    parameters = metadata.get("kwargs") or [{}] * len(names)
    return float(bool(text) and all(map(_follows, names, parameters, [text] * len(names))))


def row_problem(label: str | None, metadata: dict[str, Any]) -> str | None:
    """Why no response to such a row can be judged; None if it can."""
    names, parameters = metadata.get("instruction_id_list"), metadata.get("kwargs")
    if not names or not isinstance(names, list):
        return (
            '--rm-type ifeval needs a list of names in metadata["instruction_id_list"], '
            f"not {names!r:.80}"
        )
    if not parameters:
        return None
    if not isinstance(parameters, list) or not all(
        given is None or isinstance(given, dict) for given in parameters
    ):
        return f'metadata["kwargs"] must be a list of objects, not {parameters!r:.80}'
    if len(parameters) != len(names):
        return (
            f'metadata["kwargs"] has {len(parameters)} entries for {len(names)} instructions in '
            'metadata["instruction_id_list"]. Give each instruction its entry; {} if it has no '
            "parameter"
        )
    return None


# Without `quick`: the parameters come from the data, so the checks run in worker processes.
GRADER = Grader(
    grade,
    gives='1 if the response follows all of `metadata["instruction_id_list"]`',
    row_problem=row_problem,
)


def _follows(name: str, parameters: dict[str, Any] | None, text: str) -> bool:
    if name not in CHECKS:
        raise GradingFailed(f"unknown instruction {name!r}; known: {', '.join(CHECKS)}")
    given = {key: value for key, value in (parameters or {}).items() if value is not None}
    try:
        return CHECKS[name](text, **given)
    except (TypeError, ValueError, AttributeError) as error:
        raise GradingFailed(f"instruction {name} with {given}: {error}") from None
