"""Every path flag: loaded once, refused with the expected signature, called as documented."""

import dataclasses
import inspect

import numpy as np
import pytest

import examples.hooks.hooks as examples
from tests.unit.fake_engine import FakeEngine, ids_of, make_config, write_prompts
from vime.cli import parse_config
from vime.cli.flags import section_types
from vime.config import Config
from vime.config.fields import flags_in
from vime.config.plugins import check_plugins, plugins_named_in
from vime.data.sample_metrics import of_samples
from vime.errors import PluginError
from vime.rollout.data_source import RolloutDataSourceWithBuffer
from vime.rollout.train_data import eval_metrics, make_train_batch, rollout_metrics
from vime.rollout.vllm_rollout import generate_rollout
from vime.types import RolloutFnEvalOutput, Sample, Status

HERE = __name__
EXAMPLES = "examples.hooks.hooks"

# {(section, field): names of the examples for its flag}
FIELDS = {
    ("data", "data_source_path"): ["HardestLast"],
    ("rollout", "buffer_filter_path"): ["newest_first"],
    ("rollout", "function_path"): ["warm_up_rollout"],
    ("rollout", "custom_generate_path"): ["try_twice"],
    ("rollout", "sample_hook_paths"): ["note_length"],
    ("rollout", "dynamic_filter_path"): ["not_all_truncated"],
    ("rollout", "sample_filter_path"): ["drop_truncated"],
    ("rollout", "all_samples_path"): ["count_by_status"],
    ("rollout", "convert_path"): ["as_columns", "every_other_group"],
    ("rollout", "data_postprocess_path"): ["clip_scores"],
    ("rollout", "log_path"): ["log_share_of_short"],
    ("reward", "custom_rm_path"): ["short_is_good", "shortest_wins"],
    ("reward", "post_process_path"): ["centred_on_the_batch"],
    ("eval", "function_path"): ["no_evaluation_yet"],
    ("eval", "log_path"): ["show_an_answer"],
}
CASES = [(where, name) for where, names in FIELDS.items() for name in names]


def naming(section, field, path, **more):
    """A configuration whose only hook is `path`."""
    return make_config(
        "none", **{section: {field: [path] if field.endswith("s") else path, **more}}
    )


@pytest.mark.parametrize(("where", "name"), CASES, ids=[name for _, name in CASES])
def test_each_example_is_accepted_by_its_flag(where, name):
    more = {"group_rm": True} if name == "shortest_wins" else {}
    cfg = naming(*where, f"{EXAMPLES}.{name}", **more)
    assert check_plugins(cfg) == []
    assert f"{EXAMPLES}.{name}" in [plugin.path for plugin in plugins_named_in(cfg)]


def test_every_flag_of_a_hook_has_an_example():
    """`test_training_hooks.py` has the examples for the trainer's hooks."""
    named = {
        (section.name, name)
        for section in dataclasses.fields(Config)
        for name, spec in flags_in(section_types()[section.name]).items()
        if spec.hook and section.name != "algorithm"
    }
    assert named == set(FIELDS)


def test_every_function_in_the_examples_belongs_to_a_flag():
    defined = {
        name
        for name, thing in vars(examples).items()
        if getattr(thing, "__module__", None) == EXAMPLES and callable(thing)
    }
    assert defined == {name for _, name in CASES}
    for name in defined:
        assert len(inspect.getsource(getattr(examples, name)).splitlines()) <= 10, name


def no_parameters():
    return None


@pytest.mark.parametrize("where", FIELDS, ids=lambda where: ".".join(where))
def test_a_wrong_signature_is_refused_with_the_flag_and_the_right_signature(where):
    (problem,) = check_plugins(naming(*where, f"{HERE}.no_parameters"))
    flag, path, *_ = problem.split()
    assert flag.startswith("--")
    assert path == f"{HERE}.no_parameters"
    assert "Expected: " in problem


def test_a_data_source_without_its_methods_is_refused():
    (problem,) = check_plugins(naming("data", "data_source_path", f"{HERE}.Sourceless"))
    assert "lacks add_samples, save, load, __len__" in problem


class Sourceless:
    def __init__(self, args):
        pass

    def get_samples(self, num_samples):
        return []


def sample_of(i, reward, size=2, **kw):
    tokens = [7, 8, *range(size)]
    defaults = {"status": Status.COMPLETED, "rollout_log_probs": [-1.0] * size, "rollout_id": 4}
    return Sample(
        group_index=i // 2, index=i, tokens=tokens, response_length=size, reward=reward,
        **defaults | kw,
    )  # fmt: skip


def view_of(**sections):
    from vime.config.view import ArgsView

    return ArgsView(make_config("none", **sections))


GROUPS = [[1.0, 0.0], [1.0, 1.0]]


def groups():
    return [[sample_of(2 * g + i, r) for i, r in enumerate(rs)] for g, rs in enumerate(GROUPS)]


