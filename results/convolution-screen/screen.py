"""`fmem`, whose convolution has no SiLU where the variable NO_SILU is set: `screen.py train ...`, `screen.py evaluate ...`."""

import os
import sys

from factorization_memory.cli import main
from factorization_memory.layers import convolution


def linear(self: convolution.CausalConvolution, extended: convolution.Tensor) -> convolution.Tensor:
    taps = zip(convolution._shifted(extended, len(self.weight)), self.weight, strict=True)
    return self.bias + sum(x * tap for x, tap in taps)


if os.environ.get("NO_SILU"):
    convolution.CausalConvolution._convolve = linear
main(sys.argv[1:])
