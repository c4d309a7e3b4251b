import json
from dataclasses import replace

import numpy as np
import pytest

from tests.unit.fake_engine import make_config, write_prompts
from vime.config.view import ArgsView
from vime.errors import CheckpointError, ConfigError, PluginError
from vime.rollout.data_source import RolloutDataSourceWithBuffer
from vime.types import Status


def make_source(hf, tmp_path, num_prompts=5, **sections):
    prompts = write_prompts(tmp_path / "p.jsonl", num_prompts)
    data = {"prompt_data": str(prompts), "input_key": "prompt", "label_key": "label"}
    sections["data"] = data | sections.get("data", {})
    sections["batch"] = {"prompts": 2, "samples_per_prompt": 2} | sections.get("batch", {})
    sections["checkpoint"] = {"save": str(tmp_path / "ckpt")}
    return RolloutDataSourceWithBuffer(ArgsView(make_config(hf, **sections)))


def labels(groups):
    return [group[0].label for group in groups]


def test_groups_are_numbered_consecutively_and_their_samples_share_no_state(hf, tmp_path):
    groups = make_source(hf, tmp_path).get_samples(3)
    assert [[s.index for s in g] for g in groups] == [[0, 1], [2, 3], [4, 5]]
    assert [{s.group_index for s in g} for g in groups] == [{0}, {1}, {2}]
    a, b = groups[0]
    a.metadata["x"] = 1
    a.tokens.append(3)
    assert "x" not in b.metadata
    assert len(b.tokens) == 2  # "q0", one token per character


def test_each_epoch_has_every_prompt_once_in_its_own_order(hf, tmp_path):
    source = make_source(hf, tmp_path, 20, data={"shuffle": True})
    first, second = labels(source.get_samples(20)), labels(source.get_samples(20))
    assert sorted(first) == sorted(second) == sorted(map(str, range(20)))
    assert first != second
    assert first != sorted(first, key=int)
    again = make_source(hf, tmp_path, 20, data={"shuffle": True})
    assert labels(again.get_samples(40)) == first + second
    other = make_source(hf, tmp_path, 20, data={"shuffle": True, "seed": 43})
    assert labels(other.get_samples(20)) != first


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_resumed_source_continues_like_one_that_never_stopped(hf, tmp_path, shuffle):
    straight = make_source(hf, tmp_path, data={"shuffle": shuffle})
    wanted = [straight.get_samples(3) for _ in range(6)]
    stopped = make_source(hf, tmp_path, data={"shuffle": shuffle})
    got = [stopped.get_samples(3) for _ in range(3)]
    stopped.save(2)
    resumed = make_source(hf, tmp_path, data={"shuffle": shuffle})
    resumed.load(2)
    got += [resumed.get_samples(3) for _ in range(3)]
    assert got == wanted


def test_the_buffer_survives_a_restart_with_tokens_and_log_probabilities(hf, tmp_path):
    source = make_source(hf, tmp_path)
    (group,) = source.get_samples(1)
    group[0].tokens += [9, 8]
    group[0].response_length, group[0].rollout_log_probs = 2, [-0.5, -1.5]
    group[0].weight_versions, group[0].status = [3, 4], Status.ABORTED
    group[0].metadata["start_rollout_id"] = 3
    source.add_samples([group])
    source.save(0)
    resumed = make_source(hf, tmp_path)
    resumed.load(0)
    assert resumed.get_samples(1) == [group]
    assert resumed.buffer == []


def test_later_samples_do_not_change_a_snapshot(hf, tmp_path):
    source = make_source(hf, tmp_path)
    source.add_samples(source.get_samples(1))
    state = source.state_dict()
    ahead = source.get_samples(4)
    ahead[0][0].metadata["late"] = True
    source.save(0, state=state)
    resumed = make_source(hf, tmp_path)
    resumed.load(0)
    assert labels(resumed.get_samples(4)) == labels(ahead)
    assert (tmp_path / "ckpt/rollout/global_dataset_state_dict_0.pt").is_file()


def take_newest(args, rollout_id, buffer, num_samples):
    fresh = [g for g in buffer if g[0].metadata["start_rollout_id"] >= rollout_id - 1]
    buffer[:] = [g for g in buffer if g not in fresh]
    return fresh[:num_samples]


def test_the_buffer_comes_first_and_its_filter_gets_the_real_rollout_id(hf, tmp_path):
    here = f"{__name__}.take_newest"
    source = make_source(hf, tmp_path, rollout={"buffer_filter_path": here})
    old, new = source.get_samples(2)
    old[0].metadata["start_rollout_id"], new[0].metadata["start_rollout_id"] = 3, 6
    source.add_samples([old, new])
    source.rollout_id = 7
    groups = source.get_samples(2)
    assert [g[0].group_index for g in groups] == [1, 2]
    assert source.buffer == [old]


def test_pop_first_takes_the_oldest_groups():
    from vime.rollout.buffer import pop_first

    buffer = [["a"], ["b"], ["c"]]
    assert pop_first(None, 5, buffer, 2) == [["a"], ["b"]]
    assert buffer == [["c"]]
    assert pop_first(None, 5, buffer, 2) == [["c"]]
    assert buffer == []


