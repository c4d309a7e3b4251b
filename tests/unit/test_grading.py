import asyncio
import logging
import subprocess
import sys
import time
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.tables import table_in
from tests.unit.fake_engine import make_config
from tools.docs_tables import grader_table
from vime.config.view import ArgsView
from vime.errors import ConfigError, PluginError
from vime.rollout import grading
from vime.rollout.rm_hub import answers, dapo, deepscaler, f1, math, registry
from vime.rollout.rm_hub.grader import GradingTimeout
from vime.rollout.rm_hub.pool import GraderPool
from vime.rollout.rm_hub.registry import GRADERS
from vime.types import Sample, Status


@pytest.fixture(scope="module")
def pool():
    """One grader process, with a deadline that no answer of these tests needs."""
    pool = GraderPool(1, timeout_s=120.0)
    yield pool
    pool.close()


def make_args(**reward):
    return ArgsView(make_config("none", reward=reward))


def finished(response, label, index=0, **fields):
    return Sample(index=index, response=response, label=label, status=Status.COMPLETED, **fields)


def grade(args, *samples):
    asyncio.run(grading.grade_group(args, list(samples)))
    return samples[0].reward if len(samples) == 1 else [s.reward for s in samples]


def test_the_last_box_counts_if_its_braces_close():
    assert answers.last_boxed(r"\boxed{1} so \boxed{\frac{1}{2}}.") == r"\frac{1}{2}"
    assert answers.last_boxed(r"\boxed{1} so \boxed{2") is None
    assert answers.last_boxed("42") is None
    deep = "{" * 50_000 + "}" * 50_000
    assert answers.last_boxed(rf"\boxed{{{deep}}}") == deep


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (r"\dfrac{1}{2}", "1/2"),
        (r"\frac12", r"\frac{1}{2}"),
        (r"\frac1{72}", r"\frac{1}{72}"),
        ("0.5", r"\frac{1}{2}"),
        (".25", "0.25"),
        (r"\left( 1, 2 \right)", "(1,2)"),
        (r"90^\circ", "90"),
        (r"50\%", "50"),
        (r"\$12", "12"),
        (r"5\text{ cm}", "5"),
        (r"\text{even}", "even"),
        ("x = 7", "7"),
        (r"\sqrt2", r"\sqrt{2}"),
    ],
)
def test_spellings_of_one_answer_are_equal(a, b):
    assert answers.normalise(a) == answers.normalise(b)


@pytest.mark.parametrize(
    ("response", "label", "reward"),
    [
        (r"<think>hm</think>\boxed{834}", "834", 1.0),
        (r"###Response \boxed{834}", "834", 1.0),
        (r"\boxed{834}", "834", 0.0),
        (r"<think>\boxed{834}</think> so 834", "834", 0.0),
        (r"</think>\boxed{834.0}", "834", 1.0),
        (r"</think>\boxed{1,000}", "1000", 1.0),
        (r"</think>\boxed{83a}", "834", 0.0),
        (r"</think>\boxed{2+2}", "4", 0.0),
        (r"</think>\boxed{\frac{2}{4}}", r"\frac{1}{2}", 0.0),
        (r"</think>\boxed{\frac{1}{2}}", r"\boxed{0.5}", 1.0),
        (r"</think>\boxed{}", "1", 0.0),
    ],
)
def test_deepscaler_grades_plain_answers_without_algebra(response, label, reward):
    assert deepscaler.quick(response, label, {}) == reward


@pytest.mark.parametrize(
    ("answer", "label", "reward"),
    [
        (r"2\sqrt{2}", r"\sqrt{8}", 1.0),
        (r"(x+1)^2", "x^2+2x+1", 1.0),
        (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}", 1.0),
        (r"(1, \sqrt{4}+0)", r"(1,2)", 1.0),
        (r"(1,2]", r"(1,2)", 0.0),
        (r"2\pi", r"3\pi", 0.0),
        (r"x+1", "x+2", 0.0),
        (r"\mathbb{R}", r"\sqrt{2}", 0.0),
        (r"__import__('os').getpid()", r"\sqrt{2}", 0.0),
        (r"sqrt.__class__", r"\sqrt{2}", 0.0),
    ],
)
def test_deepscaler_grades_the_rest_by_algebra_in_a_grader_process(pool, answer, label, reward):
    response = rf"</think>\boxed{{{answer}}}"
    assert deepscaler.quick(response, label, {}) is None
    assert pool.submit("deepscaler", response, label, {}).result(240) == reward


