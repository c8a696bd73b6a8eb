"""Time all-MiniLM-L6-v2, float and quantized, by several libraries: medians and ratios to ours.

Run: ``python benchmarks/bench_model.py --threads 1 2``. All contenders take turns in one process,
so that whatever slows the machine slows them alike. ONNX Runtime takes part where ``onnx`` and
``onnxruntime`` are installed. The output is Markdown.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import torch
from torch import Tensor, nn

import minilm
import models
import zeropoint
from tools import machine, spread, time_in_turn

Encoder = Callable[..., Tensor]
ONNX = "ONNX Runtime int8, per channel"


def zeropoint_models(recipes: list[str]) -> dict[str, nn.Module]:
    """MiniLM by further recipes of ours, by name."""
    model = models.load_minilm()
    batches = models.token_batches(models.load_tokenizer(), models.english_sentences(64))
    return {
        f"zeropoint {recipe}": zeropoint.quantize(model, recipe, calibration=batches)
        for recipe in recipes
    }


class OnnxEncoder:
    """MiniLM in ONNX Runtime, quantized by its ``quantize_dynamic``, per channel."""

    def __init__(self, file: Path, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # Its threads would spin beside torch's while the others are timed.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = onnxruntime.InferenceSession(
            file, options, providers=["CPUExecutionProvider"]
        )

    def __call__(self, **inputs: Tensor) -> Tensor:
        arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
        return torch.from_numpy(self.session.run(None, arrays)[0])

    @staticmethod
    def write(model: nn.Module, inputs: dict[str, Tensor], folder: Path) -> Path:
        """Export the float model and quantize the file."""
        from onnxruntime.quantization import QuantType, quantize_dynamic

        exported, quantized = folder / "float.onnx", folder / "int8.onnx"
        names = list(inputs)
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            torch.onnx.export(
                model,
                tuple(inputs.values()),
                str(exported),
                input_names=names,
                output_names=["embedding"],
                dynamic_axes={name: {0: "batch", 1: "tokens"} for name in names},
                opset_version=17,
                dynamo=False,
            )
            logging.disable(logging.WARNING)
            quantize_dynamic(exported, quantized, per_channel=True, weight_type=QuantType.QInt8)
            logging.disable(logging.NOTSET)
        return quantized


def table(rows: list[list[str]]) -> str:
    """Markdown; all columns but the first to the right."""
    head, *body = rows
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def measure(
    contenders: dict[str, Encoder], sized: dict[str, dict[str, Tensor]], rounds: int
) -> dict[str, dict[str, list[float]]]:
    """Seconds of single calls, by size, then by name."""
    with torch.inference_mode():
        return {
            size: time_in_turn({n: partial(c, **batch) for n, c in contenders.items()}, rounds)
            for size, batch in sized.items()
        }


def report(
    times: dict[str, dict[str, list[float]]], cosines: dict[str, tuple[float, float]]
) -> str:
    """Per size the median in ms, the spread, and the ratio of medians to ours; the worst last."""
    head = ["model", "cosine, mean (worst)"]
    for size in times:
        head += [f"{size}, ms", "10–90 %", "÷ ours"]
    rows = [head]
    ratios: list[tuple[float, str]] = []
    for name, (mean, worst) in cosines.items():
        row = [name, f"{mean:.4f} ({worst:.4f})"]
        for size, by_name in times.items():
            low, median, high = (1e3 * t for t in spread(by_name[name]))
            ratio = median / (1e3 * spread(by_name[minilm.OURS])[1])
            row += [f"{median:.2f}", f"{low:.2f}–{high:.2f}", f"{ratio:.2f}"]
            if not name.startswith("zeropoint"):
                ratios.append((ratio, f"{name} at {size}"))
        rows.append(row)
    ratio, where = min(ratios)
    return f"{table(rows)}\n\nWorst ratio: {ratio:.2f} ({where}). Above 1, ours is faster."


def main() -> None:
    """Prepare the contenders, check them against float, time them, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()])
    parser.add_argument("--rounds", type=int, default=21, help="turns that each contender has")
    parser.add_argument(
        "--recipes", nargs="*", default=[], help="further recipes of ours: int8-static, ..."
    )
    arguments = parser.parse_args()
    tokenizer = models.load_tokenizer()
    batches = models.token_batches(tokenizer, models.english_sentences())
    sized = minilm.sized_batches(tokenizer)
    in_torch = minilm.contenders() | zeropoint_models(arguments.recipes)
    reference = models.embed(in_torch[minilm.FLOAT], batches)

    with tempfile.TemporaryDirectory() as folder:
        onnx_file = None
        if importlib.util.find_spec("onnx") and importlib.util.find_spec("onnxruntime"):
            example = batches[0]
            onnx_file = OnnxEncoder.write(in_torch[minilm.FLOAT], example, Path(folder))
        for threads in arguments.threads:
            torch.set_num_threads(threads)
            contenders: dict[str, Any] = dict(in_torch)
            if onnx_file:
                contenders[ONNX] = OnnxEncoder(onnx_file, threads)
            cosines = {}
            for name, encoder in contenders.items():
                kept = models.fidelity(reference, models.embed(encoder, batches))
                cosines[name] = kept.mean_cosine, kept.worst_cosine
            print(f"\n{machine()}\n")
            print(report(measure(contenders, sized, arguments.rounds), cosines), flush=True)


if __name__ == "__main__":
    main()
