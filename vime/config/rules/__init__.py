"""Rules across sections. Each rule yields problems, with flag, value and remedy.

A section checks its own values (`Section.problems`). Rules check that files and folders exist. The
only file that they read is the small config.json.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from vime.config import Config
from vime.config.evaluation import evaluations_fit
from vime.config.own_values import own_values_are_their_own
from vime.config.rules import course, files, layout, schedules

Rule = Callable[[Config], Iterable[str]]

RULES: tuple[Rule, ...] = (
    own_values_are_their_own,
    files.checkpoint_is_there,
    files.reference_is_there,
    files.teacher_is_there,
    files.working_dir_is_there,
    files.folders_can_be_made,
    course.run_has_a_length,
    course.run_has_prompts,
    layout.layout_fits_the_gpus,
    layout.engine_fits_the_model,
    layout.engines_fit_the_nodes,
    layout.every_rank_gets_a_sample,
    course.over_sampling_covers_the_batch,
    layout.responses_fit_the_engine,
    course.overlong_buffer_fits,
    course.reference_is_in_every_checkpoint,
    course.weights_are_due_in_time,
    schedules.the_critic_has_a_part,
    schedules.schedules_fit_the_run,
    course.loss_and_rollout_agree,
    course.debug_runs_have_their_parts,
    evaluations_fit,
)

# For the tools that convert checkpoints.
CONVERT_RULES: tuple[Rule, ...] = (files.checkpoint_is_there, files.converter_has_a_target)
