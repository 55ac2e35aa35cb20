"""Speculative distillation: the student writes, the teacher replaces what it would hardly have written.

    kdkernels distill --recipe skd

Claim: Text of the student, mended by the teacher, makes a better student than its own text or a fixed set.

A token that the student draws (T = 0.5, top-p 0.5) stays if it is among the teacher's K = 25 most likely, by its logits
as they are; otherwise the teacher draws one (T = 0.2, top-p 0.5). The student drafts 5 tokens between two looks of the
teacher; then one step on KL(p || q), the mean over the tokens of all responses (in the paper's code over the texts'
means: the same unless some end early). K = V is on-policy distillation. (The released code tests another token than the
drafted one, cuts the teacher's logits to the nucleus before it looks for the K, and leaves out the first token of the
response.) The figure is of text that the student draws as it does here, in all arms.

Expected (mean of 3 seeds):

    SKD 77.0 > supervised 68.5: yes
    SKD 77.0 > on-policy 76.6: within noise
"""

import kdkernels as kd

from .. import textlab
from ..sampling import Judge, Taste
from . import on_policy, supervised

LAB = textlab.TextLab
SOURCE = "Xu et al. 2025, Speculative knowledge distillation (ICLR)"
FIGURE = textlab.FIGURE
TREND = [("SKD", "supervised"), ("SKD", "on-policy")]
STUDENT = Taste(temperature=0.5, top_p=0.5)


def judge(teacher, top_k=25):
    return Judge(teacher, top_k, Taste(temperature=0.2, top_p=0.5), draft=5)


def interleaved(lab):
    """tokens(net, batch): text of the student and the judge."""
    own = judge(lab.teacher())
    return lambda net, batch: lab.written(net, batch.inputs, batch.noise, STUDENT, own)


def run(lab):
    figures, loss = supervised.baseline(lab, STUDENT), kd.ForwardKLLoss()
    for arm, tokens in (("on-policy", on_policy.mixture(lab, 1.0, STUDENT)), ("SKD", interleaved(lab))):
        figures |= lab.figures(arm, lab.distil(arm, loss, tokens), STUDENT)
    return figures
