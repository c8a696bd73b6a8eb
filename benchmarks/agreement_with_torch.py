"""How often ``zeropoint.functional.linear`` and ``torch.ops.quantized.linear`` differ, and why.

Both multiply the same integers exactly; what differs is the order in which the exact sum becomes
an 8-bit output (``acc`` the sum as float32, ``inverse`` = 1/output scale):

    zeropoint  round((acc * (sx * sw) + bias) * inverse) + zero_point
    fbgemm     round((acc + bias / (sx * sw)) * ((sx * sw) / output scale)) + zero_point
    onednn     round((acc * (sx * sw) + bias) * inverse + zero_point)

The last column counts outputs that torch's order, applied to our sums, does not give either: 0
there means that the order is the whole reason. Run ``python benchmarks/agreement_with_torch.py``.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

import zeropoint
from zeropoint import QTensor, kernels, reference

ENGINES = ("fbgemm", "onednn")
SHAPES = ((16, 64, 512), (64, 768, 768), (16, 768, 3072), (128, 3072, 768), (32, 4096, 4096))


@dataclass
class Problem:
    """A quantized linear layer of torch's objects: uint8 activations, int8 weights per channel."""

    x: Tensor
    w: Tensor
    bias: Tensor | None
    scale: float
    zero_point: int


def gaussian(shape: tuple[int, int, int], bias: bool, seed: int) -> Problem:
    """Normal activations and weights, scales from their ranges, outputs over their own range."""
    m, k, n = shape
    g = torch.Generator().manual_seed(seed)
    x, w = torch.randn(m, k, generator=g), torch.randn(n, k, generator=g) / k**0.5
    b = torch.randn(n, generator=g) if bias else None
    y = torch.nn.functional.linear(x, w, b)
    scale = float(y.max() - y.min()) / 255
    return Problem(
        torch.quantize_per_tensor(x, float(x.abs().max()) / 127, 128, torch.quint8),
        torch.quantize_per_channel(
            w, w.abs().amax(1) / 127, torch.zeros(n, dtype=torch.int64), 0, torch.qint8
        ),
        b,
        scale,
        round(-float(y.min()) / scale),
    )


def powers_of_two(shape: tuple[int, int, int], bias: bool, seed: int) -> Problem:
    """Scales that are powers of two and an odd zero point: many outputs exactly halfway."""
    p = gaussian(shape, bias, seed)
    x = torch._make_per_tensor_quantized_tensor(p.x.int_repr(), 2.0**-5, 128)
    n = shape[2]
    w = torch._make_per_channel_quantized_tensor(
        p.w.int_repr(), torch.full((n,), 2.0**-11), torch.zeros(n, dtype=torch.int64), 0
    )
    b = None if p.bias is None else torch.round(p.bias * 64) / 64
    return Problem(x, w, b, 2.0**-5, 127)


def torchs(p: Problem, engine: str) -> Tensor:
    torch.backends.quantized.engine = engine
    packed = torch.ops.quantized.linear_prepack(p.w, p.bias)
    return torch.ops.quantized.linear(p.x, packed, p.scale, p.zero_point).int_repr()


def by_order_of(p: Problem, engine: str) -> Tensor:
    """The outputs in an engine's order of operations, float32 throughout, from our exact sums."""
    x, w = QTensor.from_torch(p.x), QTensor.from_torch(p.w)
    acc = reference.integer_product(x.int_repr(), x.zero_point, w.int_repr(), w.zero_point).float()
    both, out = x.scale * w.scale, torch.tensor(p.scale)
    bias = torch.zeros(w.shape[0]) if p.bias is None else p.bias
    if engine == "fbgemm":
        y = torch.round((acc + bias / both) * (both / out)) + p.zero_point
    else:
        y = torch.round((acc * both + bias) * torch.tensor(1 / p.scale) + p.zero_point)
    return y.clamp(0, 255).to(torch.uint8)


def measure(seeds: int) -> Table:
    table = Table(caption="differ: outputs that are not equal, all of them by one step")
    for name in ("engine", "data", "rows x in x out", "bias", "outputs", "differ", "one in", "max",
                 "not explained"):  # fmt: skip
        table.add_column(name, justify="left" if name in ("engine", "data") else "right")
    rows = [(e, d, s, b) for d in (gaussian, powers_of_two) for e in ENGINES for s in SHAPES
            for b in (True, False)]  # fmt: skip
    for engine, data, shape, bias in tqdm(rows, disable=not sys.stderr.isatty()):
        outputs = differ = largest = unexplained = 0
        for seed in range(seeds):
            p = data(shape, bias, seed)
            ours = zeropoint.functional.linear(p.x, p.w, p.bias, p.scale, p.zero_point)
            assert isinstance(ours, QTensor)
            theirs = torchs(p, engine)
            step = (ours.int_repr().int() - theirs.int()).abs()
            outputs += step.numel()
            differ += int((step > 0).sum())
            largest = max(largest, int(step.max()))
            unexplained += int((by_order_of(p, engine) != theirs).sum())
        one_in = f"{outputs / differ:,.0f}" if differ else "-"
        table.add_row(
            engine, data.__name__.replace("_", " "), " x ".join(map(str, shape)),
            "yes" if bias else "no", f"{outputs:,}", f"{differ:,}", one_in, str(largest),
            str(unexplained),
        )  # fmt: skip
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=8, help="repetitions of each row (default 8)")
    seeds = parser.parse_args().seeds
    warnings.filterwarnings("ignore", message=".*quant.*")  # torch deprecates what we compare with
    console = Console(width=110)
    console.print(
        f"torch {torch.__version__} ({torch.backends.cpu.get_cpu_capability()}), "
        f"zeropoint on {kernels.active_isa()}"
    )
    console.print(measure(seeds))


if __name__ == "__main__":
    main()
