"""Asynchronous RL: generation and training run at the same time.

Every sample records the version of the weights that made each of its tokens.
"""

from vime.cli import parse_config
from vime.config import Config
from vime.ray.launch import launch, run_or_exit
from vime.ray.preflight import CHECKS, check_one_ahead


def train_one_ahead(cfg: Config) -> None:
    """The next rollout is generated while this one is trained on.

    So a batch comes from weights that are one update older than the weights that train on it.
    """
    with launch(cfg) as run:
        run.sync_weights()
        if cfg.eval.due_before_train(run.start_step):
            run.evaluate(run.start_step)
        upcoming = run.start_generating(run.start_step)
        for step in run.steps():
            batch = run.finish(upcoming)
            if step + 1 < run.num_rollouts:
                upcoming = run.start_generating(step + 1)
            run.train(batch)
            upcoming = run.finish(upcoming)  # weights must not change during a rollout
            if run.due(cfg.checkpoint.save_interval, step):
                run.save(step)  # saves the upcoming rollout too: a resumed run trains on it
            if run.due(cfg.engine.update_weights_interval, step):
                run.sync_weights()
            if run.due(cfg.eval.interval, step):
                run.evaluate(step)


def train_fully_async(cfg: Config) -> None:
    """Generation never stops. A step trains on groups as soon as enough of them are finished.

    Weights change while requests run. --max-staleness bounds the age of every token.
    """
    with launch(cfg) as run:
        run.sync_weights()
        if cfg.eval.due_before_train(run.start_step):
            run.start_evaluating(run.start_step)
        for step in run.steps():
            batch = run.generate(step)  # waits for groups; others go on
            with run.gpus_for_training():
                run.train(batch)
                run.finish_evaluation()  # it measures the weights from before this step
                if run.due(cfg.checkpoint.save_interval, step):
                    run.save(step)  # saves unfinished groups too: a resumed run continues them
            if run.due(cfg.engine.update_weights_interval, step):
                run.sync_weights()
            if run.due(cfg.eval.interval, step):
                run.start_evaluating(step)


def train_async(cfg: Config) -> None:
    (train_fully_async if cfg.rollout.fully_async else train_one_ahead)(cfg)


if __name__ == "__main__":
    run_or_exit(train_async, parse_config(checks=(*CHECKS, check_one_ahead)))
