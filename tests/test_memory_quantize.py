"""A model from a folder is quantized within memory that does not grow with its blocks."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers")

import memory_quantize as benchmark

MIB = 2**20
FEW, MANY, SIZE = 4, 20, 512

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")


def test_peak_does_not_grow_with_the_number_of_blocks(tmp_path: Path) -> None:
    recipe = "int8-dynamic:bias-correction"  # quick, and looks at data
    sizes, peaks = [], []
    for blocks in (FEW, MANY):
        folder = tmp_path / str(blocks)
        folder.mkdir()
        sizes.append(benchmark.write_model(folder / "model", blocks, SIZE))
        # What is freed goes back at once, so that the same is counted each time.
        malloc = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
        peak, _ = benchmark.measure(folder / "model", "folder", recipe, 2, 32, **malloc)
        peaks.append(peak)
    # A quarter is what the integers alone would take, were they held.
    held = (sizes[1] - sizes[0]) / 4
    assert held > 40 * MIB
    assert peaks[1] - peaks[0] < held / 2, [peak // MIB for peak in peaks]
