"""The tool and environment of the calculator example, without an engine."""

import subprocess
from pathlib import Path

import pytest

from examples.calculator import environment
from examples.calculator.make import demonstration, prompt
from examples.calculator.tool import Calculator
from tests.unit.fake_engine import FakeEngine, ids_of, make_config, write_prompts
from vime.data.batching import build_train_batch
from vime.rollout.data_source import RolloutDataSourceWithBuffer
from vime.rollout.sft_rollout import to_demonstration
from vime.rollout.vllm_rollout import generate_rollout
from vime.types import Sample, Status

CODE = "examples.calculator.environment"
END = 2  # <|im_end|>


@pytest.fixture(scope="module")
def calculator():
    tool = Calculator(timeout_s=1.0)
    yield tool
    tool.close()


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("37*46", "1702"),
        ("(1+2)*-3", "-9"),
        ("7/2", "3.5"),
        ("2**10 % 7", "2"),
        ("1/0", "error: ZeroDivisionError: division by zero"),
        ("__import__('os').system('id')", "error: ValueError: Call is not arithmetic"),
        ("open", "error: ValueError: Name is not arithmetic"),
        ("'a'*9", "error: ValueError: Constant is not arithmetic"),
        ("9**999", "error: too long"),
    ],
)
def test_the_tool_computes_arithmetic_and_nothing_else(calculator, expression, result):
    assert calculator.run(expression) == result


@pytest.mark.parametrize(
    ("hostile", "answer"),
    [
        ("9**9**9", "error: limit"),
        ("9**9**9**9", "error: limit"),
        ("(" * 5000, "error: too long"),
        ("1" * 100_000, "error: too long"),
    ],
)
def test_a_hostile_expression_hits_a_limit_and_the_next_expression_is_answered(
    calculator, hostile, answer
):
    assert calculator.run(hostile) == answer
    with pytest.MonkeyPatch.context() as patient:
        patient.setattr(calculator, "timeout_s", 60.0)
        assert calculator.run("1+1") == "2"


def test_the_tool_runs_in_its_own_process_with_limits(calculator):
    calculator.run("1")
    pid = calculator._process.pid
    limits = Path(f"/proc/{pid}/limits").read_text()
    assert "Max address space         268435456" in limits
    assert "Max open files            3 " in limits
    calculator.close()
    assert not subprocess.run(["ps", "-p", str(pid), "-o", "pid="], capture_output=True).stdout


@pytest.fixture
def config(hf, tmp_path):
    def make(**sections):
        prompts = write_prompts(tmp_path / "p.jsonl", 8)
        sections["data"] = {
            "prompt_data": str(prompts),
            "input_key": "prompt",
            "label_key": "label",
            "apply_chat_template": True,
        }
        sections["batch"] = {"prompts": 1, "samples_per_prompt": 2}
        generation = {"custom_generate_path": f"{CODE}.generate_with_calculator"}
        sections["rollout"] = generation | sections.get("rollout", {})
        sections["reward"] = {"custom_rm_path": f"{CODE}.reward"}
        return make_config(hf, **sections)

    return make


def turns(*texts):
    """The answer to a request depends on the number of turns in its tokens."""

    def answer(tokens, params):
        asked = tokens.count(END) // 2  # the user's turn, then a call and a result for each turn
        return [*ids_of(texts[min(asked, len(texts) - 1)]), END], 0.001

    return answer


def run(engine, cfg, rollout_id=0, source=None):
    args = engine.args(cfg)
    source = source or RolloutDataSourceWithBuffer(args)
    return generate_rollout(args, rollout_id, source), source


def test_a_call_gets_a_tool_turn_without_loss_and_no_token_is_encoded_twice(config):
    with FakeEngine(turns("calc: 3-3", "\\boxed{0}")) as engine:
        output, _ = run(engine, config())
        sent = [body["token_ids"] for body in engine.log]
    sample = output.samples[0][0]
    call, seen, last = (
        [*ids_of("calc: 3-3"), END],
        [2 + 1, 1, *ids_of("tool\n0"), END, 3, 1, *ids_of("assistant\n")],
        [*ids_of("\\boxed{0}"), END],
    )
    assert sample.tokens[sample.prompt_length :] == call + seen + last
    assert sample.loss_mask == [1] * len(call) + [0] * len(seen) + [1] * len(last)
    assert len(sample.rollout_log_probs) == sample.response_length
    assert sample.reward == 1.0
    assert sample.metadata["calls"] == 1
    assert sample.non_generation_time > 0
    prompt_ids = sample.tokens[: sample.prompt_length]
    assert sent.count(prompt_ids) == 2  # two samples
    assert sent.count(prompt_ids + call + seen) == 2  # the call's tokens exactly as sampled
    batch = build_train_batch(output.samples, config(), 0)
    weights = batch.sequences[0].weight
    assert float(weights[len(call) : len(call) + len(seen)].sum()) == 0.0
    assert weights.sum() == pytest.approx(0.5)
    assert output.metrics["perf/non_generation_time/mean"] > 0


def test_calls_end_at_the_maximum(config):
    with FakeEngine(turns("calc: 1+1")) as engine:
        output, _ = run(engine, config())
    sample = output.samples[0][0]
    assert sample.metadata["calls"] == environment.MAX_CALLS == 2
    assert sample.response.count("calc: 1+1") == 3
    assert sample.response.endswith("calc: 1+1<|im_end|>")


def test_a_conversation_that_runs_out_of_tokens_is_truncated(config):
    with FakeEngine(turns("calc: 1+1")) as engine:
        output, _ = run(engine, config(rollout={"max_response_len": 20}))
    sample = output.samples[0][0]
    assert sample.status is Status.TRUNCATED
    assert len(sample.loss_mask) == sample.response_length


@pytest.mark.parametrize(
    ("response", "expression"),
    [
        ("calc: 37*46<|im_end|>", "37*46"),
        ("so calc: 1<|im_end|>", None),
        ("\\boxed{3}<|im_end|>", None),
        ("calc: 1<|im_end|>\n<|im_start|>tool\n1<|im_end|>\n<|im_start|>assistant\nok", None),
    ],
)
def test_a_call_is_the_whole_of_the_last_turn(response, expression):
    sample = Sample(response=response, status=Status.COMPLETED)
    assert environment.find_call(sample) == expression
    sample.status = Status.ABORTED
    assert environment.find_call(sample) is None


def test_demonstrations_look_like_the_environments_turns_without_loss_on_the_tool(hf):
    import random

    from vime.data.chat import load_tokenizer

    rng = random.Random(1)
    rows = [demonstration(rng) for _ in range(200)]
    calls = [row["messages"] for row in rows if len(row["messages"]) == 4]
    assert 110 < len(calls) < 170
    messages = calls[0]
    cfg = make_config(hf, data={"apply_chat_template": True})
    sample = Sample(prompt=messages)
    tokenizer = load_tokenizer(str(hf))
    to_demonstration(cfg, tokenizer, sample)
    tool = environment.OBSERVATION.format(messages[2]["content"])
    assert tool in sample.response
    unmasked = [
        t
        for t, m in zip(sample.tokens[sample.prompt_length :], sample.loss_mask, strict=True)
        if not m
    ]
    assert tokenizer.decode(unmasked) == tool
    assert prompt(rng)["label"].isdigit()
