"""Other libraries' fused-linear forward KL (pip install liger-kernel trl), as functions of student hidden and head."""

import importlib
from collections.abc import Callable

import torch
from torch import Tensor


def trl(teacher_hidden: Tensor, teacher_head: Tensor) -> Callable:
    """TRL's chunked divergence, as DistillationTrainer calls it. No logits in memory: they are made again backward."""
    function = importlib.import_module("trl.kernels.chunked_divergence").ChunkedDivergenceFunction
    return lambda h, w: function.apply(h, w, None, teacher_hidden, teacher_head, None, 0.0)[0].mean()


def liger_chunked(teacher_hidden: Tensor, teacher_head: Tensor) -> Callable:
    """Liger's chunked loss at beta 0, torch.compiled, in chunks of its default 1024 rows."""
    loss = importlib.import_module("liger_kernel.chunked_loss").LigerFusedLinearJSDLoss
    loss = loss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, temperature=1.0)
    labels = torch.zeros(len(teacher_hidden), dtype=torch.int64)
    return lambda h, w: loss(h, w, teacher_hidden, teacher_head, labels)


def liger_fused(teacher_hidden: Tensor, teacher_head: Tensor) -> Callable:
    """Liger's Triton kernel at beta 0: GPUs only."""
    loss = importlib.import_module("liger_kernel.transformers").LigerFusedLinearJSD(jsd_beta=0.0)
    return lambda h, w: loss(h, w, teacher_hidden, teacher_head, torch.zeros(len(h), dtype=torch.int64))


LINEAR = {"TRL chunked": trl, "Liger chunked": liger_chunked, "Liger fused": liger_fused}


def linear(teacher_hidden: Tensor, teacher_head: Tensor) -> tuple[dict[str, Callable], dict[str, str]]:
    """Those that give the textbook's value here; and of the others why not."""
    h, th = (torch.randn(8, teacher_hidden.shape[1], dtype=teacher_hidden.dtype) for _ in range(2))
    w, tw = (torch.randn(40, teacher_hidden.shape[1], dtype=teacher_hidden.dtype) / 4 for _ in range(2))
    want = torch.nn.functional.kl_div((h @ w.T).double().log_softmax(-1), (th @ tw.T).double().log_softmax(-1),
                                      reduction="batchmean", log_target=True)  # fmt: skip
    found, missing = {}, {}
    for name, make in LINEAR.items():
        try:
            got = make(th, tw)(h.requires_grad_(), w.requires_grad_())
            if abs(got.item() - want.item()) > 0.05 * want.item():
                raise ValueError(f"gives {got.item():.4g} where the textbook gives {want.item():.4g}")
            found[name] = make(teacher_hidden, teacher_head)
        except Exception as error:  # whatever another library raises, the table has to say
            missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return found, missing
