"""Triton's interpreter walks through an associative scan in Python, element by element: here in log2(n) steps."""

import numpy as np
from triton.runtime import interpreter


def _scan(self, inputs):
    size = inputs[0].handle.data.shape[self.axis]
    data, step = [x.handle.data for x in inputs], 1
    place = np.arange(size).reshape([-1 if k == self.axis else 1 for k in range(data[0].ndim)])
    while step < size:
        earlier = [self.to_tensor(np.roll(d, step, self.axis), x.dtype) for d, x in zip(data, inputs, strict=True)]
        later = [self.to_tensor(d, x.dtype) for d, x in zip(data, inputs, strict=True)]
        joined = self.combine_fn.fn(*earlier, *later)
        joined = joined if isinstance(joined, tuple) else (joined,)
        data = [np.where(place >= step, y.handle.data, d) for d, y in zip(data, joined, strict=True)]
        step *= 2
    return [self.to_tensor(d, x.dtype) for d, x in zip(data, inputs, strict=True)]


def install() -> None:
    interpreter.ScanOps.generic_scan = _scan