@pytest.mark.parametrize(
    ("answer", "label", "reward"),
    [("834", "834", 1.0), ("835", "834", 0.0), ("0.50", r"\frac{1}{2}", 1.0), ("", "", 0.0)],
)
def test_math_compares_plain_numbers_itself(answer, label, reward):
    assert math.quick(rf"\boxed{{{answer}}}", label, {}) == reward


@pytest.mark.parametrize(
    ("answer", "label", "reward"),
    [(r"\sqrt{8}", r"2\sqrt{2}", 1.0), (r"\{1,2\}", r"\{2,1\}", 1.0), (r"x+1", "x", 0.0)],
)
def test_math_uses_math_verify_for_the_rest(pool, answer, label, reward):
    pytest.importorskip("math_verify")
    response = rf"\boxed{{{answer}}}"
    assert math.quick(response, label, {}) is None
    assert pool.submit("math", response, label, {}).result(240) == reward


def test_dapo_reads_the_answer_line_near_the_end():
    assert dapo.grade("so\nAnswer: 42", "42", {}) == {"score": 1.0, "acc": True, "pred": "42"}
    assert dapo.grade("Answer: $x = 1,042$.<|im_end|>", "1042", {})["acc"]
    assert dapo.grade("Answer: 41", "42", {})["score"] == -1.0
    for answer in ("1{,}000", r"$\$1000$", "1000 dollars", "1000 hours", "1000.0", "1000 degrees"):
        assert dapo.grade(f"Answer: {answer}", "1000", {})["acc"], answer
    assert not dapo.grade("Answer: 3 4", "34", {})["acc"]
    assert dapo.grade("Answer: 42" + " " * 301, "42", {})["pred"] == "[INVALID]"


def test_f1_counts_shared_words():
    assert f1.grade("The cat sat.", "a cat sat", {}) == 1.0
    assert f1.grade("cat dog", "cat", {}) == pytest.approx(2 / 3)
    assert f1.grade("dog", "cat", {}) == 0.0


def test_the_most_specific_grader_wins():
    here = f"{__name__}."
    metadata = {"rm_type": "f1"}
    sample = lambda **kw: finished(r"\boxed{5}", "5", **kw)  # noqa: E731
    assert grade(make_args(rm_type="math"), sample()) == 1.0
    assert grade(make_args(rm_type="math"), sample(metadata=metadata)) == 0.0
    both = make_args(rm_type="math", custom_rm_path=here + "constant")
    assert grade(both, sample(metadata=metadata)) == 0.25
    assert grade(both, sample(custom_rm_path=here + "plain")) == 0.75
    ungraded = sample()
    assert grade(make_args(), ungraded) is None
    assert "set --rm-type or --custom-rm-path" in ungraded.failure


async def constant(args, sample, **kwargs):
    return 0.25


def plain(args, sample):
    return 0.75


async def by_rank(args, samples, **kwargs):
    return [float(i) for i in range(len(samples))]


async def too_few(args, samples, **kwargs):
    return [1.0]


def test_group_rm_grades_a_whole_group_and_must_return_a_reward_for_each_sample():
    samples = [finished("x", "y", index=i) for i in range(3)]
    args = make_args(group_rm=True, custom_rm_path=f"{__name__}.by_rank")
    assert grade(args, *samples) == [0.0, 1.0, 2.0]
    args = make_args(group_rm=True, custom_rm_path=f"{__name__}.too_few")
    with pytest.raises(PluginError, match="returned 1 rewards for 3 samples"):
        grade(args, *[finished("x", "y", index=i) for i in range(3)])


def test_the_boxed_prefix_grades_the_content_of_the_box():
    assert grade(make_args(rm_type="boxed_f1"), finished(r"noise \boxed{a cat}", "cat")) == 1.0
    assert grade(make_args(rm_type="f1"), finished(r"noise \boxed{a cat}", "cat")) < 1.0


@pytest.mark.parametrize("name", [name for name, grader in GRADERS.items() if grader.takes_box])
def test_the_boxed_prefix_is_refused_where_the_grader_reads_boxes_itself(name):
    with pytest.raises(
        ConfigError, match=f"boxed_{name} would remove the box that {name} looks for.*Use {name}"
    ):
        make_args(rm_type=f"boxed_{name}", reward_key="score")
    named = {"rm_type": f"boxed_{name}"}
    sample = finished(r"</think> Answer: \boxed{42}", "42", metadata=named)
    assert grade(make_args(rm_type="f1"), sample) is None
    assert "would remove the box that" in sample.failure


