"""The promises (a) to (h) of the founding document, one test for each.

Where an engine takes part, the test uses a live one.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.cpu.rollout_setting import router, setting  # noqa: F401, fixtures
from tests.cpu.tiny import make_config, write_tiny_hf
from tests.cpu.training import hf_logps, hf_model, samples_of
from tests.unit.command_lines import words
from tests.unit.fake_engine import write_prompts
from vime.cli import parse_config
from vime.data.batching import build_train_batch
from vime.plugins.hook import Plugin
from vime.plugins.rollout import BUFFER_FILTER
from vime.rollout.generation import generate
from vime.rollout.vllm_rollout import generate_rollout
from vime.types import DynamicFilterOutput, Sample, Status

HERE = __name__


# -- (a) ---------------------------------------------------------------------------------------


def check_reward_nonzero_std(args, samples: list[Sample], **kwargs):  # copied from the document
    rewards = [sample.reward for sample in samples]
    return torch.tensor(rewards, dtype=torch.float).std() > 0.0


def a_plain_bool(args, samples, **kwargs):
    return len({sample.reward for sample in samples}) > 1


def with_a_reason(args, samples, **kwargs):
    return DynamicFilterOutput(a_plain_bool(args, samples), "dull")


@pytest.mark.parametrize(
    ("name", "reasons"),
    [
        ("check_reward_nonzero_std", {"zero_std_0", "zero_std_1"}),
        ("a_plain_bool", {"zero_std_0", "zero_std_1"}),
        ("with_a_reason", {"dull"}),
    ],
)
def test_a_filter_may_return_a_tensor_a_bool_or_a_reason(setting, name, reasons):
    args, source = setting(
        rollout={"max_response_len": 2, "dynamic_filter_path": f"{HERE}.{name}"},
        batch={"prompts": 12, "samples_per_prompt": 2},
    )
    output = generate_rollout(args, 0, source)
    assert all({s.reward for s in group} == {0.0, 1.0} for group in output.samples)
    prefix = "rollout/dynamic_filter/drop_"
    dropped = {k.removeprefix(prefix) for k in output.metrics if k.startswith(prefix)}
    assert dropped
    assert dropped <= reasons


# -- (b) ---------------------------------------------------------------------------------------

asked: list[tuple[int, int]] = []


def pop_first(args, rollout_id, buffer: list[list[Sample]], num_samples: int) -> list[list[Sample]]:
    num_to_pop = min(len(buffer), num_samples)
    samples = buffer[:num_to_pop]
    del buffer[:num_to_pop]
    return samples


def pop_first_and_note(args, rollout_id, buffer, num_samples):
    asked.append((rollout_id, len(buffer)))
    return pop_first(args, rollout_id, buffer, num_samples)


def test_b_pop_first_of_the_document_works_and_gets_the_rollout_id(setting):
    assert Plugin("--buffer-filter-path", f"{HERE}.pop_first", BUFFER_FILTER).problem() is None
    path = f"{HERE}.pop_first_and_note"
    args, source = setting(
        rollout={"max_response_len": 2, "buffer_filter_path": path},
        batch={"prompts": 3, "samples_per_prompt": 2},
    )
    waiting = source.get_samples(2)
    source.add_samples(waiting)
    asked.clear()
    output = generate_rollout(args, 7, source)
    assert asked[0] == (7, 2)
    assert source.buffer == []
    assert [g[0].group_index for g in output.samples] == [0, 1, 2]


# -- (c) ---------------------------------------------------------------------------------------


def finished(sizes: list[int]) -> list[list[Sample]]:
    return [
        [
            Sample(
                group_index=i,
                index=i,
                tokens=[1] * size,
                response_length=size - 1,
                reward=float(i % 2),
                status=Status.COMPLETED,
            )
        ]
        for i, size in enumerate(sizes)
    ]


@pytest.mark.parametrize("cp", [1, 2])
def test_c_a_sample_beyond_the_cap_is_a_micro_batch_of_its_own_and_cp_shares_the_cap(cp):
    cfg = make_config(
        "none",
        cluster={"actor_gpus_per_node": cp},
        parallel={"cp": cp},
        batch={"prompts": 6, "dynamic": True, "max_tokens_per_gpu": 100},
    )
    cap = 100 * cp
    sizes = [cap + 57, cap // 2, cap // 2, cap // 4, cap // 4, cap // 4]
    batch = build_train_batch(finished(sizes), cfg, 0)
    (packs,) = batch.steps[0].micro_batches
    assert [s.length for s in batch.sequences] == sizes  # nothing is cut
    assert (0,) in packs
    totals = [sum(sizes[p] for p in pack) for pack in packs if pack != (0,)]
    assert max(totals) <= cap
    assert len(totals) == 2  # the short samples fill 1.75 caps, and CP ranks share CP caps


# -- (d) ---------------------------------------------------------------------------------------


def test_d_rollout_num_gpus_is_ignored_under_colocate_with_a_notice(tmp_path, capsys):
    flags = {"--actor-num-gpus-per-node": "4", "--rollout-num-gpus": "6"}
    apart = parse_config(words(tmp_path, flags))
    assert (apart.cluster.rollout_gpus, apart.total_gpus) == (6, 10)
    capsys.readouterr()
    together = parse_config(words(tmp_path, flags | {"--colocate": None}))
    assert (together.cluster.rollout_gpus, together.total_gpus) == (4, 4)
    assert "--rollout-num-gpus 6 is ignored with --colocate" in capsys.readouterr().err


# -- (e) ---------------------------------------------------------------------------------------


def test_e_evaluation_inherits_what_no_eval_flag_overrides(setting, tmp_path):
    """--rollout-top-k 1 makes it greedy; --eval-max-response-len makes it longer."""
    path = write_prompts(tmp_path / "eval.jsonl", 4)
    evaluation = {"interval": 1, "prompt_data": ["held", str(path)], "samples_per_prompt": 2}
    args, _ = setting(
        rollout={"max_response_len": 3, "top_k": 1},
        eval=evaluation | {"max_response_len": 9},
    )
    samples = generate_rollout(args, 0, None, evaluation=True).data["held"]["samples"]
    assert {s.response_length for s in samples if s.status is Status.TRUNCATED} == {9}
    assert all(a.tokens == b.tokens for a, b in zip(samples[::2], samples[1::2], strict=True))
    args, _ = setting(rollout={"max_response_len": 3, "top_k": 1}, eval=evaluation | {"top_k": -1})
    samples = generate_rollout(args, 0, None, evaluation=True).data["held"]["samples"]
    assert max(s.response_length for s in samples) == 3
    assert any(a.tokens != b.tokens for a, b in zip(samples[::2], samples[1::2], strict=True))


# -- (f) ---------------------------------------------------------------------------------------

PLANS = {
    "one by one": ({"micro_batch_size": 1}, 1),
    "four at a time": ({"micro_batch_size": 4}, 1),
    "packed": ({"dynamic": True, "max_tokens_per_gpu": 60}, 1),
    "all in one": ({"dynamic": True, "max_tokens_per_gpu": 9216}, 1),
    "packed over 2 ranks": ({"dynamic": True, "max_tokens_per_gpu": 60}, 2),
    "balanced over 4 ranks": ({"dynamic": True, "max_tokens_per_gpu": 60, "balance": True}, 4),
}


def loss_and_gradient(model, batch, dtype):
    """Sums over each rank's micro-batches, then over ranks, as training does."""
    model.zero_grad()
    totals = []
    for rank in range(len(batch.steps[0].micro_batches)):
        of_rank = torch.zeros((), dtype=dtype)
        for pack in batch.steps[0].micro_batches[rank]:
            for position in pack:
                sequence = batch.sequences[position]
                logp, _ = hf_logps(model, sequence, 1.0)
                weight = torch.as_tensor(sequence.weight).to(dtype)
                loss = -(weight * sequence.reward * logp).sum()
                loss.backward()
                of_rank += loss.detach()
        totals.append(of_rank)
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    return float(sum(totals)), gradient