def test_reward_post_processing_replaces_normalisation():
    args = view_of(reward={"post_process_path": f"{EXAMPLES}.centred_on_the_batch"})
    batch = make_train_batch(args, groups(), 4)
    assert [s.reward for s in batch.sequences] == [0.25, -0.75, 0.25, 0.25]
    assert [s.raw_reward for s in batch.sequences] == [1.0, 0.0, 1.0, 1.0]
    assert batch.metrics["rollout/raw_reward"] == 0.75
    assert batch.metrics["rollout/rewards"] == 0.0


def test_converted_columns_become_a_batch_with_weights_and_steps():
    args = view_of(
        rollout={"convert_path": f"{EXAMPLES}.as_columns"},
        batch={"prompts": 2, "samples_per_prompt": 2, "steps_asked": 2},
    )
    batch = make_train_batch(args, groups(), 4)
    assert [s.reward for s in batch.sequences] == [1.0, -1.0, 1.0, 1.0]
    assert len(batch.steps) == 2
    assert [float(s.weight.sum()) for s in batch.sequences] == [0.5] * 4
    assert batch.sequences[0].rollout_logp.tolist() == [-1.0, -1.0]
    assert batch.sequences[0].loss_mask.tolist() == [1.0, 1.0]
    assert batch.metrics["rollout/num_samples"] == 4
    assert batch.metrics["rollout/truncated_ratio"] == 0.0


def test_a_converted_batch_is_used_unchanged():
    args = view_of(rollout={"convert_path": f"{EXAMPLES}.every_other_group"})
    batch = make_train_batch(args, groups(), 4)
    assert [s.index for s in batch.sequences] == [0, 1]


def double(args, samples):
    raw = [2.0] * len(samples)
    return raw, raw


def test_the_postprocess_hook_runs_last():
    args = view_of(
        rollout={"data_postprocess_path": f"{EXAMPLES}.clip_scores"},
        reward={"post_process_path": f"{HERE}.double"},
    )
    assert [s.reward for s in make_train_batch(args, groups(), 4).sequences] == [1.0] * 4
    args = view_of(rollout={"data_postprocess_path": f"{HERE}.wrong_type"})
    with pytest.raises(PluginError, match=f"{HERE}.wrong_type returned 3"):
        make_train_batch(args, groups(), 4)


def wrong_type(args, rollout_id, batch):
    return 3


def silence(*args):
    return True


def test_log_functions_add_metrics_or_silence_them():
    args = view_of(rollout={"log_path": f"{EXAMPLES}.log_share_of_short"})
    metrics = rollout_metrics(args, groups(), 4, {"rollout/raw_reward": 1.0}, 2.0)
    assert metrics == {"rollout/raw_reward": 1.0, "rollout/share_of_short": 1.0}
    args = view_of(rollout={"log_path": f"{HERE}.silence"}, eval={"log_path": f"{HERE}.silence"})
    assert rollout_metrics(args, groups(), 4, {"a": 1.0}, 2.0) == {}
    output = RolloutFnEvalOutput({"held": {"samples": groups()[0]}}, {"eval/held": 0.5})
    assert eval_metrics(args, output, 4) == {}
    args = view_of(eval={"log_path": f"{EXAMPLES}.show_an_answer"})
    assert eval_metrics(args, output, 4) == {"eval/held": 0.5}
    assert output.metrics == {"eval/held": 0.5}


@pytest.fixture
def config(hf, tmp_path):
    def make(**sections):
        prompts = write_prompts(tmp_path / "p.jsonl", 8)
        data = {"prompt_data": str(prompts), "input_key": "prompt", "label_key": "label"}
        sections["data"] = data | sections.get("data", {})
        sections["batch"] = {"prompts": 2, "samples_per_prompt": 2} | sections.get("batch", {})
        return make_config(hf, **sections)

    return make


def answer(prompt, params):
    return [*ids_of("ab"), 2], 0.001


def run(engine, cfg, source=None, rollout_id=0):
    args = engine.args(cfg)
    source = source or cfg.data.plugin("data_source_path")(args)
    return cfg.rollout.plugin("function_path")(args, rollout_id, source, evaluation=False), source


