"""The main job, from end to end: ``make demo`` runs this."""

from __future__ import annotations

import argparse
from pathlib import Path

import digits
import minilm
from tools import console, machine


def main() -> None:
    """Digits in seconds, then a real sentence encoder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for what is written")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of timing for MiniLM")
    parser.add_argument("--sentences", type=int, default=512, help="that MiniLM embeds")
    arguments = parser.parse_args()
    out = console()
    out.print(machine())
    out.rule("1. Trained here: handwritten digits")
    digits.main(out)
    out.rule("2. Pretrained: a sentence encoder")
    minilm.main(arguments.out, arguments.rounds, arguments.sentences, out)


if __name__ == "__main__":
    main()
