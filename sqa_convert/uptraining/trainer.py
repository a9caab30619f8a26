"""`transformers.Trainer` with the losses of uptraining, held-out measurements, and stops that lose nothing."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback
from transformers.trainer_utils import rotate_checkpoints

from ..calibration.distillation_loss import Targets, forward_with_loss, hidden_states, inputs_and_labels
from ..errors import QualityError
from ..evaluation.held_out_batches import HeldOut
from ..evaluation.measure import measure, predict
from ..report.formatting import nats
from . import fsdp_and_deepspeed, processes

COMPLETE = "complete"
"""a file of each checkpoint, written last, with the seconds spent so far: one without it is not resumed from"""

_FAR = 2.3
"""nats above the start, a tenth of the probability for each token: such a loss will not come down in time"""

_EARLY = 0.5  # of the steps

_CHECK_EVERY = 10  # steps, whether the loss is a number; each check makes a GPU wait

StepProgress = Callable[[int, int, str], None]
"""(steps done, steps there are, news at an evaluation or "")"""


class DivergedError(QualityError):
    """A training went astray. Nobody should go on from its checkpoints."""


class UptrainingTrainer(Trainer):
    """Trains towards a frozen teacher, the text, or both; `evaluate` measures on held-out text.

    Args:
        teacher: the source; None trains on the text alone.
        ce: weight of the cross-entropy, 0 … 1; the rest is that of KL(teacher || model).
        held_out: what `evaluate` measures on; None never measures.
        expected: the source's predictions of that text; without them there is no KL.
        tokens_per_step: of one optimizer step.
        flops: of the model's own work for one token, forward and backward; None leaves MFU out.
        peak: FLOP/s that all devices together can do; None likewise.
        progress: called after each step.
        until: the step to end after, of a schedule made for `args.max_steps`; by default the last.
        stop_early: raise DivergedError when a measurement early in the run is far worse than the start.
        seconds_before: that earlier processes spent on the same run.
    """

    def __init__(
        self,
        *args: Any,
        teacher: Any = None,
        ce: float,
        held_out: HeldOut | None = None,
        expected: Any = None,
        tokens_per_step: int,
        flops: float | None = None,
        peak: float | None = None,
        progress: StepProgress = lambda done, total, news: None,
        until: int | None = None,
        stop_early: bool = False,
        seconds_before: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.remove_callback(PrinterCallback)
        self.teacher: Any = None if teacher is None else teacher.to(self.args.device).eval().requires_grad_(False)
        self.ce, self.held_out, self.expected = ce, held_out, expected
        self.tokens_per_step, self.flops, self.peak, self.progress = tokens_per_step, flops, peak, progress
        self.until, self.stop_early = until or self.args.max_steps, stop_early
        # The Trainer then counts the predictions of all micro-batches of all processes, by which our sum is divided.
        self.model_accepts_loss_kwargs = True
        self.watch = _Watch(self, seconds_before)
        self.add_callback(self.watch)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a micro-batch, scaled so that those of a step add up to the mean over all its predictions."""
        unwrapped = self.accelerator.unwrap_model(model)
        inputs, labels = inputs_and_labels(unwrapped, inputs)
        targets = Targets(labels)
        if self.ce < 1:
            with torch.no_grad(), self.accelerator.autocast():
                hidden = hidden_states(self.teacher, inputs)
            targets = Targets(labels, hidden, self.teacher.get_output_embeddings().weight)
        output = forward_with_loss(model, unwrapped, inputs, targets, self.ce)
        count = (labels >= 0).sum() if num_items_in_batch is None else num_items_in_batch
        loss = output.loss / count
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # gradients are averaged over processes
        return (loss, output) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        self.last_loss = super().training_step(*args, **kwargs)
        return self.last_loss

    def check_finite(self) -> None:
        """Raises QualityError when loss or weights are not finite; nothing that is not finite is ever saved."""
        # Of a weight that is shared out by ZeRO-3 this process has a part, elsewhere than where the weight was.
        weights = [getattr(p, "ds_tensor", p).detach() for p in self.model.parameters() if p.requires_grad]
        levels = torch.stack([self.last_loss, *(norm.to(self.last_loss) for norm in torch._foreach_norm(weights))])
        if processes.any_says(not torch.isfinite(levels).all()):
            raise self._diverged("loss or weights are not finite")

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """What is measured on the held-out text, in the arithmetic of the training; each process measures all."""
        start = time.perf_counter()
        try:
            metrics = self.measured()
        except QualityError as error:
            if not self.state.global_step:
                raise  # before any training
            raise self._diverged("what is measured on held-out text is not finite") from error
        metrics = processes.from_first(metrics)  # the last digits may differ, and all must decide alike
        named = {f"{metric_key_prefix}_{key}": value for key, value in metrics.items()}
        self.log(named)
        self._check_course()
        self.watch.aside += time.perf_counter() - start
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, named)
        return named

    def measured(self) -> dict[str, float]:
        """Loss on the held-out text; KL and agreement where the source's predictions are known. Raises QualityError."""
        assert self.held_out is not None
        predictions = predict(self.model, self.held_out)
        with processes.together():
            quality = measure(predictions, self.expected)
        metrics: dict[str, float] = {"loss": quality.loss}
        if quality.kl is not None and quality.top1 is not None:
            metrics |= {"kl": quality.kl, "top1": quality.top1}
        return metrics

    def told(self, metrics: Mapping[str, float]) -> list[str]:
        """What was measured, in words."""
        parts = [f"loss {nats(metrics['loss'])}"]
        return [*parts, f"KL {nats(metrics['kl'])}"] if "kl" in metrics else parts

    def astray(self, start: Mapping[str, float], later: list[dict[str, float]]) -> str:
        """How a run is far worse than its start, where it is and was never better; else ""."""
        last, best = later[-1]["loss"], min(point["loss"] for point in later)
        if last <= start["loss"] + _FAR or best <= start["loss"]:
            return ""
        return f"held-out loss {nats(start['loss'])} at the start, {nats(last)}"

    def _check_course(self) -> None:
        """Raises DivergedError when a run goes astray early."""
        start, *later = self.curve
        early = 0 < self.state.global_step <= _EARLY * self.args.max_steps
        if self.stop_early and early and later and not start["tokens"] and (what := self.astray(start, later)):
            raise self._diverged(what)

    def _diverged(self, what: str) -> DivergedError:
        rate = self.args.learning_rate
        return DivergedError(
            f"the learning rate is too high: {what} at step {self.state.global_step}; lower learning_rate, which is "
            f"{rate:g}: --restart --learning-rate {rate / 10:.2g}"
        )

    @property
    def curve(self) -> list[dict[str, float]]:
        """Every measurement of the run, those before it was resumed too: tokens, and what was `measured`."""
        evaluated = (entry for entry in self.state.log_history if any(key.startswith("eval_") for key in entry))
        measured = {entry["step"]: entry for entry in evaluated}
        return [
            {"tokens": step * self.tokens_per_step}
            | {key.removeprefix("eval_"): round(entry[key], 6) for key in entry if key.startswith("eval_")}
            for step, entry in measured.items()
        ]

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        start = time.perf_counter()
        # The Trainer's own limit goes by dates, and clocks are set back: `_Watch.on_save` rotates by steps.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit
        self.watch.aside += time.perf_counter() - start