def test_a_right_answer_in_a_box_is_right_wherever_the_prefix_is_allowed():
    metadata = {"instruction_id_list": ["punctuation:no_comma"]}
    for name in ("gpqa", "f1", "ifeval"):
        sample = finished(r"first, this: \boxed{B}", "B", metadata=dict(metadata))
        assert grade(make_args(rm_type=f"boxed_{name}"), sample) == 1.0, name


def test_random_gives_the_same_rewards_in_every_run():
    first = [grade(make_args(rm_type="random"), finished("", "", index=i)) for i in range(20)]
    again = [grade(make_args(rm_type="random"), finished("", "", index=i)) for i in range(20)]
    assert first == again
    assert set(first) == {0.0, 1.0}


def nothing(args, sample):
    return None


def infinite(args, sample):
    return float("nan")


@pytest.mark.parametrize("name", ["nothing", "infinite"])
def test_an_unusable_reward_fails_the_sample_with_its_reason(name):
    sample = finished("x", "y")
    assert grade(make_args(custom_rm_path=f"{__name__}.{name}"), sample) is None
    assert sample.status is Status.FAILED
    assert "is no reward" in sample.failure


@pytest.mark.parametrize("answer", ["x" + "+x" * 400, "{" * 100_000], ids=["long", "unclosed"])
def test_a_long_expression_is_graded(pool, answer):
    response = rf"</think>\boxed{{{answer}}}"
    assert pool.submit("deepscaler", response, r"\sqrt{2}", {}).result(240) == 0.0


@pytest.mark.parametrize(
    ("grader", "answer", "label"),
    [
        ("deepscaler", "9^{9^{9^{9}}}", r"\sqrt{2}"),
        ("math", "9^{9^{9^{2}}}-x", r"x^{9^{9^{9}}}"),
    ],
)
def test_a_hostile_expression_times_out_and_the_next_answer_is_graded(
    pool, monkeypatch, grader, answer, label
):
    """These expressions would keep a grader busy for years. A timeout is not a wrong answer."""
    with monkeypatch.context() as hasty:
        hasty.setattr(pool, "timeout_s", 1.0)
        hostile = pool.submit(grader, rf"</think>\boxed{{{answer}}}", label, {})
        with pytest.raises(GradingTimeout, match="longer than 1 s"):
            hostile.result(240)
    fine = pool.submit("deepscaler", r"</think>\boxed{\sqrt{8}}", r"2\sqrt{2}", {})
    assert fine.result(240) == 1.0


def test_256_plain_answers_take_a_tenth_of_a_cpu_second_and_no_grader_process(monkeypatch):
    monkeypatch.setattr(grading, "shared_pool", None)
    samples = [finished(rf"7+1=8\n\boxed{{{i}}}", str(i % 300), index=i) for i in range(256)]
    args = make_args(rm_type="math")
    started = time.process_time()
    grade(args, *samples)
    assert time.process_time() - started < 0.1
    assert {s.reward for s in samples} == {1.0}


def test_remote_rm_posts_the_sample_and_does_not_retry_a_4xx():
    from aiohttp import web

    seen = []

    async def reward(request):
        seen.append(await request.json())
        if seen[-1]["response"] == "bad":
            return web.Response(status=400, text="no such thing")
        return web.json_response(0.5) if len(seen) > 1 else web.Response(status=503)

    async def scenario():
        app = web.Application()
        app.router.add_post("/rm", reward)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = site._server.sockets[0].getsockname()[1]
        args = make_args(rm_type="remote_rm", rm_url=f"http://127.0.0.1:{port}/rm")
        good, bad = finished("good", "1"), finished("bad", "1")
        await grading.grade_group(args, [good])
        await grading.grade_group(args, [bad])
        await runner.cleanup()
        return good, bad

    good, bad = asyncio.run(scenario())
    assert good.reward == 0.5
    assert seen[0] == {"prompt": "", "response": "good", "label": "1"}
    assert len(seen) == 3
    assert bad.status is Status.FAILED
    assert "HTTP 400" in bad.failure


