"""What a training prints: a table that grows by a line with each log, and a bar below it."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm
from transformers import ProgressCallback, TrainerCallback
from transformers.trainer_utils import has_length

from leaf_distill.data.collator import ExampleDataset
from leaf_distill.terminal import LOOK
from leaf_distill.wording import counted, duration

logger = logging.getLogger(__name__)

_HEAD_EVERY = 20
_WIDTHS = (9, 9, 9, 7, 9, 8, 8, 8)
_OF_EVALUATION = (9, 9, 9, 7, 17, 8)
_MEASURES = ("loss", "kd_loss", "cd_loss")
_PLAIN = "the dataset has no counterfactuals: this is plain %s; `leaf detect` finds them"


class LogLines(TrainerCallback):
    """Prints a log as one line: step, losses, agreement, learning rate, speed, time.

    The logs of transformers, which reporters and files have, stay as they are.
    """

    def __init__(self) -> None:
        self._started, self._first, self._trains = time.monotonic(), 0, False
        self._lines, self._evaluated = 0, (-1, "", 0.0)

    def on_train_begin(
        self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **_: Any
    ) -> None:
        self._started, self._first, self._trains = time.monotonic(), state.global_step, True
        self._lines, self._evaluated = 0, (-1, "", 0.0)
        state.compute_steps(args, state.max_steps)  # a checkpoint has those of its own settings
        never_ends = state.max_steps <= args.get_warmup_steps(state.max_steps)
        if never_ends and state.is_world_process_zero:
            logger.warning(
                "the run has %d steps in all, and the warm-up never ends: %s",
                state.max_steps,
                "lower warmup_steps or raise max_steps"
                if args.max_steps > 0
                else "lower originals_per_step or warmup_steps, or raise num_train_epochs",
            )
        rows = getattr(train_dataloader, "dataset", None)
        plain = isinstance(rows, ExampleDataset) and not rows.counterfactuals
        if plain and state.is_world_process_zero:
            logger.warning(_PLAIN, "fine-tuning" if args.ce_weight == 1 else "distillation")

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self._first:  # other callbacks may have measured something before
            self._started = time.monotonic()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._trains = False

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs: Mapping[str, float] = kwargs["logs"]
        if not state.is_world_process_zero:
            return
        # The names in a log of an evaluation begin with the evaluation's own, as in eval_loss.
        counted_rows = next((name for name in logs if name.endswith("_cf_rows")), "")
        prefix = counted_rows.removesuffix("cf_rows")
        passed = time.monotonic() - self._started
        if prefix:
            self._print_evaluation(args, state, logs, prefix, duration(passed))
        elif "loss" in logs:
            done, left = state.global_step - self._first, state.max_steps - state.global_step
            rest = duration(passed / done * left) if done > 0 and left > 0 else ""
            rate, speed = logs.get("learning_rate"), logs.get("tokens_per_second")
            told = [
                "" if rate is None else _short(rate, ".1e"),
                "" if speed is None else f"{speed:,.0f}",
            ]
            self._print(args, state, [*_measured(logs, ""), *told, duration(passed), rest])
        elif "train_loss" in logs:
            steps = counted(state.global_step - self._first, "step")
            mean = f"mean loss {logs['train_loss']:.3g}"
            tqdm.write(f"trained {steps} in {duration(passed)}, {mean}")

    def _print_evaluation(
        self, args: Any, state: Any, logs: Mapping[str, float], prefix: str, passed: str
    ) -> None:
        best = state.best_global_step if args.load_best_model_at_end else None
        of_best = not self._trains and best is not None
        evaluated = state.global_step, prefix, logs[f"{prefix}loss"]
        if not of_best and self._evaluated == evaluated:
            return  # logged again, so that it is the last one of the run
        self._evaluated = evaluated
        if of_best:
            tqdm.write(f"the best weights are those of step {best}:")
        name, right = prefix.rstrip("_"), logs.get(f"{prefix}accuracy")
        said = name if right is None else f"{name}: {right:.1%} right"
        self._print(args, state, [*_measured(logs, prefix), said, passed], _OF_EVALUATION)

    def _print(
        self, args: Any, state: Any, cells: list[str], widths: Sequence[int] = _WIDTHS
    ) -> None:
        """Print a line, and the head of the table above it now and then."""
        first = len(f"{state.max_steps}/{state.max_steps}")
        if self._lines % _HEAD_EVERY == 0:
            kl = {"kl": "kl", "reverse_kl": "rkl"}.get(str(args.divergence), "jsd")
            heads = ["loss", kl, f"cut {kl}", "agree", "lr", "tok/s", "time", "left"]
            tqdm.write(_line("step", first, heads, _WIDTHS))
        self._lines += 1
        tqdm.write(_line(f"{state.global_step}/{state.max_steps}", first, cells, widths))


def _measured(logs: Mapping[str, float], prefix: str) -> list[str]:
    """Return the cells of the losses, and the share of tokens on which the models agree."""
    losses = [logs.get(prefix + name) for name in _MEASURES]
    agreement = logs.get(f"{prefix}agreement")
    cells = ["" if loss is None else _short(loss) for loss in losses]
    return [*cells, "" if agreement is None else f"{agreement:.0%}"]


def _short(number: float, form: str = "#.3g") -> str:
    """Return a number with a few digits: 0.360, 4.8e-6."""
    mantissa, exponent, power = f"{number:{form}}".partition("e")
    return f"{mantissa}e{int(power)}" if exponent else mantissa.removesuffix(".")


def _line(step: str, first: int, cells: Sequence[str], widths: Sequence[int]) -> str:
    rest = (f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
    return f"{step:>{first}}{''.join(rest)}".rstrip()


class ProgressBar(ProgressCallback):
    """Shows the bars of transformers while they move, and prints no logs."""

    # A bar is drawn as soon as it is made, so those of transformers would be seen as well.

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self.training_bar = tqdm(total=state.max_steps, desc="training", unit="steps", **LOOK)
        self.current_step = 0

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **_: Any
    ) -> None:
        shown = state.is_world_process_zero and has_length(eval_dataloader)
        if shown and self.prediction_bar is None:
            total = len(eval_dataloader)
            self.prediction_bar = tqdm(total=total, desc="evaluation", unit="batches", **LOOK)
        super().on_prediction_step(args, state, control, eval_dataloader)  # type: ignore[no-untyped-call]

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        pass


@contextmanager
def plain_on_purpose() -> Iterator[None]:
    """Let trainings say nothing about a dataset without counterfactuals."""

    def others(record: logging.LogRecord) -> bool:
        return record.msg != _PLAIN

    logger.addFilter(others)
    try:
        yield
    finally:
        logger.removeFilter(others)
