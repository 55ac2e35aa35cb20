"""Supervised distillation of a language model: the teacher's distribution of every token of a fixed set of texts.

    kdkernels distill --recipe supervised

Claim: A student of the teacher's distributions is nearer to it than one of the text alone.

KL(p || q) at T = 1 on the tokens of the responses, without a cross-entropy: the baseline of `on_policy`, `skd` and the
divergences. A hundred steps of AdamW, learning rate 1e-3, on a thousand pairs of prompt and response, are our choice,
here and in all recipes of language models; students start from one that has read a little.

Expected (mean of 3 seeds):

    supervised 63.4 > cross-entropy 57.1: yes
    supervised, given 64.3 > cross-entropy, given 58.4: yes
"""

import kdkernels as kd

from .. import textlab

LAB = textlab.TextLab
SOURCE = "Sanh et al. 2019, DistilBERT; the supervised KD of Agarwal et al. 2024 and Xu et al. 2025"
FIGURE = textlab.FIGURE
TREND = [("supervised", "cross-entropy"), ("supervised, given", "cross-entropy, given")]


def baseline(lab, *taste):
    """The arm that others compare with: the forward KL on fixed texts."""
    return lab.figures("supervised", lab.distil("supervised", kd.ForwardKLLoss()), *taste)


def run(lab):
    plain = kd.CrossEntropyLoss()
    text_alone = lab.distil("cross-entropy", lambda s, t, labels: plain(s, labels=labels))
    return lab.figures("start", lab.student()) | lab.figures("cross-entropy", text_alone) | baseline(lab)
