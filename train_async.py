"""Asynchronous RL: the next rollout is generated while this one is trained on.

A batch is therefore one update older than the weights that train on it; every sample records the
versions that made its tokens.
"""

from vime.cli import parse_config
from vime.config import Config
from vime.ray.preflight import CHECKS, check_decoupled
from vime.ray.run import launch, run_or_exit


def train_async(cfg: Config) -> None:
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
            upcoming = run.finish(upcoming)  # its weights must not change under way
            if run.due(cfg.checkpoint.save_interval, step):
                run.save(step)  # with the upcoming rollout: a run that resumes trains on it
            if run.due(cfg.engine.update_weights_interval, step):
                run.sync_weights()
            if run.due(cfg.eval.interval, step):
                run.evaluate(step)


if __name__ == "__main__":
    run_or_exit(train_async, parse_config(checks=(*CHECKS, check_decoupled)))