def test_reward_flags_that_cannot_work_are_refused_by_name():
    def problems(**reward):
        return grading.check_rewards(make_args(**reward).config)

    assert problems(rm_type="math") == []
    assert problems(rm_type="dapo", reward_key="score") == []
    assert problems(rm_type="dapo", reward_key="right") == [
        "--rm-type dapo gives a dict of score and acc, and --reward-key is right. "
        "Give --reward-key score."
    ]
    with pytest.raises(ConfigError, match=f"--rm-type deepscalar is unknown.*{', '.join(GRADERS)}"):
        make_args(rm_type="deepscalar")
    with pytest.raises(ConfigError, match="dict of score and acc. Add --reward-key score"):
        make_args(rm_type="dapo")


def test_a_missing_package_of_a_grader_is_reported_before_the_run(monkeypatch):
    cfg = make_args(rm_type="math").config
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert grading.check_rewards(cfg) == [
        "--rm-type math needs the package math-verify. Install it."
    ]


def test_every_grader_file_is_registered():
    folder = Path(registry.__file__).parent
    declared = {p.stem for p in folder.glob("*.py") if "GRADER = Grader(" in p.read_text()}
    assert declared == set(GRADERS)


def test_the_documentations_table_matches_the_graders():
    written = table_in("data-generation.md", "graders").splitlines()
    assert len(written) >= 2 + 8
    assert [row for row in grader_table().splitlines() if row in written] == written


def test_the_registry_imports_no_package_that_only_some_graders_need():
    heavy = {"torch", "sympy", "math_verify", "aiohttp", "numpy"}
    code = f"import sys, vime.rollout.rm_hub.registry; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_without_a_quick_function_answers_go_to_a_worker(monkeypatch):
    asked = []

    class Pool:
        def submit(self, *task):
            asked.append(task)
            future = Future()
            future.set_result(0.5)
            return future

    monkeypatch.setattr(grading, "shared_pool", lambda num_workers, timeout_s: Pool())
    monkeypatch.setitem(GRADERS, "f1", replace(GRADERS["f1"], quick=None))
    assert grade(make_args(rm_type="boxed_f1"), finished(r"\boxed{cat}<|im_end|>", "cat")) == 0.5
    assert asked == [("f1", "cat", "cat", {})]


def test_scores_below_0_are_refused_for_maxrl():
    def problems(key):
        reward = {"rm_type": "dapo", "reward_key": key}
        cfg = make_config("none", reward=reward, algorithm={"advantage_estimator": "maxrl"})
        return grading.check_rewards(cfg)

    assert problems("acc") == []
    assert problems("score")[0].endswith("needs rewards of at least 0. Give --reward-key acc.")


def test_a_grader_that_compares_answers_needs_a_label():
    sample = finished(r"\boxed{5}", None)
    assert grade(make_args(rm_type="math"), sample) is None
    assert (
        sample.failure == "grading failed: math compares with a label, and the prompt has no label"
    )

    def problems(rm_type, **data):
        cfg = make_config("none", reward={"rm_type": rm_type}, data={"prompt_data": "p"} | data)
        return grading.check_rewards(cfg)

    assert problems("boxed_f1") == [
        "--rm-type boxed_f1 compares answers with a label. Add --label-key FIELD: the "
        "field with the label."
    ]
    assert problems("math", label_key="label") == problems("ifeval") == problems("random") == []


def test_missing_thinking_marks_are_warned_of_only_if_no_response_has_one(caplog):
    args = make_args(rm_type="deepscaler")
    samples = [finished("x", "1", reward=0.0), finished("</think> x", "1", reward=0.0)]
    with caplog.at_level(logging.WARNING):
        assert not grading.warn_of_missing_marks(args, samples)
        assert grading.warn_of_missing_marks(args, samples[:1])
    assert "EVERY REWARD" in caplog.text


@pytest.mark.parametrize(
    ("response", "text"),
    [
        ("B<|im_end|>", "B"),
        ("B <|im_end|>\n<|endoftext|>\n", "B"),
        ("a</s>", "a"),
        ("<|im_end|> in the middle", "<|im_end|> in the middle"),
        ("2 <| 3 |>", "2 <| 3 |>"),
        ("B<｜end▁of▁sentence｜>", "B"),
        ("B[EOS]", "B"),
        ("B [EOS]\n[PAD] <|im_end|>", "B"),
        ("B[e~[", "B"),
        ("B<turn|>", "B"),
        ("[EOS] in the middle", "[EOS] in the middle"),
        ("B\n", "B\n"),
    ],
)
def test_end_marks_are_removed_from_an_answer(response, text):
    assert grading.without_end_mark(response) == text
