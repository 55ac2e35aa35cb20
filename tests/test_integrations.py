"""kdkernels in Hugging Face's and TRL's trainers, with tiny models made from configurations."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    TrainingArguments,
)

import kdkernels as kd
from kdkernels.integrations import trl as ours
from kdkernels.integrations.transformers import DistillationTrainer

V = 97
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of the libraries'


def model(hidden, seed, kind=LlamaForCausalLM, config=LlamaConfig, vocab=V, **options):
    torch.manual_seed(seed)
    options = dict(vocab_size=vocab, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2,
                   num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3,
                   **options)  # fmt: skip
    return kind(config(**options))


def rows(count=16, labelled=True):
    g, found = torch.Generator().manual_seed(0), []
    for _ in range(count):
        length, ids = int(torch.randint(6, 20, (1,), generator=g)), torch.randint(V, (20,), generator=g)
        mask = (torch.arange(20) < length).long()
        labels = torch.where(mask > 0, ids, -100).index_fill(0, torch.tensor([0, 1]), -100)
        found.append(dict(input_ids=ids, attention_mask=mask) | (dict(labels=labels) if labelled else {}))
    return found


def trainer(folder, student=None, teacher=None, *, batch=4, accumulate=1, data=None, loss=None, fused=True, steps=3,
            vocab_size=None, **options):  # fmt: skip
    args = TrainingArguments(output_dir=str(folder), per_device_train_batch_size=batch, learning_rate=1e-2,
                             gradient_accumulation_steps=accumulate, max_steps=steps, report_to=[], use_cpu=True,
                             logging_steps=1, save_strategy="no", disable_tqdm=True, seed=0)  # fmt: skip
    options = dict(loss=loss, train_dataset=data or rows(), fused_linear=fused, vocab_size=vocab_size, **options)
    return DistillationTrainer(student or model(16, 0), args, teacher_model=teacher or model(24, 1), **options)


def losses(one):
    one.train()
    return [entry["loss"] for entry in one.state.log_history if "loss" in entry]


def textbook(student, teacher, batch):
    """The mean of KL(p || q) over the positions whose next token has a label."""
    kept = batch["labels"][:, 1:] != -100
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    q, p = (m(**inputs).logits[:, :-1][kept].double().log_softmax(-1) for m in (student, teacher))
    return F.kl_div(q, p, reduction="batchmean", log_target=True).item()


@pytest.mark.parametrize("fused", [True, False])
def test_the_first_loss_is_the_textbooks_and_accumulation_changes_nothing(tmp_path, fused):
    """Batches of 8, of 4 and of 2 rows, with different numbers of tokens, accumulated to 8."""
    found = [losses(trainer(tmp_path, batch=8 // n, accumulate=n, fused=fused)) for n in (1, 2, 4)]
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-5)
    one = trainer(tmp_path, batch=8)
    batch = next(iter(one.get_train_dataloader()))
    assert found[0][0] == pytest.approx(textbook(model(16, 0), model(24, 1), batch), rel=1e-5)


@pytest.mark.parametrize("kind", [(Gemma2ForCausalLM, Gemma2Config, dict(head_dim=8, final_logit_softcapping=2.0)),
                                  (GraniteForCausalLM, GraniteConfig, dict(logits_scaling=0.3))],
                         ids=["softcap", "factor"])  # fmt: skip
def test_what_models_do_behind_their_heads(kind, tmp_path):
    """A soft-cap and a factor, which change the loss: from hidden states as from logits."""
    make, config, option = kind
    pairs = [(model(16, 0, make, config, **option), model(24, 1, make, config, **option)) for _ in range(2)]
    fused, whole = (losses(trainer(tmp_path, *pair, fused=f)) for pair, f in zip(pairs, (True, False), strict=True))
    assert fused == pytest.approx(whole, rel=1e-4)


def test_a_head_that_is_not_what_it_seems_is_not_used(tmp_path):
    class Odd(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = 3 * out.logits
            return out

    with pytest.raises(ValueError, match="the teacher's logits are not what its head makes"):
        trainer(tmp_path, teacher=model(24, 1, Odd))
    automatic = losses(trainer(tmp_path, teacher=model(24, 1, Odd), fused="auto"))
    assert automatic == losses(trainer(tmp_path, teacher=model(24, 1, Odd), fused=False))


def test_no_logits_exist(tmp_path, monkeypatch):
    heads, calls = [], []
    one = trainer(tmp_path, fused=True)
    for m in (one.model, one.teacher_model):
        heads.append(m.lm_head)
        m.lm_head.register_forward_hook(lambda _m, _given, out: calls.append(tuple(out.shape)))
    losses(one)
    assert calls and all(shape[-1] == 1 for shape in calls)


def test_adapters_train_and_nothing_else(tmp_path):
    results = []
    for fused in (True, False):
        student = peft.get_peft_model(model(16, 0), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
        frozen = {k: v.clone() for k, v in student.state_dict().items() if "lora" not in k}
        results.append(losses(trainer(tmp_path, student, fused=fused)))
        assert all(torch.equal(v, student.state_dict()[k]) for k, v in frozen.items())
        assert any(v.abs().max() > 0 for k, v in student.state_dict().items() if "lora_B" in k)
    assert results[0] == pytest.approx(results[1], rel=1e-4)
    student = peft.get_peft_model(model(16, 0), peft.LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(ValueError, match=r"not a plain nn\.Linear"):
        trainer(tmp_path, student)
    assert len(losses(trainer(tmp_path, student, fused="auto"))) == 3


def test_packed_sequences_are_those_one_by_one(tmp_path):
    """Two texts in a row with position_ids and a label of -100 where the second begins."""
    g = torch.Generator().manual_seed(3)
    texts = [torch.randint(V, (n,), generator=g) for n in (7, 9)]
    one_by_one = [dict(input_ids=x, labels=x) for x in texts]
    packed = dict(input_ids=torch.cat(texts), position_ids=torch.cat([torch.arange(len(x)) for x in texts]),
                  labels=torch.cat([x.index_fill(0, torch.tensor([0]), -100) for x in texts]))  # fmt: skip
    alone = trainer(tmp_path, data=one_by_one, batch=1, accumulate=2, steps=1)
    together = trainer(tmp_path, data=[packed], batch=1, steps=1)
    assert losses(together) == pytest.approx(losses(alone), rel=1e-5)


def test_without_labels_every_token_that_is_no_padding_counts(tmp_path):
    found = trainer(tmp_path).compute_loss(model(16, 0), _batch(rows(4, labelled=False)))
    labelled = _batch(rows(4))
    labelled["labels"] = torch.where(labelled["attention_mask"] > 0, labelled["input_ids"], -100)
    assert found.item() == pytest.approx(textbook(model(16, 0), model(24, 1), labelled), rel=1e-5)


def _batch(data):
    return {k: torch.stack([row[k] for row in data]) for k in data[0]}


def test_evaluation_and_metrics(tmp_path):
    shapes = []
    for metrics in (None, lambda p: shapes.append(p.predictions.shape) or {"rows": len(p.predictions)}):
        one = trainer(tmp_path, eval_dataset=rows(8), compute_metrics=metrics)
        found = one.evaluate()
        assert found["eval_loss"] > 0
    assert shapes == [(8, 20, V)] and found["eval_rows"] == 8


def test_padded_vocabularies_and_other_losses(tmp_path):
    with pytest.raises(ValueError, match="teacher_head"):
        losses(trainer(tmp_path, teacher=model(24, 1, vocab=V + 7)))
    padded = losses(trainer(tmp_path, teacher=model(24, 1, vocab=V + 7), vocab_size=V))
    assert padded[0] > 0
    whole = losses(trainer(tmp_path, loss=kd.DISTLoss(), fused="auto"))  # of the whole batch: logits
    assert whole[0] > 0
    mixed = kd.KDLoss(alpha=0.5) + 0.5 * kd.JSDLoss()
    fused, plain = (losses(trainer(tmp_path, loss=mixed, fused=f)) for f in (True, False))
    assert fused == pytest.approx(plain, rel=1e-4)


def test_arguments_are_checked(tmp_path):
    for options, error, message in (
        (dict(loss=F.kl_div), TypeError, "loss must be a loss of kdkernels"),
        (dict(loss=kd.KDLoss(reduction="sum")), ValueError, "reduction='mean'"),
        (dict(loss=kd.DISTLoss(), fused=True), ValueError, "looks at the whole batch"),
        (dict(fused="yes"), ValueError, "fused_linear"),
        (dict(teacher="gpt2"), TypeError, "teacher_model"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            trainer(tmp_path, **options)


def losses_of_two(folder):
    return losses(trainer(folder, batch=4))


def sharded(folder):
    """The loss and its gradients, of a model cut by FSDP2 as accelerate does it, less those of a whole one."""
    one, rank = trainer(folder), dist.get_rank()
    batch = {k: torch.stack([row[k] for row in rows()[4 * rank : 4 * rank + 4]]) for k in rows()[0]}
    found = []
    for cut in (False, True):
        student = model(16, 0)
        if cut:
            mesh = init_device_mesh("cpu", (dist.get_world_size(),))
            for part in (*student.model.layers, student):
                fully_shard(part, mesh=mesh, reshard_after_forward=True)
        (loss := one.compute_loss(student, batch)).backward()
        grads = [p.grad for p in student.parameters()]
        for g in [] if cut else grads:
            dist.all_reduce(g.div_(dist.get_world_size()))
        found.append([loss.detach(), *(g.full_tensor() if cut else g for g in grads)])
    return [((a - b).norm() / b.norm()).item() for b, a in zip(*found, strict=True)]


WORKER = """
import json, os, sys
sys.path.insert(0, {tests!r})
import test_integrations
found = test_integrations.{function}({folder!r})
if os.environ["RANK"] == "0":
    print("FOUND", json.dumps(found))
