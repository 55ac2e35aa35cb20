"""Hugging Face's `Trainer` with a teacher and any loss of kdkernels, from hidden states where that is possible."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

try:
    from transformers import Trainer
except ImportError as error:
    raise ImportError("kdkernels.integrations.transformers needs transformers and accelerate: "
                      "pip install 'transformers>=5' accelerate") from error  # fmt: skip

from ..base import BaseLoss
from ..linear import LinearLoss
from ..logpartition import ForwardKLLoss

IGNORED = -100
# What models do with the head's output, as their configurations name it.
FACTORS = ("logit_scale", "output_multiplier", "lm_head_multiplier")


class Head(NamedTuple):
    """A model's logits are c tanh(scale (hidden weight' + bias) / c), c the soft-cap; without tanh if there is none."""

    module: nn.Linear
    scale: float
    softcap: float | None

    def logits(self, hidden: Tensor) -> Tensor:
        x = self.module(hidden) * self.scale
        return x if self.softcap is None else self.softcap * torch.tanh(x / self.softcap)


def head_of(model: Any) -> Head:
    """Raises ValueError where the output embedding is not a plain `nn.Linear`, as under LoRA."""
    module = model.get_output_embeddings()
    if type(module) is not nn.Linear or not module.weight.is_floating_point():
        raise ValueError(f"its output embedding is {type(module).__name__}, not a plain nn.Linear")
    config = model.config.get_text_config()
    scale = next((x for name in FACTORS if (x := getattr(config, name, None)) is not None), None)
    if scale is None and (x := getattr(config, "logits_scaling", None)):
        scale = x if config.model_type == "hyperclovax" else 1 / x
    return Head(module, 1.0 if scale is None else float(scale), getattr(config, "final_logit_softcapping", None))


class DistillationTrainer(Trainer):
    """`transformers.Trainer` that distils `teacher_model` into the model.

        trainer = DistillationTrainer(model, args, teacher_model=teacher, train_dataset=dataset, ...)
        trainer.train()

    The loss compares the next-token distributions of both models where `labels` (or `shift_labels`, which are aligned
    already) are not -100; without labels, where `attention_mask` is not 0. Its mean is over all tokens of the
    accumulated batches and devices, `num_items_in_batch`, as Trainer's own losses. Packed sequences need what they need
    without a teacher: labels of -100 where a sequence begins, and position_ids. Adapters of PEFT train as usual; a
    frozen head costs no gradient.

    Where it can, the loss is computed from the last hidden states and the heads (`LinearLoss`): no (tokens, vocabulary)
    tensor ever exists. It cannot for a loss of whole batches, a head that is no plain `nn.Linear` (quantised, adapted
    by LoRA), under torch.compile, and in an evaluation with `compute_metrics`: then both models' logits are made. What
    a model does to its head's output (a factor, a soft-cap) is read from its configuration and compared, once, with
    what the model returns.

    Args:
        model, args, ...: as of `transformers.Trainer`.
        teacher_model: a causal language model of transformers; set to eval mode, frozen, without a cache, and moved to
            the device of the training (unless it was placed with a device_map).
        loss: any loss of kdkernels; `ForwardKLLoss()` if none. Its reduction has to be "mean", its ignore_index -100.
        fused_linear: "auto", True (a ValueError where it is impossible) or False.
        memory_budget: of `LinearLoss`, bytes.
        vocab_size: of both heads, where they are padded to different widths.

    Raises:
        TypeError, ValueError: an argument does not fit, as `__init__` is called or at the first step.
    """

    def __init__(self, model=None, args=None, *, teacher_model: Any, loss: BaseLoss | None = None,
                 fused_linear: bool | str = "auto", memory_budget: int | None = None, vocab_size: int | None = None,
                 **kwargs):  # fmt: skip
        loss = ForwardKLLoss() if loss is None else loss
        if not isinstance(loss, BaseLoss):
            raise TypeError(f"loss must be a loss of kdkernels, got {type(loss).__name__}")
        if loss.reduction != "mean" or loss.ignore_index != IGNORED:
            raise ValueError(f"loss must have reduction='mean' and ignore_index=-100, got {loss.reduction!r} and "
                             f"{loss.ignore_index}")  # fmt: skip
        if not isinstance(teacher_model, nn.Module):
            raise TypeError(f"teacher_model must be a model, got {type(teacher_model).__name__}")
        if fused_linear not in (True, False, "auto"):
            raise ValueError(f"fused_linear must be True, False or 'auto', got {fused_linear!r}")
        super().__init__(model, args, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError("DistillationTrainer does not run under nn.DataParallel: start it with torchrun")
        self._loss_shifts_labels = True  # so that num_items_in_batch counts the tokens that are predicted
        self.loss, self.vocab_size = loss, vocab_size
        teacher: Any = teacher_model
        self.teacher_model = teacher.eval().requires_grad_(False)
        teacher.config.use_cache = False  # as Trainer does: with a cache packed sequences see one another
        if getattr(teacher_model, "hf_device_map", None) is None and self.place_model_on_device:
            teacher_model.to(self.args.device)
        self._linear = self._fused(fused_linear, memory_budget)

    def _fused(self, wanted: bool | str, budget: int | None) -> LinearLoss | None:
        """The loss of hidden states, or None where there is none."""
        if wanted is False:
            return None
        try:
            if not self.loss.rowwise:
                raise ValueError(f"{type(self.loss).__name__} looks at the whole batch")
            if self.args.torch_compile:
                raise ValueError("torch_compile is set")
            models = {"student": self.accelerator.unwrap_model(self.model), "teacher": self.teacher_model}
            own, other = (_checked(side, model, head_of(model)) for side, model in models.items())
        except ValueError as error:
            if wanted is True:
                raise ValueError(f"fused_linear=True is impossible here: {error}") from None
            return None
        return LinearLoss(self.loss, memory_budget=budget, student_logit_scale=own.scale, student_softcap=own.softcap,
                          teacher_logit_scale=other.scale, teacher_softcap=other.softcap)  # fmt: skip

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        labels, own = inputs.pop("shift_labels", None), inputs.pop("labels", None)
        if labels is None:
            own = _targets(inputs) if own is None else own
            labels = nn.functional.pad(own[..., 1:], (0, 1), value=IGNORED)
        whole = self._linear is None or (return_outputs and self.compute_metrics is not None)
        made = self._of_logits if whole else self._of_hidden_states
        with self.accelerator.autocast():
            loss, outputs = self._within(model, made, inputs, labels, num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        return (loss, {"loss": loss, **outputs}) if return_outputs else loss

    def _within(self, model, function, *given):
        """The function, called with the bare model within a forward of what wraps it: DDP and FSDP then see it."""
        bare = self.accelerator.unwrap_model(model)
        sharded = issubclass(type(bare), FSDPModule)
        if bare is model and not sharded:
            return function(bare, bare, *given)

        def forward():
            with _replaced(bare, own):  # the hooks of a sharded one would let its head go before the loss has seen it
                return function(bare, own if sharded else bare, *given)

        own = bare.forward
        with _replaced(bare, forward):
            return model()

    def _of_logits(self, model, call, inputs, labels, num_items):
        logits = call(**inputs).logits
        with torch.no_grad():
            teacher = self.teacher_model(**inputs).logits.to(logits.device)
        loss = self.loss(logits, teacher, labels, num_items=num_items, vocab_size=self.vocab_size)
        return loss, {"logits": logits}

    def _of_hidden_states(self, model, call, inputs, labels, num_items):
        assert self._linear is not None
        own, other = model.get_output_embeddings(), self.teacher_model.get_output_embeddings()
        _, hidden = _observed(call, own, _no_logits, inputs)
        with torch.no_grad():
            teacher = _observed(self.teacher_model, other, _no_logits, inputs)[1].to(hidden.device)
        loss = self._linear(hidden, own.weight, teacher, _full(other.weight, hidden), labels, student_bias=own.bias,
                            teacher_bias=_full(other.bias, hidden), num_items=num_items,
                            vocab_size=self.vocab_size)  # fmt: skip
        return loss, {}


def _full(x: Tensor | None, like: Tensor) -> Tensor | None:
    return None if x is None else x.detach().to(like.device)


def _targets(inputs: dict) -> Tensor:
    """Labels of inputs that have none: every token that is no padding."""
    tokens = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    return tokens if mask is None or mask.dim() != 2 else torch.where(mask != 0, tokens, IGNORED)


@contextlib.contextmanager
def _replaced(module: nn.Module, forward):
    """A module with another forward; calling it still runs its hooks."""
    own = vars(module).get("forward")
    object.__setattr__(module, "forward", forward)
    try:
        yield
    finally:
        if own is None:
            object.__delattr__(module, "forward")
        else:
            object.__setattr__(module, "forward", own)


def _no_logits(hidden: Tensor) -> Tensor:
    return hidden[..., :1]


def _observed(call: Any, head: nn.Linear, forward, inputs: dict) -> tuple[Any, Tensor]:
    """What a model's call returns with this forward of its head, and what the head was given."""
    seen: list[Tensor] = []

    def instead(hidden):
        seen.append(hidden)
        return forward(hidden)

    with _replaced(head, instead):
        outputs = call(**inputs)
    if len(seen) != 1:
        raise ValueError(f"the model calls its output embedding {len(seen)} times in a forward; "
                         "pass fused_linear=False")  # fmt: skip
    return outputs, seen[0]


@torch.no_grad()
def _checked(side: str, model: Any, head: Head) -> Head:
    """Raises if the model's logits are not what `Head` makes of the hidden states."""
    training = model.training
    try:
        ids = torch.arange(8, device=head.module.weight.device)[None] % head.module.weight.shape[0]
        outputs, hidden = _observed(model.eval(), head.module, head.module.forward, {"input_ids": ids})
    finally:
        model.train(training)
    made, logits = head.logits(hidden), outputs.logits
    if made.shape != logits.shape or (made - logits).abs().max() > 0.02 * logits.abs().max():
        raise ValueError(f"the {side}'s logits are not what its head makes of the last hidden states, with factor "
                         f"{head.scale} and soft-cap {head.softcap}")  # fmt: skip
    return head