@pytest.mark.parametrize("per_token", [False, True], ids=["per sample", "per token"])
def test_f_the_loss_and_its_gradient_do_not_depend_on_how_the_batch_is_split(tmp_path, per_token):
    """Micro-batches, packing, balancing and data parallel ranks, in float32.

    tests/cpu/test_gradient_parity.py does the same for TP, PP and CP with the trainer itself.
    """
    model = hf_model(write_tiny_hf(tmp_path / "model", tied=True, num_hidden_layers=1))
    groups = samples_of(4, 4)
    results = {}
    for name, (batch, dp) in PLANS.items():
        cfg = make_config(
            "none",
            cluster={"actor_gpus_per_node": dp},
            batch={"prompts": 4, "samples_per_prompt": 4} | batch,
            # raw rewards: scores of both signs would cancel to a loss of rounding errors
            algorithm={"per_token_loss": per_token, "normalize_rewards": False},
        )
        results[name] = loss_and_gradient(model, build_train_batch(groups, cfg, 0), torch.float32)
    loss, gradient = results.pop("one by one")
    assert abs(loss) > 1e-3
    for name, (other, other_gradient) in results.items():
        assert other == pytest.approx(loss, rel=1e-6), name
        apart = (other_gradient - gradient).norm() / gradient.norm()
        assert apart < 1e-5, name


