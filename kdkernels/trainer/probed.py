"""What `kdkernels probe` looks at: {student: (batches, labels)} of a run of `kdkernels distill`, or a recipe's files.

Batches are (student logits (N, V), teacher logits, labels (N,)) of a few rows; labels are those of all of them.
"""

import json
from pathlib import Path

from torch import Tensor

from . import checkpoint, models, report, textlab
from .caching import read_teacher
from .config import UserError
from .data import Corpus
from .distill import read_run, teacher_file
from .images import CLASSES, STUDENT, TEACHER, ConvNet, Pairs
from .lab import state
from .recipes import atsc, atsc_lm, comparative, dfpt, rdd, simkd, simkd_lm

ROWS = 256  # at a time


def of_run(folder: Path, tokens: int):
    """Of the folder of `kdkernels distill`, on held-out text."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; of a recipe, give the student's file and the teacher's")
    if next(folder.glob("seed-*"), None):
        raise UserError(f"{folder} is of a recipe: give one of {folder}/seed-0/*.safetensors and its teacher's file")
    cfg = read_run(folder, {})
    if not (folder / "results.json").exists():
        raise UserError(f"{folder}: the run has not finished; --resume it first")
    with report.progress("tokenise (characters)", "") as bar:
        corpus = Corpus(cfg).load(bar)
    if checkpoint.read_json(folder / "config.json")["text"] != corpus.key:
        raise UserError(f"the text or tokenizer is not what {folder} was started with")
    if not (path := teacher_file(cfg, corpus)).exists():
        raise UserError(f"the teacher of {folder} is not in the cache any more: {path}")
    teacher, _ = read_teacher(path, cfg, corpus)
    inputs, labels = corpus.held_out(tokens)
    kept = labels.flatten() != -100
    step = max(1, ROWS // cfg.seq_len)

    def batches(net):
        for first in range(0, len(inputs), step):
            x, y = inputs[first : first + step].to(cfg.device), labels[first : first + step].flatten()
            yield *(models.logits_of(one, x).float().cpu()[y != -100] for one in (net, teacher)), y[y != -100]

    found = {}
    for name in ("distilled", "ce"):
        net = models.build(cfg, corpus.vocab_size, len(cfg.keep_layers)).eval()
        models.fill(net, checkpoint.load_tensors(folder / f"{name}.safetensors")[0])
        found[name] = batches(net), labels.flatten()[kept]
    return found


def of_files(student: Path, teacher: Path, tokens: int):
    """Of two files of a recipe, on test pictures or, as language models are, on held-out text."""
    read = [weights(path) for path in (student, teacher)]
    language = [any("embed_tokens" in name for name in one) for one, _ in read]
    if language[0] != language[1]:
        raise UserError(f"{student} and {teacher}: one is a language model, the other is not")
    return {student.stem: (of_text if language[0] else of_images)(student, teacher, read, tokens)}


def weights(path: Path) -> tuple[dict[str, Tensor], list]:
    """The net of a recipe's file, and whose it is: its name, the key of its data, ..."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    tensors, header = checkpoint.load_tensors(path)
    net = {k.removeprefix("net/"): v for k, v in tensors.items() if k.startswith("net/")}
    return net, json.loads(header.get("owner", "[]"))


def image_net(path: Path, tensors):
    """A plain network of any widths, or what a recipe has around a student of the usual ones."""
    widths = tuple(tensors[k].shape[0] for k in sorted(tensors) if k.startswith("body.") and tensors[k].ndim == 4)
    student = ConvNet(STUDENT)
    reusing = [simkd.Reusing(student, ConvNet(TEACHER)) for _ in range(2)]
    around = [reusing[0], atsc.Several(reusing), comparative.Remembering(student, CLASSES),
              dfpt.Both(student, dfpt.DualPath(ConvNet(TEACHER)))]  # fmt: skip
    for net in [ConvNet(widths or STUDENT), *around]:
        if {k: v.shape for k, v in state(net).items()} == {k: v.shape for k, v in tensors.items()}:
            net.load_state_dict(tensors, strict=False)  # shared parts are there once
            return net.eval()
    raise UserError(f"{path}: not a network for images, as the recipes of `kdkernels distill` train them")


def pixel_net(path: Path, tensors):
    """A network of the recipe `rdd`."""
    for widths in (rdd.STUDENT, rdd.TEACHER):
        net = rdd.SegNet(widths)
        if {k: v.shape for k, v in net.state_dict().items()} == {k: v.shape for k, v in tensors.items()}:
            net.load_state_dict(tensors)
            return net.eval()
    raise UserError(f"{path}: not a network for the pixels of images, as the recipe rdd trains them")


def of_images(student, teacher, read, tokens):
    """Of what is in the test pictures or, pixel by pixel, where."""
    images, labels, masks = Pairs().test
    pixels = any("auxiliary.weight" in tensors for tensors, _ in read)
    nets = [(pixel_net if pixels else image_net)(path, tensors)
            for path, (tensors, _) in zip((student, teacher), read, strict=True)]  # fmt: skip
    size, labels = (ROWS // 8, masks) if pixels else (ROWS, labels)
    logits = lambda net, x: net(x)[0].flatten(0, 2) if pixels else net(x)  # noqa: E731
    each = zip(images.split(size), labels.split(size), strict=True)
    return ((*(logits(net, x) for net in nets), y.flatten()) for x, y in each), labels.flatten()


def language_net(path: Path, tensors, vocab: int):
    """A plain model, beside which the state of a schedule may be, or one through the LM heads of its teachers."""
    own = {k: v for k, v in tensors.items() if not k.startswith("schedule.")}
    student, teacher = (textlab.untrained(size, vocab) for size in (textlab.STUDENT, textlab.TEACHER))
    half = simkd_lm.Halves(student)
    reusing, other = (simkd_lm.through(half, simkd_lm.Halves(teacher)) for _ in range(2))
    both = atsc.Several([reusing, other])
    for net, wanted in ((student, models.weights_of(student)), (teacher, models.weights_of(teacher)),
                        (reusing, state(reusing)), (both, state(both))):  # fmt: skip
        if {k: v.shape for k, v in own.items()} == {k: v.shape for k, v in wanted.items()}:
            net.load_state_dict(own, strict=False)  # what is tied or shared is there once
            write = {id(reusing): simkd_lm.writer, id(both): atsc_lm.writer}.get(id(net))
            return (write(student, net) if write else net).eval()
    raise UserError(f"{path}: not a language model as the recipes of `kdkernels distill` train them")


def of_text(student, teacher, read, tokens):
    """The responses of held-out pieces of the text that both have learnt from."""
    keys = {own[1].split(",")[0] if len(own) > 1 else "" for _, own in read}
    key, folder = next(iter(keys)), teacher.parent
    if len(keys) > 1 or not (folder / f"text-{key}.safetensors").exists():
        raise UserError(f"{teacher}: to be the teacher of {student.name}, in the cache folder, with the text of both")
    lab = textlab.TextLab(folder, folder)
    text = lab.data()
    if text.whole.key != key:
        raise UserError(f"{teacher} has learnt from another text than this Python's standard library")
    nets = [language_net(path, one, text.vocab) for path, (one, _) in zip((student, teacher), read, strict=True)]
    pieces = text.held[: max(1, tokens // textlab.RESPONSE)]
    labels = lab.labels(pieces).flatten()

    def batches():
        for x in pieces.split(max(1, ROWS // textlab.RESPONSE)):
            y = lab.labels(x).flatten()
            yield *(textlab.responses(net(input_ids=x).logits)[y != -100] for net in nets), y[y != -100]

    return batches(), labels[labels != -100]