def test_a_group_that_is_too_stale_starts_over_with_its_prompt(hf, tmp_path):
    source = make_source(hf, tmp_path, rollout={"partial": True, "max_staleness": 2})
    (group,) = source.get_samples(1)
    prompt = list(group[0].tokens)
    group[0].tokens, group[0].response_length = [*prompt, 5], 1
    group[0].metadata["start_rollout_id"], group[0].status = 1, Status.ABORTED
    for now, tokens in ((3, [*prompt, 5]), (4, prompt)):
        source.add_samples([group])
        source.rollout_id = now
        (again,) = source.get_samples(1)
        assert again[0].tokens == tokens
    assert (again[0].status, again[0].response_length) == (Status.PENDING, 0)
    assert source.num_stale_groups == 1


def test_a_prompt_that_fits_is_found_among_many_that_do_not(hf, tmp_path):
    source = make_source(hf, tmp_path, 30, rollout={"max_prompt_len": 2})
    assert labels(source.get_samples(25)) == [*map(str, range(10)), *map(str, range(10)), *"01234"]
    assert source.num_long_prompts == 40


def test_a_row_that_the_template_refuses_is_left_out_with_its_place(hf, tmp_path, caplog):
    source = make_source(hf, tmp_path, 3, data={"apply_chat_template": True})
    contents = {"a": "a", "refused": [{"type": "image"}], "b": "b"}
    lines = [
        {"prompt": [{"role": "user", "content": content}], "label": label}
        for label, content in contents.items()
    ]
    path = tmp_path / "refused.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = replace(source.cfg.data, prompt_data=str(path))
    source = RolloutDataSourceWithBuffer(ArgsView(replace(source.cfg, data=data)))
    assert labels(source.get_samples(4)) == ["a", "b", "a", "b"]
    assert source.skipped == {"rollout/data/long_prompts": 0, "rollout/data/refused_rows": 2}
    assert f"{path} line 2 is left out: a message has content parts of type image" in caplog.text
    path.write_text(json.dumps(lines[1]))
    source = RolloutDataSourceWithBuffer(ArgsView(replace(source.cfg, data=data)))
    with pytest.raises(ConfigError, match="the chat template refuses every prompt"):
        source.get_samples(1)


def test_prompts_over_the_limit_are_dropped_and_counted(hf, tmp_path):
    source = make_source(hf, tmp_path, 12, rollout={"max_prompt_len": 2})
    assert labels(source.get_samples(10)) == [str(i) for i in range(10)]
    assert labels(source.get_samples(1)) == ["0"]  # q10 and q11 have three tokens
    assert source.num_long_prompts == 2
    with pytest.raises(ConfigError, match="--rollout-max-prompt-len 1 drops"):
        make_source(hf, tmp_path, rollout={"max_prompt_len": 1}).get_samples(1)


def test_the_chat_template_is_applied_once_and_rows_keep_their_tools(hf, tmp_path):
    source = make_source(hf, tmp_path, data={"apply_chat_template": True})
    (group,) = source.get_samples(1)
    assert group[0].prompt == "<|im_start|>user\nq0<|im_end|>\n<|im_start|>assistant\n"
    assert group[0].tokens[0] == 1
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"prompt": "q", "label": "1", "tools": [{"name": "calc"}]}))
    assert source.dataset.__class__(str(path), source.keys)[0].tools == [{"name": "calc"}]


def test_a_buffered_sample_with_numpy_values_can_be_read_again(hf, tmp_path):
    source = make_source(hf, tmp_path)
    (group,) = source.get_samples(1)
    group[0].reward, group[0].metadata["scores"] = np.float64(0.5), np.arange(2)
    source.add_samples([group])
    source.save(0)
    again = make_source(hf, tmp_path)
    again.load(0)
    ((first, _),) = again.get_samples(1)
    assert (first.reward, first.metadata["scores"]) == (0.5, [0, 1])


def test_a_missing_or_damaged_state_is_refused(hf, tmp_path):
    source = make_source(hf, tmp_path)
    source.load(-1)
    with pytest.raises(CheckpointError, match="global_dataset_state_dict_4.pt is missing"):
        source.load(4)
    source.save(4)
    (tmp_path / "ckpt/rollout/global_dataset_state_dict_4.pt").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="damaged"):
        source.load(4)


def test_a_buffer_filter_that_returns_too_many_groups_is_refused(hf, tmp_path):
    source = make_source(hf, tmp_path, rollout={"buffer_filter_path": f"{__name__}.take_all"})
    source.add_samples(source.get_samples(3))
    with pytest.raises(PluginError, match="returned 3 groups"):
        source.get_samples(1)


def take_all(args, rollout_id, buffer, num_samples):
    return buffer


def test_an_epoch_flag_gives_the_number_of_whole_rollouts(hf, tmp_path):
    batch = make_config(hf, batch={"prompts": 4, "num_epoch": 3}).batch
    assert batch.rollouts(num_prompts=10) == 7  # 30 prompts, 4 at a time
    assert make_config(hf, batch={"prompts": 4, "num_rollout": 5}).batch.rollouts(10) == 5
    with pytest.raises(ConfigError, match="--num-epoch 3 over 1 prompts is less than one rollout"):
        batch.rollouts(num_prompts=1)
