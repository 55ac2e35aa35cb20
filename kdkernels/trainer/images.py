"""Images from what scikit-learn ships, and convolutional networks for them.

A pair is two of its 1,797 handwritten digits, 8 x 8, side by side on a canvas of 12 x 20, each moved and faded at
random, under noise: 100 classes, of which those with a digit in common resemble each other. Digits of the training
pictures are in no test picture.
"""

import math

import numpy
import torch
from torch import nn

HEIGHT, WIDTH, CLASSES = 12, 20, 100
GROUPS = 33, 67  # classes of a long-tailed set: head, medium, tail


class Pairs:
    """`train` and `test`: images (N, 1, 12, 20) in float32, labels (N,) and masks (N, 12, 20): 0, or 1 + the digit.

    Args:
        train, test: how many pictures.
        noise: standard deviation of the noise; ink is between 0.5 and 1.
        imbalance: pictures of the most frequent class over those of the rarest, falling exponentially between them;
            1: as many of each. The test set is always balanced.
        seed: of the set; what is trained on it has seeds of its own.
    """

    def __init__(self, train=8000, test=4000, noise=0.15, imbalance=1.0, seed=0):
        from sklearn.datasets import load_digits

        ink, digits = load_digits(return_X_y=True)
        ink = torch.from_numpy(ink).float().view(-1, 8, 8) / 16
        self.key = f"pairs {train} {test} {noise} {imbalance} {seed}"
        rng = numpy.random.default_rng(seed)
        order = rng.permutation(len(ink))
        sides = {"train": order[:1000], "test": order[1000:]}
        share = imbalance ** -(numpy.arange(CLASSES) / (CLASSES - 1))
        self.counts = torch.from_numpy(numpy.maximum(1, numpy.floor(share / share.sum() * train)).astype(int))
        wanted = {"train": numpy.repeat(numpy.arange(CLASSES), self.counts), "test": numpy.arange(test) % CLASSES}
        by_digit = {side: [places[digits[places] == d] for d in range(10)] for side, places in sides.items()}
        self.train, self.test = (self._draw(rng, wanted[side], by_digit[side], ink, noise) for side in sides)

    def _draw(self, rng, labels, of, ink, noise):
        images = torch.zeros(len(labels), 1, HEIGHT, WIDTH)
        masks = torch.zeros(len(labels), HEIGHT, WIDTH, dtype=torch.int64)
        for n, label in enumerate(labels):
            for side, digit in enumerate(divmod(label, 10)):
                x = ink[rng.choice(of[digit])] * float(rng.uniform(0.5, 1))
                top, left = rng.integers(0, HEIGHT - 7), 10 * side + rng.integers(0, 3)
                images[n, 0, top : top + 8, left : left + 8] += x
                masks[n, top : top + 8, left : left + 8][x > 0.15] = 1 + int(digit)
        images += noise * torch.from_numpy(rng.standard_normal(images.shape)).float()
        return images, torch.from_numpy(labels), masks

    def draw(self, rng, size):
        """-> numbers (size,) of training pictures, at random."""
        return torch.from_numpy(rng.integers(0, len(self.train[0]), size))


class ConvNet(nn.Module):
    """Three convolutions; `features` are what the last gives (N, widths[-1], 3, 5), `head` makes logits of them."""

    def __init__(self, widths=(32, 64, 128), classes=CLASSES):
        super().__init__()
        self.widths = widths
        layers = []
        for i, (a, b) in enumerate(zip((1, *widths), widths, strict=False)):
            layers += [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if i < 2 else []
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1] * 5, classes)

    def features(self, x):
        return self.body(x)

    def classify(self, features):
        """Logits: columns stay apart, for where a digit stands is what the class depends on."""
        return self.head(features.mean(2).flatten(1))

    def forward(self, x):
        return self.classify(self.features(x))


TEACHER, STUDENT = (32, 64, 128), (6, 12, 24)


@torch.no_grad()
def entropy(model, data):
    """The mean entropy of what a model says of the test pictures, in percent of the largest, log CLASSES."""
    model.eval()
    rows = [model(x).log_softmax(1) for x in data.test[0].split(1000)]
    return -100 * torch.cat([(x.exp() * x).sum(1) for x in rows]).double().mean().item() / math.log(CLASSES)


@torch.no_grad()
def accuracy(model, data, classes=None):
    """Share of the test pictures (of the classes) that are recognised, in percent."""
    images, labels, _ = data.test
    model.eval()
    right = torch.cat([model(x).argmax(1) for x in images.split(1000)]) == labels
    if classes is not None:
        right = right[torch.isin(labels, classes)]
    return 100 * right.double().mean().item()
