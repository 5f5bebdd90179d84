"""The benchmarks' parts on small numbers, and the order of steps of benchmarks/gpu.py with steps that fail."""

import json
import subprocess
import sys
import time
from argparse import Namespace

import pytest
import torch
from conftest import ROOT
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import gpu, moe, targets
from benchmarks.gpu import STEPS, Step, best_backend, quick, run_all, summary
from benchmarks.machine import peak_memory, rate_steps, rates_of
from benchmarks.peers import MODELS, candidates, usable_backends
from benchmarks.report import plot, table
from benchmarks.throughput import model_work, prepare_all
from benchmarks.timing import measure, ratios_to_best
from kernels.window_attention import serves_cpu

CPU = torch.device("cpu")


def test_ratios_are_those_to_the_fastest_peer_of_each_round():
    seconds = {"ours": [1.0, 2.0, 1.0], "a": [2.0, 6.0, 4.0], "b": [4.0, 4.0, 2.0]}
    assert ratios_to_best(seconds, ["a", "b"])["ours"] == [2.0, 2.0, 2.0]
    assert ratios_to_best(seconds, ["a"])["b"] == pytest.approx([0.5, 1.5, 2.0])


def test_every_candidate_runs_in_every_round():
    counts = {"a": 0, "b": 0}

    def run(name):
        counts[name] += 1

    seconds = measure({name: lambda name=name: run(name) for name in counts}, CPU, rounds=3, repeats=4)
    assert counts == {"a": 2 + 12, "b": 2 + 12} and all(len(times) == 3 for times in seconds.values())


def test_peak_memory_is_what_is_held_at_once():
    def run():
        a = torch.empty(1_000_000)
        b = torch.empty(2_000_000)
        del a
        return b, torch.empty(500_000)

    assert peak_memory(run, CPU) == pytest.approx(12_000_000, rel=0.01)


def test_rates_are_those_of_median_times():
    seconds = {"machine: copy": [1, 9, 2], "machine: product": [8, 7, 9], "machine: linear": [4, 1, 8]}
    assert rates_of(seconds, CPU) == {"bytes_per_second": 2**28 / 2, "flops": 2**31 / 4}
    assert rate_steps(CPU, torch.float32).keys() == seconds.keys()


@pytest.mark.parametrize("name", MODELS)
def test_libraries_make_models_of_one_size(name):
    with torch.device("meta"):
        sizes = {
            library: sum(x.numel() for x in build().parameters())
            for library, build in {"ours": MODELS[name].ours, **MODELS[name].peers}.items()
            if library != "transformers" or "transformers" in candidates(MODELS[name], CPU)
        }
    # torchvision's SwinV2 keeps a bias of k, which it sets to zero.
    assert max(sizes.values()) <= 1.0002 * min(sizes.values()), sizes


def test_counted_operations_are_those_that_run():
    operations, moved = model_work(MODELS["swin_tiny"], batch=2, train=False, itemsize=4)
    with torch.device("meta"):
        model = MODELS["swin_tiny"].ours().eval()
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        model(torch.empty(2, 3, 224, 224))
    assert operations == pytest.approx(counter.get_total_flops(), rel=0.02)  # norms are counted here, not there
    assert model_work(MODELS["swin_tiny"], 2, True, 4) == (3 * operations, 3 * moved)
    assert model_work(MODELS["swin_tiny"], 2, False, 2)[1] == moved / 2


def test_a_candidate_that_fails_is_named_and_the_others_run():
    def broken():
        raise RuntimeError("out of\nluck")

    def build():
        return nn.Sequential(nn.Flatten(), nn.Linear(12, 1000))

    args = Namespace(train=True, compile=False, dtype="fp32")
    ready, failed = prepare_all({"broken": broken, "fine": build}, torch.randn(2, 3, 2, 2), args)
    assert failed == {"broken": "RuntimeError: out of luck"} and list(ready) == ["fine"]
    assert ready["fine"].own() == pytest.approx(3 * 13_000 * 4, rel=0.01)  # AdamW keeps two numbers for each


def test_only_backends_that_serve_this_device_are_timed():
    assert usable_backends(CPU)[:3] == ["auto", "reference", "sdpa"]
    assert ("fused" in usable_backends(CPU)) == serves_cpu(torch.float32)


def test_a_result_is_a_table_and_a_plot():
    row = {
        **{"candidate": "ours, auto", "images_per_second": 30.0, "ratio_to_best_peer": 2.0},
        **{"ratio_quartiles": [1.5, 2.5], "peak_bytes": 2**30, "share_of_products": 0.5, "share_of_copies": 0.25},
    }
    result = {
        **{"model": "Swin-T", "mode": "inference", "dtype": "bf16", "compiled": True, "batch": 8, "machine": "M"},
        **{"versions": "V", "date": "D", "rounds": 3, "peers": ["timm"], "left_out": {"torchvision": "no"}},
        **{"flops": 1e12, "bytes_per_second": 1e10, "rows": [row, {**row, "candidate": "timm", "peak_bytes": None}]},
    }
    text = table(result)
    assert text.startswith("# Swin-T, inference, compiled, bf16, batch 8\n")
    assert "| ours, auto | 30.0 | 2.000 | 1.500 to 2.500 | 1024 | 50% | 25% |" in text
    assert "| timm | 30.0 | 2.000 | 1.500 to 2.500 | – | 50% | 25% |" in text  # not counted
    assert "products of 1.00 TFLOP/s, copies of 10 GB/s" in text and "Left out: torchvision: no" in text
    assert "auto" not in text.splitlines()[2]
    took = table({**result, "auto_took": {"fused": 5, "sdpa": 2}}).splitlines()[2]
    assert took.endswith("Of the kinds of call that auto tried it took fused in 5, sdpa in 2.")
    colors = {color for _, color in plot(result).getcolors(1 << 20)}
    assert (0x2A, 0x6F, 0x97) in colors and (0xB5, 0x65, 0x1D) in colors


