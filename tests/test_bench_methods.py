"""bench_methods: what is known is not measured again, and the table says what was measured."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import bench_methods
import method_quality
import method_report
import method_speed
import method_subjects
import model_peers
import zeropoint
from method_quality import Entry, Row
from method_subjects import Case, Subject
from model_peers import Contender, ModelPeer, torchao_

GPTQ = zeropoint.get_recipe("int4").with_method("gptq")
ENTRIES = [
    Entry("float32", None),
    Entry("int4", zeropoint.get_recipe("int4")),
    Entry("int4", GPTQ),
]


def small(seed: int = 0) -> Subject:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    x = torch.randn(64, 32) @ torch.randn(32, 32)
    test, data = [x[::2]], [x[1::2]]

    @torch.no_grad()
    def scores(other: Any) -> torch.Tensor:
        return nn.functional.cosine_similarity(model(test[0]), other(test[0])).double()

    cases = (Case("many", 1000), Case("one", 0))
    return Subject(
        "small", model, data, test, scores, "mean cosine", 1, float, cases,
        lambda m: {"many": lambda: m(test[0]), "one": lambda: m(test[0][:1])},
    )  # fmt: skip


def test_rows_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, failed = method_quality.measure(small(), ENTRIES, [], tmp_path)
    assert [row.title for row in rows] == ["float32", "int4", "int4: gptq"]
    assert not failed
    assert rows[0].bytes > 2 * rows[1].bytes == 2 * rows[2].bytes
    assert method_quality.read_rows(tmp_path, ["int4: gptq", "other"]) == [rows[2]]
    quantized: list[str] = []
    quantize = zeropoint.quantize

    def watched(model: nn.Module, recipe: zeropoint.Recipe, **more: Any) -> nn.Module:
        quantized.append(str(recipe.default))
        return quantize(model, recipe, **more)

    monkeypatch.setattr(zeropoint, "quantize", watched)
    assert method_quality.measure(small(), ENTRIES, [], tmp_path)[0] == rows
    assert not quantized
    changed = [*ENTRIES[:2], Entry("int4", GPTQ.with_method(("gptq", "bias-correction")))]
    method_quality.measure(small(), changed, [], tmp_path)
    assert len(quantized) == 1
    renamed = [
        *ENTRIES[:2],
        Entry("int4", zeropoint.get_recipe("int8-dynamic").with_method("gptq")),
    ]
    method_quality.measure(small(), renamed, [], tmp_path)
    assert len(quantized) == 2
    method_quality.measure(small(seed=1), ENTRIES, [], tmp_path)  # other data
    assert len(quantized) == 4
    method_quality.measure(small(seed=1), ENTRIES, [], tmp_path, fresh=True)
    assert len(quantized) == 6
    monkeypatch.setattr(method_quality, "fingerprint", lambda: "other code")
    method_quality.measure(small(seed=1), ENTRIES, [], tmp_path)
    assert len(quantized) == 8


def test_checkpoint_holds_the_model_that_was_scored(tmp_path: Path) -> None:
    subject = small()
    rows, _ = method_quality.measure(subject, ENTRIES, [], tmp_path)
    for row in rows:
        model = method_quality.load(subject, tmp_path, row.title)
        assert tuple(subject.scores(model).tolist()) == row.scores
    assert len({row.scores for row in rows}) == 3


def test_titles_have_files_of_their_own() -> None:
    titles = [entry.title for entry in method_quality.entries()]
    titles += [peer.name for module in model_peers.MODULES.values() for peer in module.PEERS]
    files = {method_quality.checkpoint(Path(), title) for title in titles}
    assert len(files) == len(set(titles))
    assert len({e.title for e in method_quality.entries()}) == len(method_quality.entries())


def test_peer_that_fails_is_told_and_the_others_go_on(tmp_path: Path) -> None:
    subject = small()

    def broken(_: Subject, __: Path) -> Contender:
        raise RuntimeError("no kernel\nfor this")

    def lost(_: Subject, __: Path) -> Contender:
        return Contender(1, lambda: torch.tensor([float("nan")]), lambda threads: {})

    def good(subject: Subject, _: Path) -> Contender:
        scores, calls = subject.scores(subject.model), subject.calls(subject.model)
        return Contender(5, lambda: scores, lambda threads: calls)

    peers = [
        ModelPeer(name, "small", "1", prepare)
        for name, prepare in (("broken", broken), ("lost", lost), ("good", good))
    ]
    rows, failed = method_quality.measure(subject, ENTRIES[:1], peers, tmp_path)
    assert [row.title for row in rows] == ["float32", "good"]
    assert failed == {"broken": "no kernel", "lost": "its results are not finite"}
    ready = method_speed.contenders(subject, rows, peers, tmp_path)
    assert list(ready) == ["float32", "good"]


def test_one_of_each_form_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = small()
    rows, _ = method_quality.measure(subject, ENTRIES, [], tmp_path)
    loaded: list[str] = []
    load = method_quality.load
    monkeypatch.setattr(method_quality, "load", lambda *a: (loaded.append(a[2]), load(*a))[1])
    ready = method_speed.contenders(subject, rows, [], tmp_path)
    assert list(ready) == loaded == ["float32", "int4"]
    threads = torch.get_num_threads()
    speeds = method_speed.time_all(subject, ready, 1, 0.01)
    assert torch.get_num_threads() == threads
    assert speeds["threads"] == 1
    for case in ("many", "one"):
        for times in speeds["cases"][case]["forms"].values():
            assert 0 < times["low"] <= times["us"] <= times["high"]
            assert times["n"] >= 5
    method_speed.write(tmp_path, speeds)
    assert method_speed.read(tmp_path) == speeds


def test_forms_are_what_layers_compute() -> None:
    forms = {entry.title: entry.form for entry in method_quality.entries()}
    assert forms["int4: clip"] == forms["int4: gptq, bias-correction"] == forms["int4"] == "int4"
    assert forms["int4: smooth"] == forms["int4: awq, gptq"] == "int4, input scaled"
    assert forms["int4: smooth, hadamard, gptq"] == forms["int4: hadamard"]
    assert len(set(forms.values())) == 13


def test_table_is_best_first_with_ratios_to_float32() -> None:
    good, fair, bad = ((x, x - 0.01, *[x] * 20) for x in (1.0, 0.9, 0.8))
    rows = [
        Row("float32", "float32", good, 4_000_000, 0.0),
        Row("int4", "int4", bad, 1_000_000, 0.1),
        Row("int4: gptq", "int4", fair, 1_000_000, 0.2),
        Row("peer", "peer", (0.85,) * 22, 2_000_000, 0.0),
    ]
    forms = {"float32": {"us": 4000.0}, "int4": {"us": 1000.0}}
    cases = {name: {"forms": forms, "foreign": 0.0, "steal": 0.0} for name in ("many", "one")}
    speeds = {"machine": "a CPU\nwarning: b", "threads": 1, "cases": cases}
    lines = method_report.table(small(), rows, ENTRIES, speeds).splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:]] == [
        "float32", "int4", "peer", "int4",
    ]  # fmt: skip
    assert lines[0].endswith("MB | many, tokens/s | × float32 | one, ms | × float32 |")
    assert lines[3].startswith("| int4 | gptq | 0.8995 | ")
    assert lines[3].endswith(" | better | 1.0 | 1,000,000 | 4.00 | 1.00 | 4.00 |")
    assert lines[4].endswith(" |  | 2.0 |  |  |  |  |")
    assert lines[2].endswith(" | 250,000 | 1.00 | 4.00 | 1.00 |")
    assert len({line.count("|") for line in lines}) == 1
    assert method_report.conditions(speeds) == "Speeds: a CPU."
    cases["one"]["foreign"] = 0.5
    assert "one (0.5)" in method_report.conditions(speeds)
    assert "many (" not in method_report.conditions(speeds)
    alone = method_report.table(small(), rows, ENTRIES, None)
    assert "× float32" not in alone


def test_lower_is_better_for_losses() -> None:
    losses = replace(small(), measure="perplexity", better=-1)
    rows = [
        Row("float32", "float32", (2.0,) * 20, 4, 0.0),
        Row("int4", "int4", tuple(3.0 + i / 100 for i in range(20)), 1, 0.0),
        Row("int4: gptq", "int4", tuple(3.5 + i / 90 for i in range(20)), 1, 0.0),
    ]
    lines = method_report.table(losses, rows, ENTRIES, None).splitlines()
    assert "| gptq |" in lines[4]
    assert "| worse |" in lines[4]


def test_table_takes_its_place_in_the_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- t: begin -->\nold\n<!-- t: end -->\n<!-- u: begin --><!-- u: end -->b")
    method_report.put(page, "t", "new")
    method_report.put(page, "u", "more")
    method_report.put(page, "u", None)
    assert page.read_text() == (
        "a\n<!-- t: begin -->\nnew\n<!-- t: end -->\n<!-- u: begin -->\nmore\n<!-- u: end -->b"
    )
    for text in ("", "<!-- v: end --><!-- v: begin -->", "<!-- v: begin -->"):
        page.write_text(text)
        with pytest.raises(ValueError, match="each once"):
            method_report.put(page, "v", "new")


def test_docs_have_a_place_for_each_model() -> None:
    for name in method_subjects.SUBJECTS:
        method_report.put(bench_methods.DOCS, bench_methods.mark(name), None)


def test_speeds_alone_need_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(bench_methods.SUBJECTS, "minilm", (lambda test, data: small(), 1, 1))
    line = ["x", "minilm", "--no-peers", "--cache", str(tmp_path), "--seconds", "0.01"]
    monkeypatch.setattr(sys, "argv", [*line, "--speed-only"])
    with pytest.raises(SystemExit, match="without --speed-only first"):
        bench_methods.main()


def test_one_command_makes_the_table(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(bench_methods.SUBJECTS, "minilm", (lambda test, data: small(), 1, 1))
    monkeypatch.setattr(bench_methods, "DOCS", tmp_path / "page.md")
    mark = bench_methods.mark("minilm")
    bench_methods.DOCS.write_text(f"<!-- {mark}: begin -->\n<!-- {mark}: end -->\n")
    line = ["x", "minilm", "--no-peers", "--cache", str(tmp_path), "--seconds", "0.01"]
    monkeypatch.setattr(sys, "argv", [*line, "--threads", "1", "--methods", "hqq", "--docs"])
    bench_methods.main()
    page = bench_methods.DOCS.read_text()
    assert "| int4 | hqq | 0.9" in page
    assert "Speeds: " in page
    assert page.splitlines()[1] in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*line, "--methods", "hqq", "--speed-only"])
    monkeypatch.setattr(method_quality, "measure", lambda *a, **k: pytest.fail("measured"))
    bench_methods.main()
    assert "| int4 | hqq | 0.9" in capsys.readouterr().out


@given(st.integers(0, 40), st.integers(1, 40), st.integers(1, 40))
def test_nothing_is_tested_that_was_calibrated_with(spare: int, test: int, data: int) -> None:
    count = spare + test + data
    tested, calibrated = method_subjects.spread_out(count, test, data)
    assert (len(tested), len(calibrated)) == (test, data)
    every = sorted([*tested, *calibrated])
    assert every[0] == 0
    assert every[-1] == count - 1
    assert len(set(every)) == len(every)
    with pytest.raises(ValueError, match="at most"):
        method_subjects.spread_out(test + data - 1, test, data)


def test_writer_writes_what_generate_does_each_time() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 50, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = transformers.LlamaConfig(**sizes, **heads, eos_token_id=None)
    model = transformers.LlamaForCausalLM(config).eval()
    prompt = torch.arange(7)[None]
    count = method_subjects.WRITTEN
    with torch.inference_mode():
        expected = model.generate(prompt, max_new_tokens=count + 1, do_sample=False)[0, 7:]
        writer = method_subjects.Writer(model, prompt)
        first, again = writer(), writer()
    assert len(set(first)) > 1
    assert first == again == expected[1:].tolist()
    assert writer.cache.get_seq_length() == 7


def test_torchao_is_counted_by_what_it_stores() -> None:
    plain = nn.Linear(64, 32)
    assert torchao_.stored_bytes(plain) == 4 * (64 * 32 + 32)
    tied = nn.ModuleList([nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)])
    tied[1].weight = tied[0].weight
    assert torchao_.stored_bytes(tied) == 4 * 64
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(plain, quantization.Int8WeightOnlyConfig())
    assert 64 * 32 + 4 * 32 <= torchao_.stored_bytes(plain) <= 64 * 32 + 4 * 3 * 32
