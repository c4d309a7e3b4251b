"""Synchronous RL: generate, train, put the new weights into the engines, repeat."""

from vime.cli import parse_config
from vime.config import Config
from vime.ray.launch import launch, run_or_exit
from vime.ray.preflight import CHECKS, check_synchronous


def train(cfg: Config) -> None:
    with launch(cfg) as run:
        run.sync_weights()
        if cfg.eval.due_before_train(run.start_step):
            run.evaluate(run.start_step)
        for step in run.steps():
            batch = run.generate(step)
            with run.gpus_for_training():
                run.train(batch)
                if run.due(cfg.checkpoint.save_interval, step):
                    run.save(step)
            if run.due(cfg.engine.update_weights_interval, step):
                run.sync_weights()
            if run.due(cfg.eval.interval, step):
                run.evaluate(step)


if __name__ == "__main__":
    run_or_exit(train, parse_config(checks=(*CHECKS, check_synchronous)))
