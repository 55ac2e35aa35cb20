"""DTensors in the place of a process group and local tensors."""

from __future__ import annotations

from torch import Tensor


def is_sharded(x) -> bool:
    """Whether it is a DTensor."""
    return isinstance(x, Tensor) and hasattr(x, "device_mesh")


def unwrapped(group, student, teacher, labels):
    """The group, and local tensors in place of DTensors."""
    if is_sharded(labels):
        if not all(p.is_replicate() for p in labels.placements):
            raise ValueError(f"labels must be the same on every rank, got a DTensor with {labels.placements}")
        labels = labels.to_local()
    if not is_sharded(student):
        if is_sharded(teacher):
            raise TypeError("teacher_logits are a DTensor and student_logits are not; pass both in one form")
        return group, student, teacher, labels
    if group is not None:
        raise TypeError("student_logits are a DTensor, whose device mesh is the group: pass no group")
    placements, last = student.placements, student.dim() - 1
    cut = [i for i, p in enumerate(placements) if p.is_shard(last) or p.is_shard(-1)]
    if len(cut) != 1 or not all(p.is_replicate() for i, p in enumerate(placements) if i != cut[0]):
        raise ValueError(f"student_logits must be cut along the last dimension in one dimension of their mesh and "
                         f"replicated in the others, got {placements}")  # fmt: skip
    if teacher is not None:
        if not is_sharded(teacher):
            raise TypeError("student_logits are a DTensor and teacher_logits are not; pass both in one form")
        if teacher.device_mesh != student.device_mesh or teacher.placements != placements:
            raise ValueError(f"teacher_logits must be placed like student_logits {placements}, "
                             f"got {teacher.placements}")  # fmt: skip
        teacher = teacher.to_local(grad_placements=placements)
    return student.device_mesh.get_group(cut[0]), student.to_local(grad_placements=placements), teacher, labels