"""


def of_two_processes(function, folder):
    """What the function returned on the first of two ranks."""
    code = folder / "worker.py"
    code.write_text(WORKER.format(tests=str(Path(__file__).parent), folder=str(folder / "out"), function=function))
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(code)]
    done = subprocess.run(run, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=200)
    line = [x for x in done.stdout.splitlines() if x.startswith("FOUND")]
    assert line, done.stderr[-2000:]
    return json.loads(line[0].removeprefix("FOUND "))


def test_two_processes_are_one_with_the_batch_of_both(tmp_path):
    together = of_two_processes("losses_of_two", tmp_path)
    assert together == pytest.approx(losses(trainer(tmp_path, batch=8)), rel=1e-4)


def test_the_head_of_a_model_cut_by_fsdp2_is_whole_for_the_loss(tmp_path):
    assert max(of_two_processes("sharded", tmp_path)) < 1e-5


# --- TRL


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("call", [{}, dict(reduction="sum"), dict(reduction="mean"), dict(num_items_in_batch=7),
                                  dict(num_items_in_batch=torch.tensor(7), reduction="none")], ids=str)  # fmt: skip
@pytest.mark.parametrize("name", ["GKDTrainer", "GOLDTrainer"])
def test_trls_divergence_is_ours(name, beta, call, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    module = {b: a for a, b in ours.TRAINERS}[name]
    theirs = getattr(importlib.import_module(module), name)
    g = torch.Generator().manual_seed(0)
    s, t = 2 * torch.randn(2, 2, 5, 11, generator=g)
    y = torch.randint(11, (2, 5), generator=g)
    y[0, :2] = -100
    s.requires_grad_()
    arguments = dict(labels=y, beta=beta, temperature=1.5, **call)
    want = theirs.generalized_jsd_loss(s, t, **arguments)
    (slope,) = torch.autograd.grad(want, s)
    assert f"{name}.generalized_jsd_loss" in ours.patch()
    try:
        kd.backends.calls.clear()
        got = theirs.generalized_jsd_loss(s, t, **arguments)
        assert kd.backends.calls
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(torch.autograd.grad(got, s)[0], slope, rtol=1e-4, atol=1e-7)
        each = theirs.generalized_jsd_loss(s, t, y, beta, reduction="none")  # stays TRL's
        assert each.shape == ((y != -100).sum(), 11)
    finally:
        ours.unpatch()
    kd.backends.calls.clear()
    theirs.generalized_jsd_loss(s, t, **arguments)
    assert not kd.backends.calls


def steps_of(name, folder):
    """Two steps of TRL's trainer on the CPU -> what it logged of them, and the student's weights."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(V - 3))])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    tokens.chat_template = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
    says = lambda i, role: dict(role=role, content=" ".join(f"w{(7 * i + k) % 90}" for k in range(3 + i % 4)))  # noqa: E731
    if name == "GKDTrainer":
        data = dict(messages=[[says(i, "user"), says(i + 9, "assistant")] for i in range(8)])
        options = dict(lmbda=0.0, max_length=32)
    else:
        data, options = dict(prompt=[[says(i, "user")] for i in range(8)]), dict(max_completion_length=6, beta=0.5)
    module = dict(GKDTrainer="trl.experimental.gkd", DistillationTrainer="trl")[name]
    made, config = (getattr(importlib.import_module(module), x) for x in (name, name.replace("Trainer", "Config")))
    args = config(output_dir=str(folder), per_device_train_batch_size=4, max_steps=2, learning_rate=1e-2, report_to=[],
                  use_cpu=True, bf16=False, gradient_checkpointing=False, logging_steps=1, save_strategy="no",
                  disable_tqdm=True, seed=0, **options)  # fmt: skip
    one = made(model=model(16, 0), teacher_model=model(24, 1), args=args, train_dataset=Dataset.from_dict(data),
               processing_class=tokens)  # fmt: skip
    one.train()
    logged = [{k: x[k] for k in ("loss", "entropy") if k in x} for x in one.state.log_history if "loss" in x]
    return logged, [x.detach() for x in one.model.parameters()]


