"""Quality, size and speed of two real models in float, 8 bits, and 4 bits by each method.

``python benchmarks/bench_methods.py --docs`` measures all and writes the tables of docs/methods.md.
The models are all-MiniLM-L6-v2 and SmolLM2-135M, beside them torchao, ONNX Runtime and llama.cpp on
the same weights where they are installed. Calibration and test text are different parts of Python's
documentation.

Quality comes first: about 40 minutes on one core, none where it is known from an earlier run; what
was broken off goes on. Then one model of each form is timed, all in turn: about 6 minutes, on a
machine that is quiet (``--speed-only``: no more than that).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import torch

import method_quality
import method_report
import method_speed
import model_peers
from method_subjects import SUBJECTS
from zeropoint.algorithms import check_methods

DOCS = Path(__file__).resolve().parents[1] / "docs" / "methods.md"


def main() -> None:
    """Measure what is asked for, and print or write the tables."""
    arguments = _arguments()
    if arguments.docs:
        for name in arguments.models:
            method_report.put(DOCS, mark(name), None)  # before hours of work
    for name in arguments.models:
        text = run(name, arguments)
        print(f"\n{name}\n\n{text}", flush=True)
        if arguments.docs:
            method_report.put(DOCS, mark(name), text)


def mark(name: str) -> str:
    """What encloses a model's table in the docs."""
    return f"bench_methods.py {name}"


def run(name: str, arguments: argparse.Namespace) -> str:
    """Measure one model; its table."""
    make, test, calibration = SUBJECTS[name]
    subject = make(arguments.test or test, arguments.calibration or calibration)
    folder = arguments.cache / name
    folder.mkdir(parents=True, exist_ok=True)
    entries = method_quality.entries(arguments.methods or method_quality.METHODS)
    peers, absent = model_peers.available(name) if arguments.peers else ([], {})
    for library, reason in absent.items():
        print(f"{library} takes no part: {reason}", file=sys.stderr)
    if arguments.speed_only:
        titles = [*(e.title for e in entries), *(p.name for p in peers)]
        rows = method_quality.read_rows(folder, titles)
        if not rows:
            sys.exit(f"{folder} holds no rows; run without --speed-only first")
    else:
        rows, failed = method_quality.measure(
            subject, entries, peers, folder, fresh=arguments.fresh
        )
        absent |= failed
    speeds = method_speed.read(folder)
    if not arguments.quality_only:
        ready = method_speed.contenders(subject, rows, peers, folder)
        speeds = method_speed.time_all(subject, ready, arguments.threads, arguments.seconds)
        method_speed.write(folder, speeds)
    text = method_report.table(subject, rows, entries, speeds)
    return text if speeds is None else f"{text}\n\n{method_report.conditions(speeds)}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("models", nargs="*", default=list(SUBJECTS), help=f"of {', '.join(SUBJECTS)}; default: all")
    add("--test", type=int, metavar="N", help="samples to test with")
    add("--calibration", type=int, metavar="N", help="samples to calibrate with, others")
    add("--methods", type=_methods, nargs="+", metavar="NAMES", help="such as: clip awq,gptq")
    add("--no-peers", dest="peers", action="store_false", help="ours alone")
    add("--fresh", action="store_true", help="measure quality again that is known")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--quality-only", action="store_true", help="time nothing")
    which.add_argument("--speed-only", action="store_true", help="quality as it was measured last")
    add("--threads", type=int, default=torch.get_num_threads(), metavar="T", help="for the times")
    add("--seconds", type=float, default=60.0, metavar="S", help="for each column of times, about")
    add("--cache", type=Path, default=Path("out/methods"), metavar="FOLDER", help="what is known")
    add("--docs", action="store_true", help="write the tables to docs/methods.md")
    arguments = parser.parse_args()
    for name in arguments.models:
        if name not in SUBJECTS:
            parser.error(f"models must be of {', '.join(SUBJECTS)}, got {name!r}")
    arguments.methods = arguments.methods and tuple(arguments.methods)
    return arguments


def _methods(text: str) -> tuple[str, ...]:
    try:
        return check_methods(tuple(text.split(",")))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


if __name__ == "__main__":
    main()