class _Watch(TrainerCallback):
    """Tells of progress; stops on a loss that is no number, and on Ctrl-C after the step, with a checkpoint."""

    def __init__(self, trainer: UptrainingTrainer, seconds_before: float) -> None:
        self.trainer, self.seconds_before = trainer, seconds_before
        self.interrupted = False
        self.start, self.first_step = time.perf_counter(), 0
        self.aside = 0.0
        """seconds spent on measuring and saving"""
        self.handler: Any = None
        """of Ctrl-C before the training, None where it was left alone"""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start, self.first_step, self.aside = time.perf_counter(), state.global_step, 0.0

        def interrupt(number: int, frame: Any) -> None:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True

        self.handler = None
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # under nohup, in the background of a script
            return
        with contextlib.suppress(ValueError):  # not in the main thread, where no signal arrives
            self.handler = signal.signal(signal.SIGINT, interrupt)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.restore()

    def restore(self) -> None:
        if self.handler is not None:
            signal.signal(signal.SIGINT, self.handler)
            self.handler = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.interrupted = processes.any_says(self.interrupted)  # several must stop after the same step
        if self.interrupted:
            control.should_save = control.should_training_stop = True
        if state.global_step >= self.trainer.until:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = self.trainer.held_out is not None
        if state.global_step % _CHECK_EVERY == 0 or control.should_save or control.should_evaluate:
            self.trainer.check_finite()
        self.trainer.progress(state.global_step, state.max_steps, "")

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        trainer = self.trainer
        parts = trainer.told({key.removeprefix("eval_"): value for key, value in metrics.items()})
        speed = self.tokens_per_second(state.global_step)
        if speed:
            parts.append(f"{speed:,.0f} tokens/s")
            if trainer.flops and trainer.peak:
                parts.append(f"MFU {speed * trainer.flops / trainer.peak:.1%}")
        trainer.progress(state.global_step, state.max_steps, " · ".join(parts))

    def tokens_per_second(self, step: int) -> float:
        """Speed of training since this process began; 0 before the first step."""
        tokens = (step - self.first_step) * self.trainer.tokens_per_step
        return tokens / (time.perf_counter() - self.start - self.aside) if tokens else 0.0

    def seconds(self) -> float:
        """Seconds spent on this run, those of earlier processes too."""
        return self.seconds_before + time.perf_counter() - self.start

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.accelerator.wait_for_everyone()
        if processes.is_writer():
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            fsdp_and_deepspeed.mark(self.trainer, folder)
            (folder / f".{COMPLETE}").write_text(f"{self.seconds():.2f}")
            (folder / f".{COMPLETE}").rename(folder / COMPLETE)
            rotate_checkpoints(args.output_dir, args.save_total_limit, state.best_model_checkpoint)
