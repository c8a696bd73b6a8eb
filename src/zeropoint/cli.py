"""The command line: arguments and printing. ``zeropoint --help`` tells the rest.

Exit codes: 0 done; 1 something given was wrong, or ``doctor`` found an error: one line on stderr
says what; 2 the command line itself was wrong.
"""

from __future__ import annotations

import io
import json
import sys
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tqdm import tqdm
from typer.core import TyperGroup

from . import bench as bench_
from . import doctor as doctor_
from . import limits as limits_
from . import sources
from .algorithms import METHODS
from .commands.compare import compare
from .commands.convert import convert
from .commands.diagnose import diagnose
from .commands.explain import explain
from .commands.loading import load as _load
from .commands.options import BatchSize, Exclude, Include, Limit, MaxTokens, To
from .commands.printing import check_writable as _check_writable
from .commands.printing import console as _console
from .commands.printing import error as _error
from .commands.printing import table as _table
from .commands.printing import warn as _warn
from .commands.printing import warn_if_reference as _warn_if_reference
from .commands.printing import write_json as _write_json
from .commands.rescue import rescue
from .commands.search import search
from .formats import native
from .quantize import quantize as quantize_model
from .quantize_folder import quantize_folder
from .recipes import TABLES
from .running import model_bytes
from .terminal import size


class _Commands(TyperGroup):
    """Turns what the library raises into one line and an exit code, for every command."""

    def main(self, args: Any = None, **extra: Any) -> Any:  # type: ignore[override]
        args = list(sys.argv[1:] if args is None else args)
        debug = "--debug" in args
        if debug:  # anywhere on the line
            args.remove("--debug")
        if not extra.pop("standalone_mode", True):
            return super().main(args, standalone_mode=False, **extra)
        try:
            code = super().main(args, standalone_mode=False, **extra)
        except typer.Abort:
            code = 130
        except Exception as error:
            # typer's usage errors know their exit code and text; they are of one class in typer's
            # own copy of click and of another in click itself.
            if hasattr(error, "exit_code") and hasattr(error, "format_message"):
                command = getattr(getattr(error, "ctx", None), "command_path", "zeropoint")
                _error(f"{error.format_message()} ({command} --help tells how)")
                sys.exit(error.exit_code)
            if debug:
                raise
            expected = isinstance(error, ValueError | TypeError | OSError | ImportError)
            text = str(error) if expected and str(error) else f"{type(error).__name__}: {error}"
            _error(text)
            sys.exit(1)
        sys.exit(code or 0)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done · 1 an error, told in one line on stderr · 2 wrong usage.",
)

Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write JSON here too.")]


def _version(value: bool) -> None:
    if value:
        typer.echo(f"zeropoint {doctor_.version('zeropoint') or '(not installed)'}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error. Goes anywhere.")
    ] = False,
) -> None:
    """Linear layers in 8-bit integers: quantize a model, and see what it cost and brought."""


