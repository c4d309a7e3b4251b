"""The data source: first the unfinished groups of the buffer, then prompts from the data set."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vime.config import Config
from vime.data.datasets import DataKeys, PromptDataset, Row
from vime.errors import CheckpointError, ConfigError, PluginError
from vime.files import written_whole
from vime.rollout.plain import plain
from vime.rollout.prompts import Rendered, render_rows, to_sample
from vime.types import Group, Sample, Status

logger = logging.getLogger(__name__)

STATE_VERSION = 1


class RolloutDataSourceWithBuffer:
    """Groups of --n-samples-per-prompt samples. Only the seed determines their order.

    A source that is restored from `state_dict` continues with the same groups, buffer included.
    Under --loss-type sft_loss prompts stay messages, and the source does not tokenise them.
    """

    def __init__(self, args: Any) -> None:
        self.args = args
        self.cfg: Config = args.config
        data = self.cfg.data
        self.dataset: PromptDataset | None = None
        if data.global_dataset and not data.prompt_data:
            raise ConfigError(
                "--prompt-data is not set, and the data source needs it for its prompts."
            )
        self.keys = DataKeys(
            input=data.input_key,
            label=data.label_key,
            metadata=data.metadata_key,
            tools=data.tool_key,
        )
        if data.global_dataset:
            self.dataset = PromptDataset(data.prompt_data, self.keys)
        self.buffer: list[Group] = []
        self.rollout_id = 0  # the rollout being generated, for the buffer filter
        self.epoch = 0
        self.offset = 0  # number of prompts drawn in this epoch
        self.group_index = 0
        self.sample_index = 0
        self.num_long_prompts = 0  # dropped by --rollout-max-prompt-len since the run began
        self.num_refused_rows = 0  # dropped because the chat template refuses them
        self.num_stale_groups = 0  # started over by --rollout-max-staleness
        self._order: np.ndarray | None = None
        self._filter = self.cfg.rollout.plugin("buffer_filter_path")

    def __len__(self) -> int:
        """The number of prompts in an epoch; 0 without a data set."""
        return 0 if self.dataset is None else len(self.dataset)

    def get_samples(self, num_samples: int) -> list[Group]:
        """`num_samples` groups: first those that the buffer filter gives, then new prompts."""
        groups = self._from_buffer(num_samples)
        missing = num_samples - len(groups)
        return groups + (self._from_dataset(missing) if missing > 0 else [])

    def add_samples(self, groups: list[Group]) -> None:
        """Appends unfinished or surplus groups to the buffer."""
        for group in groups:
            if not group or not all(isinstance(sample, Sample) for sample in group):
                raise PluginError("add_samples takes groups: non-empty lists of Sample.")
        self.buffer.extend(groups)

    def _from_buffer(self, num_samples: int) -> list[Group]:
        if not self.buffer:
            return []
        groups = self._filter(self.args, self.rollout_id, self.buffer, num_samples)
        cap = self.cfg.rollout.max_staleness
        if cap is not None:
            for group in groups:
                if _started(group, self.rollout_id) < self.rollout_id - cap:
                    self.num_stale_groups += 1
                    for sample in group:
                        start_over(sample)
        return groups

    def _from_dataset(self, count: int) -> list[Group]:
        groups: list[Group] = []
        if (
            self.dataset is None
        ):  # with --disable-rollout-global-dataset the generation function makes prompts
            row = Row("", None, {}, None, "no dataset")
            return [self._to_group(row, "", []) for _ in range(count)]
        num_skipped = 0  # prompts dropped since the last prompt that was taken
        while len(groups) < count:
            rows = [self._next_row() for _ in range(count - len(groups))]
            rendered = self._render(rows)
            fitting = [part for part in rendered if not self._is_too_long(part[2])]
            self.num_refused_rows += len(rows) - len(rendered)
            self.num_long_prompts += len(rendered) - len(fitting)
            groups += [self._to_group(*part) for part in fitting]
            num_skipped = 0 if fitting else num_skipped + len(rows)
            if num_skipped >= 2 * len(self.dataset):  # at least one whole epoch
                raise ConfigError(self._nothing_fits())
        return groups

    def _nothing_fits(self) -> str:
        if self.num_long_prompts:
            return (
                f"--rollout-max-prompt-len {self.cfg.rollout.max_prompt_len} drops every prompt of "
                f"{self.dataset.path}. Raise it."
            )
        return (
            f"the chat template refuses every prompt of {self.dataset.path}; the warnings above "
            "name rows and reasons. Correct the file, or use a template that takes its messages."
        )

    def _next_row(self) -> Row:
        if self.offset >= len(self.dataset):
            self.epoch += 1
            self.offset = 0
            self._order = None
        at = self.offset
        self.offset += 1
        if not self.cfg.data.shuffle:
            return self.dataset[at]
        if self._order is None:
            rng = np.random.default_rng(self.cfg.data.seed + self.epoch)
            self._order = rng.permutation(np.arange(len(self.dataset), dtype=np.int32))
        return self.dataset[int(self._order[at])]

    def _render(self, rows: list[Row]) -> list[Rendered]:
        if not self.cfg.algorithm.needs_reward:
            return [(row, row.prompt, []) for row in rows]
        return render_rows(self.cfg, rows)

    @property
    def skipped(self) -> dict[str, int]:
        """Metrics: the number of prompts left out since the run began, by reason."""
        return {
            "rollout/data/long_prompts": self.num_long_prompts,
            "rollout/data/refused_rows": self.num_refused_rows,
        }

    def _is_too_long(self, ids: list[int]) -> bool:
        cap = self.cfg.rollout.max_prompt_len
        return cap is not None and len(ids) > cap

    def _to_group(self, row: Row, prompt: Any, ids: list[int]) -> Group:
        count = self.cfg.batch.samples_per_prompt
        group = [
            to_sample(row, prompt, ids, group_index=self.group_index, index=self.sample_index + i)
            for i in range(count)
        ]
        self.group_index += 1
        self.sample_index += count
        return group

    def state_dict(self) -> dict[str, Any]:
        """An independent copy of position, counters and buffer."""
        return {
            "version": STATE_VERSION,
            "sample_offset": self.offset,
            "epoch_id": self.epoch,
            "sample_group_index": self.group_index,
            "sample_index": self.sample_index,
            "num_long_prompts": self.num_long_prompts,
            "num_refused_rows": self.num_refused_rows,
            "num_stale_groups": self.num_stale_groups,
            "buffer": [[sample.to_dict() for sample in group] for group in self.buffer],
            "made_from": self._made_from(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a `state_dict`. Warns when it was saved with other data."""
        if state.get("version") != STATE_VERSION:
            raise CheckpointError(
                f"the data state has version {state.get('version')}; this vime reads version "
                f"{STATE_VERSION}."
            )
        for name, now in self._made_from().items():
            if (then := state["made_from"][name]) != now:
                logger.warning(
                    "the data state was saved with %s %s, and now it is %s: prompts may repeat or "
                    "be left out in this epoch",
                    name,
                    then,
                    now,
                )
        self.offset = state["sample_offset"]
        self.epoch = state["epoch_id"]
        self.group_index = state["sample_group_index"]
        self.sample_index = state["sample_index"]
        self.num_long_prompts = state["num_long_prompts"]
        self.num_refused_rows = state.get("num_refused_rows", 0)  # added after version 1
        self.num_stale_groups = state["num_stale_groups"]
        groups = copy.deepcopy(state["buffer"])
        self.buffer = [[Sample.from_dict(sample) for sample in group] for group in groups]
        self._order = None

    def _made_from(self) -> dict[str, Any]:
        data = self.cfg.data
        return {
            "--prompt-data": str(data.prompt_data),
            "number of prompts": len(self),
            "--rollout-shuffle": data.shuffle,
            "--rollout-seed": data.seed,
        }

    def save(self, rollout_id: int, state: dict[str, Any] | None = None) -> None:
        """Writes `state`, by default the present one, as the state after `rollout_id`.

        Raises PluginError when a sample in the buffer holds a value that no file can give back.
        """
        root = self.cfg.checkpoint.save
        if root is None:
            raise ConfigError("--save is not set, so the data source has nowhere to save to.")
        state = plain(self.state_dict() if state is None else state, "--save: data state")
        with written_whole(state_path(root, rollout_id)) as partial:
            torch.save(state, partial)

    def load(self, rollout_id: int) -> None:
        """Continues after `rollout_id`; -1 starts from the beginning. Raises CheckpointError."""
        if rollout_id < 0:
            return
        root = self.cfg.checkpoint.load or self.cfg.checkpoint.save
        if root is None:
            raise CheckpointError("--load is not set, so there is no data state to continue from.")
        path = state_path(root, rollout_id)
        if not path.is_file():
            raise CheckpointError(
                f"{path} is missing, so the prompts of rollout {rollout_id + 1} are unknown. "
                "Restore it, or start over with --start-rollout-id 0."
            )
        try:
            state = torch.load(path, weights_only=True)
        except Exception as error:
            raise CheckpointError(f"{path} is damaged: {error}") from error
        self.load_state_dict(state)


def state_path(root: str, rollout_id: int) -> Path:
    return Path(root) / "rollout" / f"global_dataset_state_dict_{rollout_id}.pt"


def start_over(sample: Sample) -> None:
    """Makes a sample pending again: it keeps the prompt and loses the response."""
    sample.tokens = sample.tokens[: sample.prompt_length]
    sample.response, sample.response_length = "", 0
    sample.loss_mask = sample.rollout_log_probs = sample.teacher_log_probs = None
    sample.reward = sample.failure = None
    sample.weight_versions = []
    sample.status = Status.PENDING
    sample.metadata.pop("start_rollout_id", None)


def _started(group: Group, now: int) -> int:
    return min(sample.metadata.get("start_rollout_id", now) for sample in group)