def test_the_examples_work_together_in_a_rollout(config, capsys):
    """One rollout with data source, buffer filter, generation, reward, sample hook and filters."""
    names = {
        "buffer_filter_path": "newest_first",
        "function_path": "warm_up_rollout",
        "custom_generate_path": "try_twice",
        "dynamic_filter_path": "not_all_truncated",
        "sample_filter_path": "drop_truncated",
        "all_samples_path": "count_by_status",
    }
    rollout = {field: f"{EXAMPLES}.{name}" for field, name in names.items()}
    rollout["sample_hook_paths"] = [f"{EXAMPLES}.note_length"]
    cfg = config(
        rollout=rollout,
        reward={"custom_rm_path": f"{EXAMPLES}.shortest_wins", "group_rm": True},
        data={"data_source_path": f"{EXAMPLES}.HardestLast"},
    )
    with FakeEngine(answer) as engine:
        output, source = run(engine, cfg)
        assert [body["sampling_params"]["temperature"] for body in engine.log].count(1.2) == 4
    samples = [s for group in output.samples for s in group]
    assert [s.metadata["length"] for s in samples] == [6] * 4
    assert [s.reward for s in samples] == [1.0] * 4
    assert not any(s.remove_sample for s in samples)
    assert output.metrics["rollout/is_warm_up"] == 1.0
    assert "'completed': 4" in capsys.readouterr().out
    old, new = ([sample_of(i, 0.0, metadata={"start_rollout_id": i})] for i in (1, 3))
    source.add_samples([new, old])
    assert source.get_samples(1) == [new]


def test_a_generation_function_learns_that_it_generates_for_an_evaluation(config, tmp_path):
    path = write_prompts(tmp_path / "eval.jsonl", 2)
    cfg = config(
        rollout={"custom_generate_path": f"{EXAMPLES}.try_twice"},
        reward={"custom_rm_path": f"{EXAMPLES}.short_is_good"},
        eval={"interval": 1, "prompt_data": ["held", str(path)]},
    )
    with FakeEngine(answer) as engine:
        output = generate_rollout(engine.args(cfg), 0, None, evaluation=True)
        assert len(engine.log) == 2  # once for each prompt
    assert output.metrics["eval/held"] == 1.0
    quiet = examples.no_evaluation_yet(None, 3, None)
    assert quiet.metrics == {"eval/skipped": 1.0}


async def add_one(args, sample):
    sample.reward += 1


def replace(args, sample):
    new = Sample.from_dict(sample.to_dict())
    new.reward *= 10
    return new


def spoil(args, sample):
    return {"sample": sample}


def test_sample_hooks_run_in_order_and_may_replace_a_sample(config):
    hooks = [f"{HERE}.add_one", f"{HERE}.replace"]
    reward = {"custom_rm_path": f"{EXAMPLES}.short_is_good"}
    with FakeEngine(answer) as engine:
        output, _ = run(engine, config(rollout={"sample_hook_paths": hooks}, reward=reward))
        assert {s.reward for group in output.samples for s in group} == {20.0}
        cfg = config(rollout={"sample_hook_paths": [f"{HERE}.spoil"]}, reward=reward)
        with pytest.raises(PluginError, match="returned a dict"):
            run(engine, cfg)


def test_the_sample_hook_flag_may_be_given_several_times(config, tmp_path):
    (tmp_path / "config.json").write_text('{"num_attention_heads": 4}')
    prompts = write_prompts(tmp_path / "q.jsonl", 2)
    words = (
        f"--hf-checkpoint {tmp_path} --prompt-data {prompts} --input-key prompt --num-rollout 1 "
        "--rollout-batch-size 1 --rm-type math --actor-num-gpus-per-node 1 "
        "--rollout-sample-hook-path a.b c.d --rollout-sample-hook-path e.f"
    )
    assert parse_config(words.split()).rollout.sample_hook_paths == ["a.b", "c.d", "e.f"]


async def make_own_prompt(args, sample, sampling_params):
    sample.tokens = ids_of("own")
    return await examples.generate(args, sample, sampling_params)


def test_without_a_global_dataset_generation_brings_its_own_prompts(config, tmp_path, capsys):
    cfg = config(
        data={"global_dataset": False, "prompt_data": None},
        rollout={"custom_generate_path": f"{HERE}.make_own_prompt"},
        reward={"custom_rm_path": f"{EXAMPLES}.short_is_good"},
    )
    with FakeEngine(answer) as engine:
        output, source = run(engine, cfg)
    assert len(source) == 0
    samples = [s for group in output.samples for s in group]
    assert [s.index for s in samples] == [0, 1, 2, 3]
    assert samples[0].tokens == ids_of("own") + [*ids_of("ab"), 2]
    again = RolloutDataSourceWithBuffer(view_of(data={"global_dataset": False}))
    again.load_state_dict(source.state_dict())
    assert again.get_samples(1)[0][0].index == 4

    (tmp_path / "config.json").write_text('{"num_attention_heads": 4}')
    words = (
        f"--hf-checkpoint {tmp_path} --disable-rollout-global-dataset --num-epoch 1 --rm-type math "
        "--rollout-batch-size 1 --actor-num-gpus-per-node 1"
    )
    with pytest.raises(SystemExit):
        parse_config(words.split())
    said = capsys.readouterr().err
    assert "has no epochs" in said
    assert "--custom-generate-function-path" in said
    lengths = of_samples(samples, needs_reward=True)
    assert np.isfinite(lengths["rollout/response_len/mean"])
