"""What a flag's declaration implies, for every flag that has it."""

from dataclasses import fields

import pytest

from tests.unit.fake_engine import make_config
from vime.cli.flags import all_flags, section_types
from vime.config.fields import default_of, flag_of
from vime.config.view import resolved

DECLARED = [
    pytest.param(owner, f, spec, id=spec.name)
    for owner, section in section_types().items()
    for f in fields(section)
    if (spec := flag_of(f))
]


def with_(attribute):
    return [param for param in DECLARED if getattr(param.values[2], attribute)]


def another_value(f, spec):
    """A value that is allowed and is not the default."""
    default = default_of(f)
    if spec.choices:
        return next(choice for choice in spec.choices if choice != default)
    if isinstance(default, bool):
        return not default
    if spec.nargs:
        return ["x"]
    number = max(spec.at_least or 0, (spec.above or 0) + 0.25)
    return "x.y" if default is None and spec.at_least is None and spec.above is None else number


@pytest.mark.parametrize(("owner", "f", "spec"), with_("only_with"))
def test_a_flag_without_effect_is_refused_with_the_flag_that_it_needs(owner, f, spec):
    for name in spec.only_with.split():
        if name.startswith("--"):
            assert all_flags()[name].owner == owner
    section = section_types()[owner].__new__(section_types()[owner])
    for other in fields(section):
        object.__setattr__(section, other.name, default_of(other))
    changed = section.changed(**{f.name: another_value(f, spec)})
    assert any(
        problem.startswith(spec.name) and f"has no effect without {spec.only_with}." in problem
        for problem in changed.misfits()
    )


def test_there_are_flags_of_each_kind():
    assert len(with_("only_with")) > 15
    assert len(with_("inherits")) > 12
    assert len(with_("per_dataset")) > 15


@pytest.mark.parametrize(("owner", "f", "spec"), with_("inherits"))
def test_an_unset_flag_has_the_value_of_the_flag_that_it_inherits(owner, f, spec):
    source = all_flags()[spec.inherits]
    assert default_of(f) is None
    values = resolved(make_config("none", batch={"max_tokens_per_gpu": 77}))
    assert values[spec.dest] == values[source.spec.dest]


def test_a_set_flag_keeps_its_value():
    cfg = make_config("none", eval={"temperature": 0.0}, rollout={"over_sampling": 9})
    values = resolved(cfg)
    assert (values["eval_temperature"], values["rollout_temperature"]) == (0.0, 1.0)
    assert (values["over_sampling_batch_size"], values["rollout_batch_size"]) == (9, 2)