@app.command(no_args_is_help=True)
def quantize(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A Hugging Face folder; or package.module:factory, a callable that returns an "
            "nn.Module; or a .safetensors file, whose 2-D weights are streamed one at a time.",
        ),
    ],
    to: To,
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            metavar="OUT",
            help="The checkpoint to write, FILE.safetensors; of a folder also another folder, for "
            "transformers.",
        ),
    ],
    calibrate: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Data that int8-static and some methods need: .safetensors, .npz, .npy, or lines "
            "of .txt.",
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="How the integers are found, instead of rounding to nearest: one or more, with "
            f"commas, of {', '.join(METHODS)}.",
        ),
    ] = None,
    embeddings: Annotated[
        str | None,
        typer.Option(
            metavar="BITS", help=f"Quantize embedding tables too: {' or '.join(TABLES)}, by row."
        ),
    ] = None,
    include: Include = None,
    exclude: Exclude = None,
    batch_size: BatchSize = 32,
    limit: Limit = None,
    max_tokens: MaxTokens = 128,
    restart: Annotated[
        bool,
        typer.Option("--restart", help="Of a folder: do not go on with what was left unfinished."),
    ] = False,
) -> None:
    """Quantize a model's Linear layers, and embeddings if asked; write one .safetensors file.

    A folder is quantized block by block, and may be larger than memory. If it is interrupted, the
    same command goes on.

    zeropoint quantize ./all-MiniLM-L6-v2 --to int8-dynamic --out minilm.safetensors
    """
    recipe = sources.load_recipe(to)
    if method is not None:
        try:
            recipe = recipe.with_method(tuple(name.strip() for name in method.split(",")))
        except ValueError as error:
            raise typer.BadParameter(f"--method: {error}") from error
    if embeddings is not None:
        if embeddings not in TABLES:
            raise typer.BadParameter(
                f"--embeddings must be one of {', '.join(TABLES)}, got {embeddings!r}"
            )
        recipe = replace(recipe, embeddings=TABLES[embeddings])
    needs_data = sources.needs_calibration(recipe)
    if needs_data and calibrate is None:
        by = "" if method is None else f" --method {method}"
        raise typer.BadParameter(f"--to {to}{by} needs --calibrate FILE")
    patterns: dict[str, Any] = {"include": include or None, "exclude": exclude or None}
    rows: dict[str, Any] = {"batch_size": batch_size, "limit": limit, "max_tokens": max_tokens}
    if Path(model).is_dir():
        summary: Any = quantize_folder(
            model, out, recipe, calibration=calibrate, **patterns, **rows, resume=not restart
        )
        typer.echo(str(summary))
        _tell_sizes(out, sum(file.stat().st_size for file in Path(model).glob("*.safetensors")))
        return
    _check_writable("--out", out)
    if sources.is_tensor_file(model):
        if calibrate is not None or needs_data:
            raise ValueError(f"MODEL {model!r} is a file of tensors, which cannot be calibrated")
        summary = native.quantize_file(model, out, recipe, **patterns)
        typer.echo(str(summary))
        if not summary.quantized and not summary.embeddings:
            _warn(f"nothing was quantized; {out} holds the same floats")
        _tell_sizes(out, Path(model).stat().st_size)
        return
    loaded = _load(model)
    data = None
    if calibrate is not None:
        data = sources.load_data(calibrate, loaded, **rows)
    before = model_bytes(loaded.model)
    quantized = quantize_model(loaded.model, recipe, calibration=data, inplace=True, **patterns)
    summary = quantized.quantization
    typer.echo(str(summary))
    if not summary.quantized and not summary.embeddings:
        raise ValueError(f"nothing was quantized, so {out} was not written")
    native.save(quantized, out)
    _tell_sizes(out, before)


@app.command(no_args_is_help=True)
def inspect(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A checkpoint of zeropoint.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    verify: Annotated[
        bool, typer.Option(help="Read all data and compare it with its checksums.")
    ] = True,
) -> None:
    """Show what is in a checkpoint: header, layers, tensors. No model needed."""
    content = native.inspect(file, verify=verify)
    if as_json:
        typer.echo(json.dumps(content.to_dict(), indent=2))
        return
    console = _console()
    console.print(
        f"{file}: zeropoint checkpoint, version {content.version}, {size(content.file_bytes)}, "
        f"checksums {'verified' if content.verified else 'not verified'}",
        soft_wrap=True,
    )
    for key, value in content.metadata.items():
        console.print(f"{key}: {value}", soft_wrap=True)
    layers = _table("quantized layer", "mode", "weight", "in × out", "bias", "bytes")
    own: set[str] = set()
    for name, layer in content.layers.items():
        names = [f"{name}.{key}" if name else key for key in layer.tensors()]
        own.update(names)
        count = sum(content.tensors[n].nbytes for n in names if n in content.tensors)
        if isinstance(layer, native.EmbeddingInfo):
            what, bias = "embedding", ""
            shape = f"{layer.num_embeddings} × {layer.embedding_dim}"
        else:
            what, bias = layer.mode, "yes" if layer.bias else "no"
            shape = f"{layer.in_features} × {layer.out_features}"
        groups = "" if layer.group_size is None else f" by {layer.group_size}"
        weight = f"{layer.bits} bits{groups}"
        layers.add_row(name or "(the model)", what, weight, shape, bias, size(count))
    tensors = _table("other tensor", "dtype", "shape", "bytes")
    for name, t in content.tensors.items():
        if name not in own:
            tensors.add_row(name, t.dtype, " × ".join(map(str, t.shape)), size(t.nbytes))
    for name, source in content.aliases.items():
        tensors.add_row(name, "", f"is {source}", "")
    for table in (layers, tensors):
        if table.row_count:
            console.print()
            console.print(table)