def test_steps_that_fail_or_hang_are_reported_and_the_next_run(tmp_path):
    began = time.monotonic()
    outcomes = run_all(
        [
            Step("fails", ("-c", "import sys; print('the reason'); sys.exit(3)"), 60),
            Step("hangs", ("-c", "import time; print('begun', flush=True); time.sleep(100)"), 4),
            Step("works", ("-c", "import sys; assert '--output' in sys.argv; print('fine')"), 60),
        ],
        tmp_path,
        minutes=1,
    )
    assert [each.verdict for each in outcomes] == ["failed, code 3", "stopped after its 4 seconds", "done"]
    assert time.monotonic() - began < 60
    text = (tmp_path / "gpu.md").read_text()
    assert text == summary(outcomes) and "the reason" in text and "begun" in text and "fine" not in text


def test_what_a_stopped_step_has_started_ends_with_it(tmp_path):
    child = f"import time, pathlib; time.sleep(6); pathlib.Path({str(tmp_path / 'alive')!r}).touch()"
    parent = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(100)"
    run_all([Step("starts another", ("-c", parent), 3)], tmp_path, minutes=1)
    time.sleep(5)
    assert not (tmp_path / "alive").exists()


def test_no_step_begins_when_the_time_is_over(tmp_path):
    outcomes = run_all([Step("late", ("-c", "raise SystemExit(1)"), 60)], tmp_path, minutes=0)
    assert outcomes[0].verdict == "not run: no time left"


def test_profiles_take_the_backend_that_was_fastest(tmp_path):
    step = next(step for step in STEPS if step.name == "profile training")
    assert best_backend(step, tmp_path) == ()
    rows = '{"rows": [{"candidate": "timm"}, {"candidate": "ours, fused"}, {"candidate": "ours, auto"}]}'
    (tmp_path / "throughput-swin_tiny-cuda-train-bf16-b128.json").write_text(rows)
    assert best_backend(step, tmp_path) == ("--backend", "fused")
    assert best_backend(STEPS[1], tmp_path) == ()


def test_targets_are_met_missed_or_not_measured(tmp_path):
    assert targets.section(tmp_path) == ""
    rows = [
        {"candidate": "ours, fused", "images_per_second": 9500.0, "ratio_to_best_peer": 1.49, "peak_bytes": 7.0},
        {"candidate": "ours, auto", "images_per_second": 9000.0, "ratio_to_best_peer": 1.4, "peak_bytes": 9.0},
        {"candidate": "timm", "images_per_second": 6000.0, "ratio_to_best_peer": 1.0, "peak_bytes": 10.0},
    ]
    path = tmp_path / "throughput-swin_tiny-cuda-train-compiled-bf16-b128.json"
    path.write_text(json.dumps({"rows": rows}))
    text = targets.section(tmp_path)
    assert "| Swin-T training, images/s | at least 9500 | 9500 | met |" in text
    assert "| Swin-T training, compiled, times the fastest peer | at least 1.50 | 1.49 | missed |" in text
    assert "| Swin-T training, compiled, peak memory as a share of timm's | at most 0.70 | 0.70 | met |" in text
    assert "| Swin-T training, eager, peak memory as a share of timm's | at most 0.70 | - | not measured |" in text
    assert "| Swin-B inference, images/s | at least 12000 | - | not measured |" in text
    path.write_text(json.dumps({"rows": rows[:2]}))  # without a peer the ratio is to ourselves
    assert "times the fastest peer | at least 1.50 | - | not measured |" in targets.section(tmp_path)


def test_the_quick_run_has_every_kind_of_step():
    small = {step.name for step in quick(STEPS)}
    assert small == {step.name for step in STEPS if "compiled" not in step.name and "Swin-B" not in step.name}
    assert sum(step.limit for step in STEPS[:8]) < 600  # what is not compiled fits into ten minutes


def test_unknown_steps_are_named():
    result = subprocess.run(
        [sys.executable, gpu.__file__, "--only", "bogus"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (
        result.returncode == 2 and "--only bogus: choose from tests, kernels, eager Swin-T inference" in result.stderr
    )


@pytest.mark.slow
def test_the_quick_run_makes_every_table(tmp_path):
    command = [sys.executable, gpu.__file__, "--quick", "--output", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr
    kinds = {path.name.split("-")[0] for path in tmp_path.glob("*.md")}
    assert kinds == {"gpu.md", "kernels", "throughput", "profile", "moe"}
    assert len(list(tmp_path.glob("throughput-*.png"))) == 2 and len(list(tmp_path.glob("profile-*.md"))) == 2


@pytest.mark.parametrize("inference", [True, False])
def test_experts_are_timed_without_tutel(monkeypatch, inference):
    """Where it cannot be imported, and where what it gives cannot be used."""
    args = Namespace(dim=16, top=2, dtype="fp32", inference=inference, rounds=2, repeats=1)
    for layer, reason in ((None, "pip install"), (lambda *settings: nn.Linear(16, 16), "l_aux")):
        monkeypatch.setitem(sys.modules, "tutel", None)
        if layer:
            monkeypatch.setattr(moe, "tutel_layer", layer)
        rows, lacking = moe.compare(args, 8, 4, CPU)
        assert reason in lacking and "\n" not in lacking
        assert [row["candidate"] for row in rows] == ["capacity", "dropless", moe.LOOP, "dense MLP"]
        assert all((row["kept_megabytes"] is None) == inference for row in rows)