@pytest.mark.parametrize("name", ["GKDTrainer", "DistillationTrainer"])
def test_trls_trainers_train_the_same_with_our_losses(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    theirs, their_weights = steps_of(name, tmp_path)
    assert ours.patch()
    try:
        kd.backends.calls.clear()
        mine, my_weights = steps_of(name, tmp_path)
        assert kd.backends.calls
    finally:
        ours.unpatch()
    assert len(mine) == 2 and mine[0]["loss"] > 0 and (name == "GKDTrainer" or mine[0]["entropy"] > 0)
    for a, b in zip(mine, theirs, strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    for a, b in zip(my_weights, their_weights, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("call", [
    {}, dict(num_items_in_batch=torch.tensor(7)),
    dict(student_logit_scale=0.3, teacher_final_logit_softcapping=2.0, temperature=1.5),
    dict(student_final_logit_softcapping=3.0, teacher_logit_scale=2.0)], ids=str)  # fmt: skip
def test_trls_chunked_divergence_is_ours(beta, call):
    from trl.trainer.distillation_trainer import _chunked_divergence_loss as theirs

    g = torch.Generator().manual_seed(0)
    shapes = (2, 5, 8), (2, 5, 6), (11, 8), (11, 6), (11,), (11,)
    h, ht, w, wt, b, bt = (torch.randn(*shape, generator=g) for shape in shapes)
    mask, leaves = torch.rand(2, 5, generator=g) < 0.6, [x.requires_grad_() for x in (h, w, b)]
    found = []
    for of in (theirs, ours.chunked_divergence_loss):
        value, entropy, count = of(h, ht, w, wt, mask, beta, student_lm_head_bias=b, teacher_lm_head_bias=bt, **call)
        found.append((value, entropy, count, *torch.autograd.grad(value, leaves)))
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(y, x, rtol=1e-4, atol=1e-6)
