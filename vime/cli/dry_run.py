"""`--dry-run`: prints the resolved configuration and the plan of the run."""

from __future__ import annotations

from collections.abc import Iterator

from vime.config import Config
from vime.config.fields import flags_in
from vime.config.secrets import without_secrets
from vime.config.spelling import as_flag
from vime.config.view import SECTIONS, resolved
from vime.plan import report as plan


def report(cfg: Config) -> str:
    """The resolved configuration, the batch arithmetic, the layout and a memory estimate."""
    parts = {
        "Configuration": _configuration(cfg),
        "Batch": plan.batch(cfg),
        "Layout": plan.layout(cfg),
        "Memory per GPU, estimated": plan.memory(cfg),
    }
    texts = [title + "\n" + "\n".join(f"  {line}" for line in p) for title, p in parts.items()]
    return "\n\n".join(["Dry run: nothing was started.", *texts])


def _configuration(cfg: Config) -> Iterator[str]:
    values = without_secrets(resolved(cfg))
    for name in SECTIONS:
        yield f"[{name}]"
        section = getattr(cfg, name)
        for spec in flags_in(type(section)).values():
            if values[spec.dest] not in (None, {}):
                yield f"  {spec.name} {_shown(values[spec.dest])}"
    for title, prefix, extra in (
        ("MODEL_ARGS", "--", cfg.model.args),
        ("vLLM", "--vllm-", cfg.engine.vllm_args),
        ("vllm-router", "--router-", cfg.engine.router_args),
    ):
        if extra:
            yield f"[{title}]"
            for key, value in without_secrets(extra).items():
                yield f"  {as_flag(key, prefix)} {_shown(value)}".rstrip()
    if cfg.optimizer.critic_overrides:
        yield "[critic]"
        for name, value in cfg.optimizer.critic_overrides.items():
            yield f"  {flags_in(type(cfg.optimizer))[name].name} {_shown(value)}"


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