# -- (g) ---------------------------------------------------------------------------------------


def drop_the_first_32(args, samples, **kwargs):
    return samples[0].group_index >= 32


def drop_the_first_33(args, samples, **kwargs):
    return samples[0].group_index >= 33


@pytest.mark.parametrize(("num_dropped", "num_taken"), [(32, 64), (33, 128)])
def test_g_64_more_prompts_are_taken_exactly_when_more_than_32_are_dropped(
    setting, num_dropped, num_taken
):
    args, source = setting(
        rollout={
            "max_response_len": 2,
            "over_sampling": 64,
            "dynamic_filter_path": f"{HERE}.drop_the_first_{num_dropped}",
        },
        batch={"prompts": 32, "samples_per_prompt": 1},
    )
    output = generate_rollout(args, 0, source)
    assert len(output.samples) == 32
    assert output.metrics["rollout/groups_taken"] == num_taken
    drops = [v for k, v in output.metrics.items() if k.startswith("rollout/dynamic_filter/drop_")]
    assert sum(drops) == num_dropped


# -- (h) ---------------------------------------------------------------------------------------


async def short_for_the_first_two(args, sample, sampling_params):
    first = sample.group_index < 2 and sample.rollout_id == 3
    sampling_params |= {"max_tokens": 2} if first else {"ignore_eos": True}
    return await generate(args, sample, sampling_params)


def test_h_reaching_the_target_aborts_the_rest_which_continues_in_the_next_rollout(setting):
    rollout = {
        "partial": True,
        "over_sampling": 6,
        "max_response_len": 400,
        "custom_generate_path": f"{HERE}.short_for_the_first_two",
    }
    batch = {"prompts": 2, "samples_per_prompt": 2}
    args, source = setting(rollout=rollout, batch=batch)
    first = generate_rollout(args, 3, source)
    assert [g[0].group_index for g in first.samples] == [0, 1]
    waiting = [s for group in source.buffer for s in group]
    assert [s.group_index for s in waiting] == [2, 2, 3, 3, 4, 4, 5, 5]
    assert {s.status for s in waiting} == {Status.ABORTED}
    assert all(s.response_length < 400 for s in waiting)  # the rollout did not wait for them
    begun = {s.index: replace(s) for s in waiting if s.response_length}
    assert begun
    for sample in begun.values():
        assert len(sample.rollout_log_probs) == sample.response_length
        assert sample.metadata["start_rollout_id"] == 3

    args, _ = setting(rollout=rollout | {"over_sampling": 2}, batch=batch)
    second = generate_rollout(args, 4, source)
    assert [g[0].group_index for g in second.samples] == [2, 3]
    samples = [s for group in second.samples for s in group]
    assert begun.keys() & {s.index for s in samples}
    for sample in samples:
        assert sample.response_length == len(sample.rollout_log_probs) == 400
        assert sample.rollout_id == 4
        if part := begun.get(sample.index):
            assert sample.tokens[: len(part.tokens)] == part.tokens
            kept = len(part.rollout_log_probs)
            assert sample.rollout_log_probs[:kept] == part.rollout_log_probs
            assert sample.metadata["start_rollout_id"] == 3