@app.command()
def bench(
    shapes: Annotated[
        str, typer.Option(metavar="KxN,...", help="Inputs × outputs of the layers.")
    ] = ",".join(f"{k}x{n}" for k, n in bench_.SHAPES),
    rows: Annotated[str, typer.Option(metavar="M,...", help="Rows of input a call.")] = ",".join(
        map(str, bench_.ROWS)
    ),
    threads: Annotated[
        str | None, typer.Option(metavar="T,...", help="Thread counts; by default torch's.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.01, help="Time for each line.")] = 1.0,
    limits: Annotated[
        bool,
        typer.Option("--limits", help="Only measure what this CPU could do at best, in all ISAs."),
    ] = False,
    json_file: Json = None,
) -> None:
    """Time a Linear layer in each precision on this machine, in turn with torch's own.

    Each time comes with the fraction that was reached of the limit that binds it: the CPU's
    arithmetic, or the reading of the weights from where they lie.
    """
    pairs = [_shape(text) for text in shapes.split(",")]
    row_counts = _numbers("--rows", rows)
    thread_counts = None if threads is None else _numbers("--threads", threads)
    _check_writable("--json", json_file)
    _warn_if_reference()
    if limits:
        measured = limits_.measure(thread_counts, seconds=seconds / 50)
        facts = doctor_.facts()
        _console().print(facts.cpu, *limits_.table(measured), sep="\n\n")
        _write_json(json_file, {"machine": facts.to_dict(), "limits": measured.to_dict()})
        return
    found = None
    if limits_.available():
        counts = [torch.get_num_threads()] if thread_counts is None else thread_counts
        sizes = bench_.weight_sizes(pairs)
        found = limits_.measure(counts, sizes=sizes, seconds=seconds / 200)
    results = list(
        tqdm(
            bench_.bench(pairs, row_counts, thread_counts, seconds=seconds, limits=found),
            total=len(pairs) * len(row_counts) * len(thread_counts or [0]),
            disable=not sys.stderr.isatty(),
            delay=2,
            leave=False,
        )
    )
    facts = doctor_.facts()
    console = _console()
    console.print(bench_.table(results))
    console.print(
        "µs a call, medians; % = what was reached of the limit that binds, the CPU's arithmetic or "
        f"reading the weights; × = how many times faster int8-dynamic is.\n{facts.cpu}, "
        f"{facts.active_isa}, torch {facts.versions['torch']}"
    )
    for name, note in {n: t for r in results for n, t in r.notes.items()}.items():
        console.print(f"{name}: {note}")
    content = {"machine": facts.to_dict(), "results": [r.to_dict() for r in results]}
    _write_json(json_file, content | {"limits": None if found is None else found.to_dict()})


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show which instruction sets, kernel, threads and versions are in use, and what to improve.

    Exit code 1 where the C++ core is missing or wrong.
    """
    facts = doctor_.facts()
    advice = doctor_.advice(facts)
    if as_json:
        content = facts.to_dict() | {"ok": facts.ok, "advice": [asdict(a) for a in advice]}
        typer.echo(json.dumps(content, indent=2))
    else:
        console = _console()
        console.print(doctor_.table(facts))
        styles = {"error": "bold red", "warning": "yellow", "note": ""}
        for a in advice:
            label = a.level.upper() if a.level == "error" else a.level
            text = f"\n{label}: {a.text}"
            # Into a pipe, one line each: for grep, and to copy commands from.
            console.print(text, style=styles[a.level], soft_wrap=not console.is_terminal)
        if not advice:
            console.print("\nAll is well.")
    if not facts.ok:
        _error(next(a.text for a in advice if a.level == "error").split(". ")[0])
        raise typer.Exit(1)


app.command(no_args_is_help=True)(compare)
app.command(no_args_is_help=True)(convert)
app.command(no_args_is_help=True)(diagnose)
# Unknown options are left to the command, since −1.0 looks like one.
app.command(no_args_is_help=True, context_settings={"ignore_unknown_options": True})(explain)
app.command(no_args_is_help=True)(rescue)
app.command(no_args_is_help=True)(search)


def main() -> None:
    """The entry point of the ``zeropoint`` command."""
    warnings.showwarning = _show_warning
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # × and µ are no reason to fail where ASCII rules
            stream.reconfigure(errors="replace")
    app(prog_name="zeropoint")


def _show_warning(message: Any, *_where: Any, **_more: Any) -> None:
    _warn(message)


def _tell_sizes(out: Path, before: int) -> None:
    files = out.glob("*.safetensors") if out.is_dir() else [out]
    after = sum(file.stat().st_size for file in files)
    typer.echo(f"Wrote {out}: {size(after)}, from {size(before)} ({after / before:.0%}).")


def _numbers(option: str, text: str, separator: str = ",", example: str = "1,16") -> list[int]:
    parts = text.lower().split(separator)
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise typer.BadParameter(f"{option} takes numbers such as {example}, got {text!r}")
    return [int(part) for part in parts]


def _shape(text: str) -> tuple[int, int]:
    match _numbers("--shapes", text, "x", "768x3072"):
        case [k, n]:
            return k, n
    raise typer.BadParameter(f"--shapes takes KxN,... such as 768x3072, got {text!r}")
