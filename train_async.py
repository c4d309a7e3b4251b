"""Asynchronous RL: the next rollout is generated while this one is trained on.

So a batch comes from weights that are one update older than the weights that train on it. Every
sample records the version of the weights that made each of its tokens.
"""

from vime.cli import parse_config
from vime.config import Config
from vime.ray.launch import launch, run_or_exit
from vime.ray.preflight import CHECKS, check_decoupled


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
            upcoming = run.finish(upcoming)  # weights must not change during a rollout
            if run.due(cfg.checkpoint.save_interval, step):
                run.save(step)  # saves the upcoming rollout too: a resumed run trains on it
            if run.due(cfg.engine.update_weights_interval, step):
                run.sync_weights()
            if run.due(cfg.eval.interval, step):
                run.evaluate(step)


if __name__ == "__main__":
    run_or_exit(train_async, parse_config(checks=(*CHECKS, check_decoupled)))
