"""Student and teacher with vocabularies of their own that share some classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .buckets import Merged, Outcomes, Part
from .call import Shaped, check_logits, check_vocab
from .options import check_choice, check_count, check_integers, readable
from .sparse import SparseTeacher


class SharedVocab:
    """Which classes a student shares with a teacher; called on the teacher's logits, it stands in the teacher's place.

        shared = kdkernels.SharedVocab(student_to_teacher, teacher_vocab=len(teacher_tokenizer))
        loss(student_logits, shared(teacher_logits), labels)

    Both rows become the shared classes, and one outcome for all others of its own vocabulary; or, with
    tail="renormalise", the shared classes alone. Which losses take that, and what it means: see `SparseTeacher`.
    Labels, and vocab_mask, are of the student's classes; the cross-entropy is that of its whole rows. Rows have to
    belong to the same text: where the tokens of both differ in length, align them first, or use a loss for unrelated
    tokenizers. There is a gradient for the teacher. It takes two copies (N, shared) of the logits, in float32.

    Args:
        student_to_teacher: (V_s,) integers: the teacher's class for each of the student's, -1 where it has none. No
            class of the teacher's twice. The student's logits may be wider: from V_s on they are padding.
        teacher_vocab: the teacher's classes; its logits may be wider, as above.
        tail: "bucket" or "renormalise".

    Raises:
        TypeError, ValueError: an argument is not of the dtype, shape or range it should be.
    """

    def __init__(self, student_to_teacher: Tensor, teacher_vocab: int, *, tail: str = "bucket") -> None:
        x = student_to_teacher
        check_integers("student_to_teacher", x)
        if x.dim() != 1 or not len(x):
            raise ValueError(f"student_to_teacher must have shape (V_s,), got {tuple(x.shape)}")
        check_count("teacher_vocab", teacher_vocab)
        check_choice("tail", tail, ("bucket", "renormalise"))
        x = x.to(torch.int64)
        self.student = torch.nonzero(x >= 0)[:, 0]
        self.teacher = x[self.student]
        if int(x.min()) < -1 or int(x.max()) >= teacher_vocab or not len(self.teacher):
            raise ValueError(f"student_to_teacher must have classes in [0, {teacher_vocab}), or -1 for none, got "
                             f"{int(x.min())} to {int(x.max())}")  # fmt: skip
        if int((counts := self.teacher.bincount()).max()) > 1:
            raise ValueError(f"student_to_teacher must have a class of the teacher's once, got {int(counts.argmax())} "
                             f"{int(counts.max())} times")  # fmt: skip
        self.student_vocab, self.teacher_vocab, self.tail = len(x), teacher_vocab, tail
        self.place = torch.full((len(x),), len(self.student), device=x.device)
        self.place[self.student] = torch.arange(len(self.student), device=x.device)
        self.to_student = torch.full((teacher_vocab,), -1, device=x.device)
        self.to_student[self.teacher] = self.student

    @classmethod
    def of_tokens(cls, student: Mapping[str, int], teacher: Mapping[str, int], **options: Any) -> SharedVocab:
        """From two vocabularies {token: class}, as tokenizers' `get_vocab()` gives them: equal tokens are shared."""
        classes = torch.full((max(student.values()) + 1,), -1)
        for token, i in student.items():
            classes[i] = teacher.get(token, -1)
        return cls(classes, max(teacher.values()) + 1, **options)

    def __repr__(self) -> str:
        return (f"SharedVocab({len(self.student)} classes of {self.student_vocab} and {self.teacher_vocab}, "
                f"tail={self.tail!r})")  # fmt: skip

    def __call__(self, teacher: Tensor | SparseTeacher) -> Merged:
        """What stands in the teacher's place, for teacher logits (..., V) or a `SparseTeacher` of its classes."""
        if isinstance(teacher, SparseTeacher):
            return self._sparse(teacher)
        check_logits("teacher_logits", teacher)
        check_vocab(self.teacher_vocab, teacher)
        return _SharedTeacher(self, teacher)

    def vocab(self, vocab_size: int | None, student: Tensor | Shaped) -> int:
        """The student's classes, in logits of student's shape."""
        if student.shape[-1] < self.student_vocab:
            raise ValueError(f"student_logits must have the {self.student_vocab} classes of the shared vocabulary's "
                             f"map or more, got {tuple(student.shape)}")  # fmt: skip
        if vocab_size is None:
            return self.student_vocab
        if check_vocab(vocab_size, student) < self.student_vocab:
            raise ValueError(f"vocab_size must be >= {self.student_vocab}, the classes of the shared vocabulary's map, "
                             f"got {vocab_size}")  # fmt: skip
        return vocab_size

    def to(self, device: torch.device | str | int) -> SharedVocab:
        """On another device."""
        other = object.__new__(SharedVocab)
        vars(other).update({n: x.to(device) if isinstance(x, Tensor) else x for n, x in vars(self).items()})
        return other

    def _sparse(self, teacher: SparseTeacher) -> SparseTeacher:
        """With the student's classes. The mass of those it has not goes to the tail."""
        if readable(teacher.indices) and teacher.indices.numel() and int(teacher.indices.max()) >= self.teacher_vocab:
            raise ValueError(f"indices of a SparseTeacher must be in [0, {self.teacher_vocab}), the teacher's classes, "
                             f"or -1, got {int(teacher.indices.max())}")  # fmt: skip
        indices = torch.where(teacher.indices < 0, -1, self.to_student[teacher.indices.clamp(min=0)])
        tail = teacher.log_tail
        if tail is not None:
            log_p = teacher.log_outcomes(tail.dtype)[:, : teacher.shape[-1]].view(teacher.shape)
            lost = log_p.masked_fill(indices >= 0, -torch.inf)
            tail = torch.logaddexp(tail, lost.logsumexp(-1))
        return teacher._with(indices, teacher.values, tail)


class _SharedTeacher(Merged):
    def __init__(self, shared: SharedVocab, logits: Tensor) -> None:
        self.shared, self.logits, self.tail = shared, logits, shared.tail

    def vocab(self, vocab_size, student):
        return self.shared.vocab(vocab_size, student)

    def check(self, student, vocab):
        if self.logits.shape[:-1] != student.shape[:-1]:
            raise ValueError(f"teacher_logits must have the rows of student_logits {tuple(student.shape)}, got "
                             f"{tuple(self.logits.shape)}")  # fmt: skip
        for name, x in (("teacher_logits", self.logits), ("the shared vocabulary's map", self.shared.student)):
            if x.device != student.device:
                raise ValueError(f"{name} must be on student_logits' device {student.device}, got {x.device}")

    def classes(self):
        return self.shared.student[None]

    def outcomes(self, inverse, wide):
        part = Part(self.shared.teacher[None], inverse if self.tail == "bucket" else None)
        return Outcomes.apply(self.logits, self.shared.teacher_vocab, None, wide, False, part)[0]

    def place(self, labels):
        known = (labels >= 0) & (labels < self.shared.student_vocab)
        return torch.where(known, self.shared.place[torch.where(known, labels, 0)], len(self.shared.student))
