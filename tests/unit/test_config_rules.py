"""Rules across flags: a refusal names flag, value and remedy; a notice names an ignored flag."""

import pytest

from tests.unit.command_lines import refused, words, write_checkpoint, write_prompts
from vime.cli import parse_config
from vime.config.sections.rollout import FULLY_ASYNC
from vime.ray.preflight import check_one_ahead, check_synchronous

REFUSED = {
    "steps that do not divide": (
        {"--num-steps-per-rollout": "3"},
        "--num-steps-per-rollout 3 does not divide 256 samples (32 prompts x 8). Lower it or "
        "change --rollout-batch-size.",
    ),
    "a batch size that does not divide": (
        {"--global-batch-size": "100"},
        "--global-batch-size 100 does not divide 256 samples (32 prompts x 8). Give a divisor, or "
        "give --num-steps-per-rollout instead.",
    ),
    "steps and batch size that disagree": (
        {"--global-batch-size": "64", "--num-steps-per-rollout": "2"},
        "--global-batch-size 64 x --num-steps-per-rollout 2 is not 256 samples (32 prompts x 8). "
        "Give --global-batch-size 128, or only one of the two.",
    ),
    "packs without a size": (
        {"--use-dynamic-batch-size": None},
        "--use-dynamic-batch-size needs the size of a micro-batch. Add --max-tokens-per-gpu, for "
        "example 9216.",
    ),
    "an engine on parts of two nodes": (
        {
            "--colocate": None,
            "--actor-num-nodes": "2",
            "--actor-num-gpus-per-node": "3",
            "--rollout-num-gpus-per-engine": "2",
        },
        "--rollout-num-gpus-per-engine 2 would put an engine on parts of two nodes, with "
        "--actor-num-gpus-per-node 3. Give a divisor or a multiple of 3.",
    ),
    "partial rollouts where nothing stops": (
        {"--rollout-function-path": FULLY_ASYNC, "--partial-rollout": None},
        f"--partial-rollout: --rollout-function-path {FULLY_ASYNC} continues all unfinished groups "
        "anyway. Leave --partial-rollout out.",
    ),
    "weights that get too old between updates": (
        {"--rollout-function-path": FULLY_ASYNC, "--update-weights-interval": "4"},
        "--update-weights-interval 4 lets weights get 3 versions old, and --max-staleness 2 "
        "forbids it. Raise the second, or lower the first.",
    ),
    "a cap on ages without the mode": (
        {"--max-staleness": "1"},
        f"--max-staleness 1 has no effect without --rollout-function-path {FULLY_ASYNC}. Add that, "
        "or leave it out.",
    ),
    "a folder of code that is not there": (
        {"--working-dir": "/no/such/folder"},
        "--working-dir /no/such/folder is not a folder. Give the folder with your code.",
    ),
    "variables that are not texts": (
        {"--train-env-vars": '{"NCCL_NTHREADS":64}'},
        "--train-env-vars: NCCL_NTHREADS is 64, and the values of environment variables are texts. "
        'Put it into quotes: {"NCCL_NTHREADS": "64"}.',
    ),
    "a name that no variable can have": (
        {"--train-env-vars": '{"A=B":"1"}'},
        "--train-env-vars: 'A=B' cannot be an environment variable. Give names without \"=\", and "
        "neither names nor values with a zero byte.",
    ),
    "a policy without advantages": (
        {"--disable-compute-advantages-and-returns": None},
        "--disable-compute-advantages-and-returns leaves --loss-type policy_loss nothing to learn "
        "from. Leave it out.",
    ),
    "engines that forget between updates": (
        {
            "--colocate": None,
            "--update-weights-interval": "2",
        },
        "--update-weights-interval 2: with --colocate, engines drop their weights while the "
        "trainer works. Add --no-offload-rollout, or leave --update-weights-interval out.",
    ),
    "a checkpoint between weight updates": (
        {"--update-weights-interval": "2", "--save": "there", "--save-interval": "3"},
        "--update-weights-interval 2 does not divide --save-interval 3. Set the second to a "
        "multiple of 2.",
    ),
    "no length of the run": (
        {"--num-rollout": ""},
        "--num-rollout is missing. Give --num-rollout or --num-epoch.",
    ),
    "two lengths of the run": (
        {"--num-epoch": "2"},
        "--num-rollout 3 and --num-epoch 2 both set the length of the run. Give one.",
    ),
    "a step with fewer samples than ranks": (
        {"--num-steps-per-rollout": "64"},
        "--num-steps-per-rollout 64 leaves 4 samples per step for 8 data-parallel ranks. Lower "
        "it, or raise --rollout-batch-size 32 or --n-samples-per-prompt 8.",
    ),
    "engines that do not divide": (
        {"--rollout-num-gpus": "6", "--rollout-num-gpus-per-engine": "4"},
        "--rollout-num-gpus-per-engine 4 does not divide the 6 GPUs that generate. Give a divisor "
        "of 6, or change --rollout-num-gpus.",
    ),
    "more GPUs than a node": (
        {"--actor-num-gpus-per-node": "16"},
        "--actor-num-gpus-per-node 16 is more than --num-gpus-per-node 8. Lower the first, or "
        "raise the second to the number of GPUs of a node.",
    ),
    "an engine on a node and a part of the next": (
        {
            "--actor-num-gpus-per-node": "3",
            "--num-gpus-per-node": "3",
            "--rollout-num-gpus": "4",
            "--rollout-num-gpus-per-engine": "4",
        },
        "--rollout-num-gpus-per-engine 4 would put an engine on parts of two nodes, with "
        "--num-gpus-per-node 3. Give at most 3, or a multiple of 3.",
    ),
    "an engine larger than the model": (
        {"--rollout-num-gpus-per-engine": "8"},
        "--rollout-num-gpus-per-engine 8 does not divide the model's 4 attention heads. Give a "
        "divisor of 4.",
    ),
    "a layout that does not divide": (
        {"--tensor-model-parallel-size": "3"},
        "--tensor-model-parallel-size 3 x --pipeline-model-parallel-size 1 x "
        "--context-parallel-size 1 = 3 does not divide the 8 GPUs that train. Lower one of them, "
        "or make --actor-num-nodes 1 x --actor-num-gpus-per-node 8 a multiple of 3.",
    ),
    "experts that do not divide": (
        {"--expert-model-parallel-size": "3"},
        "--expert-tensor-parallel-size 1 x --expert-model-parallel-size 3 x "
        "--pipeline-model-parallel-size 1 = 3 does not divide the 8 GPUs that train. Lower one of "
        "them, or make --actor-num-nodes 1 x --actor-num-gpus-per-node 8 a multiple of 3.",
    ),
    "a virtual pipeline without a pipeline": (
        {"--virtual-pipeline-model-parallel-size": "2"},
        "--virtual-pipeline-model-parallel-size 2 needs a pipeline, and "
        "--pipeline-model-parallel-size is 1. Raise the second, or leave the first out.",
    ),
    "full recompute without a method": (
        {"--recompute-granularity": "full"},
        "--recompute-granularity full needs a method. Add --recompute-method uniform "
        "--recompute-num-layers 1.",
    ),
    "a recompute method without full recompute": (
        {"--recompute-method": "uniform", "--recompute-num-layers": "1"},
        "--recompute-method uniform has no effect without --recompute-granularity full. Add "
        "that, or leave it out.",
    ),
    "over-sampling below the batch": (
        {"--over-sampling-batch-size": "16"},
        "--over-sampling-batch-size 16 is below --rollout-batch-size 32. Give more than 32, for "
        "example 64.",
    ),
    "two KL penalties": (
        {"--kl-coef": "0.1", "--kl-loss-coef": "0.2", "--use-kl-loss": None},
        "--kl-coef 0.1 and --kl-loss-coef 0.2 exclude each other: the first is a penalty on the "
        "reward, the second a loss. Set one to 0.",
    ),
    "a KL coefficient without the loss": (
        {"--kl-loss-coef": "0.2"},
        "--kl-loss-coef 0.2 has no effect without --use-kl-loss. Add that, or leave it out.",
    ),
    "a teacher without distillation": (
        {"--opd-teacher-load": "teacher"},
        "--opd-teacher-load teacher has no effect without --use-opd. Add that, or leave it out.",
    ),
    "distillation without a teacher": (
        {"--use-opd": None},
        "--use-opd needs a teacher. Add --opd-teacher-load FOLDER: a checkpoint or an HF folder "
        "of a model with the policy's architecture.",
    ),
    "a teacher that is not there": (
        {"--use-opd": None, "--opd-teacher-load": "none"},
        "--opd-teacher-load none is not a folder. Give a checkpoint or an HF folder.",
    ),
    "a served teacher without its server": (
        {"--use-opd": None, "--opd-type": "vllm"},
        "--opd-type vllm needs a teacher. Add --opd-teacher-url http://HOST:PORT of `vllm serve "
        "TEACHER`, or your own function that sets Sample.teacher_log_probs.",
    ),
    "a served teacher at another temperature": (
        {
            "--use-opd": None,
            "--opd-type": "vllm",
            "--opd-teacher-url": "http://a:1",
            "--rollout-temperature": "0.8",
        },
        "--opd-teacher-url http://a:1 gives log-probabilities at temperature 1, and "
        "--rollout-temperature 0.8 samples at another. Set the second to 1, or use "
        "--opd-type megatron.",
    ),
    "a server that is no address": (
        {"--use-opd": None, "--opd-type": "vllm", "--opd-teacher-url": "a:1"},
        "--opd-teacher-url a:1 is not an address. Give http://HOST:PORT of a vLLM server.",
    ),
    "a server without distillation": (
        {"--opd-teacher-url": "http://a:1"},
        "--opd-teacher-url http://a:1 has no effect without --use-opd --opd-type vllm. Add that, "
        "or leave it out.",
    ),
    "a folder for a served teacher": (
        {
            "--use-opd": None,
            "--opd-type": "vllm",
            "--opd-teacher-url": "http://a:1",
            "--opd-teacher-load": "t",
        },
        "--opd-teacher-load t has no effect without --use-opd --opd-type megatron. Add that, or "
        "leave it out.",
    ),
    "a distillation coefficient alone": (
        {"--opd-kl-coef": "0.5"},
        "--opd-kl-coef 0.5 has no effect without --use-opd. Add that, or leave it out.",
    ),
    "evaluation without data": (
        {"--eval-interval": "5"},
        "--eval-interval 5 has nothing to evaluate. Add --eval-prompt-data NAME PATH, or leave it "
        "out.",
    ),
    "saving nowhere": (
        {"--save-interval": "20"},
        "--save-interval 20 needs a folder to save to. Add --save FOLDER.",
    ),
    "one export folder for all": (
        {"--save-hf": "out/hf"},
        "--save-hf out/hf names one place for all rollouts. Put {rollout_id} into it.",
    ),
    "another name in the braces of an export": (
        {"--save-hf": "out/{user}/{rollout_id}"},
        "--save-hf out/{user}/{rollout_id}: only {rollout_id} can stand in braces. Correct it, or "
        "write {{ and }} for braces that belong to the name.",
    ),
    "no name in the braces of saved rollouts": (
        {"--save-debug-rollout-data": "out/{}/{rollout_id}.pt"},
        "--save-debug-rollout-data out/{}/{rollout_id}.pt: only {rollout_id} can stand in braces. "
        "Correct it, or write {{ and }} for braces that belong to the name.",
    ),
    "a brace that stays open in loaded rollouts": (
        {"--load-debug-rollout-data": "out/{rollout_id"},
        "--load-debug-rollout-data out/{rollout_id: only {rollout_id} can stand in braces. Correct "
        "it, or write {{ and }} for braces that belong to the name.",
    ),
    "a format of numbers, where evaluations have names": (
        {"--save-debug-rollout-data": "out/{rollout_id:04d}.pt"},
        "--save-debug-rollout-data out/{rollout_id:04d}.pt: only {rollout_id} can stand in braces. "
        "Correct it, or write {{ and }} for braces that belong to the name.",
    ),
    "a first stage without a pipeline": (
        {"--decoder-first-pipeline-num-layers": "2"},
        "--decoder-first-pipeline-num-layers 2: there is one pipeline stage only. Raise "
        "--pipeline-model-parallel-size, or leave it out.",
    ),
    "virtual stages without a pipeline, by layers": (
        {"--num-layers-per-virtual-pipeline-stage": "1"},
        "--num-layers-per-virtual-pipeline-stage 1 needs a pipeline, and "
        "--pipeline-model-parallel-size is 1. Raise the second, or leave the first out.",
    ),
    "virtual stages asked for twice": (
        {
            "--pipeline-model-parallel-size": "2",
            "--num-virtual-stages-per-pipeline-rank": "2",
            "--num-layers-per-virtual-pipeline-stage": "1",
        },
        "--num-layers-per-virtual-pipeline-stage 1 and --virtual-pipeline-model-parallel-size 2 "
        "both divide the pipeline ranks. Give one.",
    ),
    "virtual stages by layers where stages differ": (
        {
            "--pipeline-model-parallel-size": "2",
            "--decoder-last-pipeline-num-layers": "1",
            "--num-layers-per-virtual-pipeline-stage": "1",
        },
        "--num-layers-per-virtual-pipeline-stage 1 is for stages of equal size, and "
        "--decoder-last-pipeline-num-layers 1 makes them differ. Give "
        "--virtual-pipeline-model-parallel-size in place of the first.",
    ),
    "a step of no checkpoint": (
        {"--ckpt-step": "20"},
        "--ckpt-step 20 has no effect without --load. Add that, or leave it out.",
    ),
    "no prompts": (
        {"--prompt-data": ""},
        "--prompt-data is missing. Add --prompt-data FILE.jsonl, or a --data-source-path.",
    ),
    "a grader without its server": (
        {"--rm-type": "remote_rm"},
        "--rm-type remote_rm needs a server. Add --rm-url http://HOST:PORT/PATH.",
    ),
    "a group grader without its function": (
        {"--group-rm": None},
        "--group-rm has no effect without --custom-rm-path. Add that, or leave it out.",
    ),
    "masks without partial rollouts": (
        {"--mask-offpolicy-in-partial-rollout": None},
        "--mask-offpolicy-in-partial-rollout has no effect without --partial-rollout. Add that, "
        "or leave it out.",
    ),
    "no room for a prompt": (
        {"--rollout-max-response-len": "4096", "--vllm-max-model-len": "4096"},
        "--rollout-max-response-len 4096 leaves no room for a prompt in --vllm-max-model-len 4096. "
        "Lower it.",
    ),
    "prompts as long as the context": (
        {"--rollout-max-prompt-len": "512", "--rollout-max-context-len": "512"},
        "--rollout-max-prompt-len 512 leaves no room for a response in "
        "--rollout-max-context-len 512. Lower the first or raise the second.",
    ),
    "imitation of sampled answers": (
        {"--loss-type": "sft_loss"},
        "--loss-type sft_loss learns from given answers, and --rollout-function-path "
        "vime.rollout.vllm_rollout.generate_rollout samples new ones. Add --rollout-function-path "
        "vime.rollout.sft_rollout.generate_rollout.",
    ),
    "reinforcement of given answers": (
        {"--rollout-function-path": "vime.rollout.sft_rollout.generate_rollout"},
        "--rollout-function-path vime.rollout.sft_rollout.generate_rollout makes no rewards, and "
        "--loss-type policy_loss needs rewards. Add --loss-type sft_loss.",
    ),
    "sampling without engines": (
        {"--debug-train-only": None},
        "--debug-train-only starts no engines, and --rollout-function-path "
        "vime.rollout.vllm_rollout.generate_rollout needs engines. Give a function that reads "
        "its data itself, or drop --debug-train-only.",
    ),
    "two warm-ups": (
        {"--lr-warmup-fraction": "0.1", "--lr-warmup-iters": "6"},
        "--lr-warmup-fraction 0.1 and --lr-warmup-iters 6 both set the warm-up. Give one.",
    ),
    "a warm-up as long as the run": (
        {"--lr-decay-style": "linear", "--lr-warmup-iters": "3"},
        "--lr-warmup-iters 3 leaves none of 3 optimizer steps for --lr-decay-style linear. Lower "
        "it, or raise --num-rollout.",
    ),
    "a warm-up as long as the decay": (
        {"--lr-decay-style": "WSD", "--lr-warmup-fraction": "1", "--lr-decay-iters": "9"},
        "--lr-warmup-fraction 1.0 leaves none of 9 optimizer steps for --lr-decay-style WSD. "
        "Lower it, or raise --lr-decay-iters.",
    ),
    "a critic's warm-up as long as the run": (
        {
            "--advantage-estimator": "ppo",
            "--lr-decay-style": "cosine",
            "--critic-lr-warmup-iters": "4",
        },
        "For the critic: --critic-lr-warmup-iters 4 leaves none of 3 optimizer steps for "
        "--lr-decay-style cosine. Lower it, or raise --num-rollout.",
    ),
    "a decay over an unknown length": (
        {"--num-rollout": "", "--num-epoch": "2", "--lr-decay-style": "linear"},
        "--lr-decay-style linear depends on the length of the run, and with --num-epoch only the "
        "data determines it. Give --num-rollout or --lr-decay-iters.",
    ),
    "a warm-up of an unknown length": (
        {"--num-rollout": "", "--num-epoch": "2", "--lr-warmup-fraction": "0.1"},
        "--lr-warmup-fraction 0.1 depends on the length of the run, and with --num-epoch only "
        "the data determines it. Give --num-rollout or --lr-decay-iters.",
    ),
    "a floor above the rate": (
        {"--lr": "1e-6", "--min-lr": "1e-5"},
        "--min-lr 1e-05 is above --lr 1e-06. Lower it.",
    ),
    "an overlap of nothing": (
        {"--overlap-param-gather": None, "--overlap-grad-reduce": None},
        "--overlap-param-gather has no effect without --use-distributed-optimizer "
        "--overlap-grad-reduce. Add that, or leave it out.",
    ),
    "nothing left to run": (
        {
            "--debug-train-only": None,
            "--debug-rollout-only": None,
            "--rollout-function-path": "mine.read_data",
        },
        "--debug-train-only and --debug-rollout-only leave nothing to run. Give one.",
    ),
    "an overlong buffer longer than a response": (
        {"--overlong-buffer-len": "4096", "--rollout-max-response-len": "64"},
        "--overlong-buffer-len 4096 is more than --rollout-max-response-len 64. Lower it.",
    ),
    "a reference that no checkpoint has": (
        {
            "--ref-update-interval": "3",
            "--use-kl-loss": None,
            "--save": "out",
            "--save-interval": "4",
        },
        "--ref-update-interval 3 does not divide --save-interval 4: a run that resumes could "
        "not load its reference. Set the second to a multiple of 3.",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_combination_that_cannot_work_is_refused(case, capsys, tmp_path):
    changes, expected = REFUSED[case]
    assert refused(capsys, tmp_path, changes) == [expected]


def test_a_missing_checkpoint_is_refused(capsys, tmp_path):
    assert refused(capsys, tmp_path, {"--hf-checkpoint": f"{tmp_path}/none"}) == [
        f"--hf-checkpoint {tmp_path}/none is not a folder. Give the folder of a downloaded Hugging "
        "Face checkpoint."
    ]


def test_a_checkpoint_without_a_config_is_refused(capsys, tmp_path):
    assert refused(capsys, tmp_path, {"--hf-checkpoint": str(tmp_path)}) == [
        f"--hf-checkpoint {tmp_path} holds no config.json. Give the folder of a complete "
        "checkpoint."
    ]


def test_a_missing_reference_is_refused(capsys, tmp_path):
    assert refused(capsys, tmp_path, {"--ref-load": f"{tmp_path}/none"}) == [
        f"--ref-load {tmp_path}/none is not a folder. Make it with "
        "tools/convert_hf_to_torch_dist.py, or leave --ref-load out to start from --hf-checkpoint."
    ]


def test_a_teacher_is_refused_for_sft(capsys, tmp_path):
    changes = {
        "--loss-type": "sft_loss",
        "--rollout-function-path": "vime.rollout.sft_rollout.generate_rollout",
        "--use-opd": None,
        "--opd-teacher-load": str(write_checkpoint(tmp_path / "teacher")),
    }
    assert refused(capsys, tmp_path, changes) == [
        "--use-opd has no effect with --loss-type sft_loss. Leave out one of the two."
    ]


def test_with_a_teacher_one_sample_per_prompt_is_enough(capsys, tmp_path):
    teacher = str(write_checkpoint(tmp_path / "teacher"))
    changes = {"--n-samples-per-prompt": "1", "--use-opd": None, "--opd-teacher-load": teacher}
    parse_config(words(tmp_path, changes))
    assert capsys.readouterr().err == ""


def test_a_folder_that_cannot_be_created_is_refused(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    path = f"{tmp_path}/file/a/{{rollout_id}}"
    assert refused(capsys, tmp_path, {"--save-hf": path, "--save": f"{tmp_path}/new/folder"}) == [
        f"--save-hf {path} cannot be made: {tmp_path}/file is not a folder that you may write to. "
        "Choose another folder."
    ]


def test_a_missing_load_folder_starts_a_fresh_run(tmp_path):
    argv = words(tmp_path, {"--load": f"{tmp_path}/none", "--save": f"{tmp_path}/none"})
    assert parse_config(argv).checkpoint.load == f"{tmp_path}/none"


def test_missing_prompts_are_refused(capsys, tmp_path):
    (problem,) = refused(capsys, tmp_path, {"--prompt-data": f"{tmp_path}/none.jsonl"})
    assert f"--prompt-data {tmp_path}/none.jsonl" in problem
    assert "does not exist" in problem


def test_evaluation_data_comes_in_pairs(capsys, tmp_path):
    path = write_prompts(tmp_path / "eval.jsonl")
    changes = {"--eval-prompt-data": f"a {path} b", "--eval-interval": "5"}
    found = refused(capsys, tmp_path, changes)
    assert (
        f"--eval-prompt-data a {path} b is not pairs of name and path. Give NAME PATH "
        "[NAME PATH ...], or one path." in found
    )


def test_an_sft_recipe_may_disable_advantages(tmp_path):
    flags = {
        "--loss-type": "sft_loss",
        "--rollout-function-path": "vime.rollout.sft_rollout.generate_rollout",
        "--disable-compute-advantages-and-returns": None,
    }
    assert not parse_config(words(tmp_path, flags)).algorithm.compute_advantages


def test_a_bare_evaluation_path_is_named_aime(tmp_path):
    path = str(write_prompts(tmp_path / "eval.jsonl"))
    argv = words(tmp_path, {"--eval-prompt-data": path, "--eval-interval": "5"})
    assert parse_config(argv).eval.datasets == {"aime": path}


def test_a_response_longer_than_the_models_positions_is_refused(capsys, tmp_path):
    small = write_checkpoint(tmp_path / "small", max_position_embeddings=512)
    assert refused(capsys, tmp_path, {"--hf-checkpoint": str(small)}) == [
        "--rollout-max-response-len 1024 leaves no room for a prompt in the model's 512 positions. "
        "Lower it."
    ]


NOTICED = {
    "rollout GPUs under colocate": (
        {"--colocate": None, "--rollout-num-gpus": "4"},
        "note: --rollout-num-gpus 4 is ignored with --colocate: the 8 GPUs that train also "
        "generate.",
    ),
    "sequence parallelism alone": (
        {"--sequence-parallel": None},
        "note: --sequence-parallel is off: it divides tokens among tensor-parallel ranks, and "
        "--tensor-model-parallel-size is 1.",
    ),
    "a micro-batch size beside packs": (
        {
            "--use-dynamic-batch-size": None,
            "--max-tokens-per-gpu": "512",
            "--micro-batch-size": "4",
        },
        "note: --micro-batch-size 4 is ignored with --use-dynamic-batch-size.",
    ),
    "a pack size without packs": (
        {"--max-tokens-per-gpu": "512"},
        "note: --max-tokens-per-gpu 512 has no effect without --use-dynamic-batch-size.",
    ),
    "a cut distribution": (
        {"--rollout-top-p": "0.9"},
        "note: --rollout-top-p 0.9 and --rollout-top-k -1 exclude tokens from sampling, and the "
        "trainer's probabilities do not: expect a larger train/train_rollout_logprob_abs_diff.",
    ),
    "two graders": (
        {"--custom-rm-path": "a.b"},
        "note: --rm-type math is ignored: --custom-rm-path a.b grades instead.",
    ),
    "answers that have no equal": (
        {"--n-samples-per-prompt": "1"},
        "note: --advantage-estimator grpo compares the answers to one prompt, and "
        "--n-samples-per-prompt is 1: every advantage will be 0. Give 8 samples, for example, or "
        "choose reinforce_plus_plus or ppo.",
    ),
    "graders in the data": (
        {"--rm-type": ""},
        "note: neither --rm-type nor --custom-rm-path is given: every prompt must name its "
        'grader in its metadata, as {"rm_type": ...}.',
    ),
}


@pytest.mark.parametrize("case", NOTICED)
def test_an_ignored_flag_gives_one_notice(case, capsys, tmp_path):
    changes, expected = NOTICED[case]
    parse_config(words(tmp_path, changes))
    assert capsys.readouterr().err.splitlines() == [expected]


def test_the_reference_is_the_hf_checkpoint_unless_told_otherwise(capsys, tmp_path):
    parse_config(words(tmp_path, {"--use-kl-loss": None}))
    assert capsys.readouterr().err == (
        f"note: --ref-load is not given: the reference model is --hf-checkpoint {tmp_path}/hf.\n"
    )


def test_a_plain_run_gives_no_notice(capsys, tmp_path):
    parse_config(words(tmp_path, {}))
    assert capsys.readouterr().err == ""


def test_sequence_parallelism_alone_is_turned_off(tmp_path):
    alone = parse_config(words(tmp_path, {"--sequence-parallel": None}))
    both = {"--sequence-parallel": None, "--tensor-model-parallel-size": "2"}
    assert alone.parallel.sequence_parallel is False
    assert parse_config(words(tmp_path, both)).parallel.sequence_parallel is True


def test_under_colocate_the_trainers_gpus_generate(tmp_path):
    cfg = parse_config(words(tmp_path, {"--colocate": None, "--rollout-num-gpus": "4"}))
    assert (cfg.cluster.rollout_gpus, cfg.cluster.total_gpus) == (8, 8)


def test_each_loop_takes_only_the_rollouts_that_it_can_train_on(tmp_path, capsys):
    stream = {"--rollout-function-path": FULLY_ASYNC}
    shared = parse_config(words(tmp_path, {"--colocate": None}))
    never_stops = parse_config(words(tmp_path, {"--colocate": None, **stream}))
    assert check_one_ahead(never_stops) == check_synchronous(shared) == []
    assert f"add --rollout-function-path {FULLY_ASYNC}" in check_one_ahead(shared)[0]
    assert "works with train_async.py" in check_synchronous(never_stops)[0]


@pytest.mark.parametrize("chosen", [{}, {"--use-tis": None}, {"--keep-old-actor": None}])
def test_where_weights_change_in_flight_the_old_policy_is_the_engines(chosen, tmp_path, capsys):
    stream = {"--rollout-function-path": FULLY_ASYNC}
    cfg = parse_config(words(tmp_path, {**stream, **chosen}))
    assert cfg.algorithm.use_rollout_logprobs == (not chosen)
    assert ("come from the engine" in capsys.readouterr().err) == (not chosen)
    assert not parse_config(words(tmp_path, chosen)).algorithm.use_rollout_logprobs
