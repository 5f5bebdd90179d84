"""models/trial.py: when a faster backend is taken, and when nothing is tried. Times are given here, never measured."""

import logging
import re
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from conftest import fill, golden_images
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from kernels.window_attention import geometry, reference
from models import attention, trial
from models.attention import set_attention_backend, window_attention
from models.layers import window_mask
from models.swin_transformer import SwinTransformer
from models.trial import Call, fastest

CPU = torch.device("cpu")
draw = trial._draw
CALL = Call(
    **{"device": CPU, "dtype": torch.float32, "bias_dtype": torch.float32, "shape": (2, 4, 4, 24), "num_heads": 2},
    **{"window": (2, 2), "shift": (1, 1), "masked": True, "cosine": False, "scale": 0.5},
    **{"needs_grad": True, "autocast": False, "compiled": False},
)


class Clock:
    """Says that each backend takes the milliseconds given, and keeps what it was asked to time."""

    def __init__(self, **milliseconds: float):
        self.milliseconds, self.asked = milliseconds, []

    def __call__(self, passes: trial.Passes) -> dict[str, float]:
        self.asked.append(sorted(passes))
        for run in passes.values():
            run()
        return {name: self.milliseconds[name] for name in passes}


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock(sdpa=1.0, fused=0.9)
    monkeypatch.setitem(trial.CLOCKS, "cpu", clock)
    monkeypatch.setattr(trial, "CHOSEN", {})
    monkeypatch.setattr(trial.logger, "propagate", True)  # whatever log a test before has made
    return clock


class Attend:
    """PyTorch's attention under any name; ``fused`` differs by a factor, or raises what it is given."""

    def __init__(self, factor: float = 1.0, error: Exception | None = None):
        self.factor, self.error, self.calls = factor, error, []

    def __call__(self, qkv: Tensor, bias: Tensor, mask: Tensor | None, *, backend: str, **sizes) -> Tensor:
        self.calls.append((backend, sizes["shift_size"], sizes["logit_scale"] is not None, qkv.requires_grad))
        if backend == "fused" and self.error:
            raise self.error
        out = window_attention(qkv, bias, mask, **sizes, backend="sdpa")
        return out * self.factor if backend == "fused" else out


@pytest.mark.parametrize("milliseconds, name", [(0.5, "fused"), (0.95, "fused"), (0.96, "sdpa"), (2.0, "sdpa")])
def test_a_rival_is_taken_where_it_is_faster_by_the_margin(clock, milliseconds, name):
    clock.milliseconds["fused"] = milliseconds
    assert fastest(Attend(), CALL, "sdpa", ("fused",)) == name


def test_the_fastest_of_several_is_taken(clock):
    clock.milliseconds |= {"window_process": 0.7}
    assert fastest(window_attention, CALL, "sdpa", ("window_process",)) == "window_process"
    assert fastest(Attend(), CALL, "sdpa", ("fused", "window_process")) == "window_process"
    assert clock.asked == [["sdpa", "window_process"], ["fused", "sdpa", "window_process"]]


@pytest.mark.parametrize("needs_grad", [True, False])
@pytest.mark.parametrize("factor", [1.01, 0.0, float("nan"), float("inf")])
def test_a_rival_that_is_wrong_is_not_even_timed(clock, caplog, factor, needs_grad):
    caplog.set_level(logging.INFO)
    clock.milliseconds["fused"] = 0.1
    assert fastest(Attend(factor), replace(CALL, needs_grad=needs_grad), "sdpa", ("fused",)) == "sdpa"
    assert not clock.asked and "sdpa is taken (fused differs by " in caplog.text


def test_wrong_gradients_are_seen(clock):
    def attend(qkv, bias, mask, *, backend, **sizes):
        if backend == "fused":
            bias = bias.detach() + 0 * bias  # its gradient is 0
        return window_attention(qkv, bias, mask, **sizes, backend="sdpa")

    assert fastest(attend, CALL, "sdpa", ("fused",)) == "sdpa"
    assert fastest(attend, replace(CALL, needs_grad=False), "sdpa", ("fused",)) == "fused"


@pytest.mark.parametrize("error", [RuntimeError("no compiler\nfound"), ImportError("no triton"), AssertionError()])
def test_a_rival_that_fails_breaks_nothing_and_the_reason_is_said(clock, caplog, error):
    caplog.set_level(logging.INFO)
    assert fastest(Attend(error=error), CALL, "sdpa", ("fused",)) == "sdpa"
    reason = " ".join(str(error).split())
    (said,) = caplog.messages
    assert said.endswith(f"sdpa is taken (fused fails: {type(error).__name__}: {reason})")


def test_a_trial_that_fails_altogether_is_lost(clock, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(trial, "_draw", lambda call: torch.empty(2**60))
    assert fastest(Attend(), CALL, "sdpa", ("fused",)) == "sdpa"
    assert "sdpa is taken (RuntimeError: " in caplog.text


def test_each_kind_is_tried_and_logged_once(clock, caplog):
    caplog.set_level(logging.INFO)
    attend = Attend()
    for call in (CALL, CALL, replace(CALL, needs_grad=False), CALL):
        assert fastest(attend, call, "sdpa", ("fused",)) == "fused"
    assert len(clock.asked) == 2 and caplog.messages == [
        "attention in 2 maps of 4x4, windows of 2x2 shifted by 1x1, 2 heads of 4, torch.float32, forward and backward: "
        "fused is taken (fused 0.900 ms; sdpa 1.000 ms)",
        "attention in 2 maps of 4x4, windows of 2x2 shifted by 1x1, 2 heads of 4, torch.float32, forward: "
        "fused is taken (fused 0.900 ms; sdpa 1.000 ms)",
    ]


def test_batches_of_a_trial_are_powers_of_2_within_a_bound(monkeypatch):
    def batch(B, **changes):
        return replace(CALL, shape=(B, 4, 4, 24), **changes).in_trial().shape[0]

    assert [batch(B) for B in (1, 2, 3, 4, 127, 128, 129)] == [1, 2, 2, 4, 64, 128, 128]
    monkeypatch.setattr(trial, "LARGEST", 9 * 4 * 4 * 24)  # nine maps
    assert [batch(B) for B in (7, 9, 1000)] == [4, 8, 8]
    assert batch(1000, num_heads=24, window=(4, 4)) == 1  # scores count too
    monkeypatch.setattr(trial, "LARGEST", 1)
    assert batch(1000) == 1


def test_what_a_compiler_joins_is_left_out_of_its_time(clock):
    attend, call = Attend(), replace(CALL, cosine=True, compiled=True)
    fastest(attend, call, "sdpa", ("fused",))
    tried, timed = attend.calls[:2], attend.calls[2:]
    assert tried == [("sdpa", (1, 1), True, True), ("fused", (1, 1), True, True)]
    assert sorted(timed) == [("fused", (1, 1), True, True), ("sdpa", (0, 0), False, True)]


def test_no_mode_of_the_caller_s_reaches_a_trial(clock):
    """Least of all hooks on saved tensors: recomputation counts what a forward pass has saved."""
    seen = []

    def attend(*arguments, backend, **sizes):
        seen.append((torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")))
        return window_attention(*arguments, **sizes, backend="sdpa")

    def never(tensor):
        raise AssertionError

    state = torch.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert fastest(attend, CALL, "sdpa", ("fused",)) == "fused"
    assert set(seen) == {(False, False)}
    with torch.autograd.graph.saved_tensors_hooks(never, never):
        assert fastest(attend, replace(CALL, scale=0.1), "sdpa", ("fused",)) == "fused"
    assert torch.equal(torch.get_rng_state(), state)


def test_a_trial_takes_place_on_the_device_of_the_call(clock, monkeypatch):
    entered, device = [], torch.device("cuda", 1)
    monkeypatch.setitem(trial.CLOCKS, "cuda", clock)
    monkeypatch.setattr(torch.cuda, "device", lambda device: entered.append(device) or nullcontext())
    monkeypatch.setattr(trial, "_is_captured", lambda device: False)
    monkeypatch.setattr(trial, "_draw", lambda call: draw(replace(call, device=CPU)))
    assert fastest(Attend(), replace(CALL, device=device), "sdpa", ("fused",)) == "fused"
    assert entered == [device]


def test_nothing_is_tried_where_every_run_must_be_the_same(clock):
    torch.use_deterministic_algorithms(True)
    try:
        assert not trial.is_wanted(CPU)
    finally:
        torch.use_deterministic_algorithms(False)
    assert trial.is_wanted(CPU) and not trial.is_wanted(torch.device("meta"))


def test_a_capture_uses_what_was_found_before(clock, monkeypatch):
    fastest(Attend(), CALL, "sdpa", ("fused",))
    monkeypatch.setattr(trial, "_is_captured", lambda device: True)
    assert fastest(Attend(), CALL, "sdpa", ("fused",)) == "fused"
    assert fastest(Attend(), replace(CALL, scale=0.1), "sdpa", ("fused",)) == "sdpa" and len(clock.asked) == 1


# --- In models --------------------------------------------------------------------------------------------------------


@pytest.fixture
def kernels(clock, monkeypatch) -> list:
    """The fused kernels, as it were, on a CPU: their reference takes their place. Its calls are counted."""
    calls = []

    def attend(*arguments):
        calls.append(arguments[0].shape)
        return reference.attend(*arguments)

    monkeypatch.setattr(attention.fused, "attend", attend)
    monkeypatch.setattr(geometry.cpu, "unsupported", lambda dtype: "")
    monkeypatch.setattr(attention.fused, "serves_cpu", lambda dtype: False)
    monkeypatch.setattr(attention.window_process, "is_built_for", lambda device: False)
    return calls


def small_model() -> SwinTransformer:
    shape = {"img_size": 8, "patch_size": 2, "embed_dim": 8, "depths": [2], "num_heads": [1], "window_size": 2}
    return fill(SwinTransformer(**shape, num_classes=5, drop_path_rate=0.0)).eval()


def test_models_take_what_was_found(clock, kernels):
    model, images = small_model(), golden_images(3, 3, 8)
    first, again = model(images), model(images)
    assert len(clock.asked) == 2  # with a shift, and without
    assert kernels.count((3, 4, 4, 24)) == 4 and kernels.count((2, 4, 4, 24)) == 4  # a trial runs it twice
    assert trial.outcomes() == {"fused": 2}
    set_attention_backend(model, "sdpa")
    torch.testing.assert_close(first, model(images))
    assert torch.equal(first, again) and len(clock.asked) == 2


def test_dropout_and_empty_batches_are_left_alone(clock, kernels):
    arguments = {"num_heads": 1, "window_size": 2, "scale": 1.0}
    for qkv, p in ((torch.randn(1, 4, 4, 24), 0.5), (torch.randn(0, 4, 4, 24), 0.0)):
        window_attention(qkv, torch.zeros(1, 4, 4), None, **arguments, dropout_p=p)
    assert not clock.asked and not kernels


def test_rivals_are_those_that_can(clock, kernels, monkeypatch):
    def rivals(**changes):
        found = []
        monkeypatch.setattr(trial, "fastest", lambda attend, call, default, rivals: found.extend(rivals) or default)
        qkv = torch.randn(1, 4, 6, 24)
        arguments = {"num_heads": 1, "window_size": 2, "shift_size": 1, "scale": 1.0, "mask": torch.zeros(6, 4, 4)}
        window_attention(**{"qkv": qkv, "bias": torch.zeros(1, 4, 4), **arguments, **changes})
        return found

    assert rivals() == ["fused"]
    assert rivals(shift_size=0) == []  # whose mask could that be?
    assert rivals(qkv=torch.randn(1, 4, 6, 24, dtype=torch.float64)) == []
    monkeypatch.setattr(attention.window_process, "is_built_for", lambda device: True)
    assert rivals() == ["fused", "window_process"] and rivals(shift_size=0) == ["window_process"]


def test_recomputation_does_what_the_forward_pass_did(clock, kernels):
    model, images = small_model(), golden_images(3, 2, 8)
    model(images).sum().backward()
    expected = [parameter.grad for parameter in model.parameters()]
    trial.CHOSEN.clear()
    model.zero_grad()
    checkpoint(model, images, use_reentrant=False).sum().backward()
    for ours, theirs in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(ours.grad, theirs)


def test_compilers_decide_while_they_trace(clock, kernels):
    model, images = small_model(), golden_images(3, 4, 8)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        result = compiled(images)
        calls = len(kernels)
        assert len(clock.asked) == 2 and all(call.compiled for call, *_ in trial.CHOSEN)
        compiled(images)
        assert len(clock.asked) == 2
        set_attention_backend(model, "sdpa")
        torch.testing.assert_close(result, model(images))
    assert calls


def test_compilers_may_leave_the_batch_open_but_not_the_map(clock, kernels):
    def attend(qkv):
        return window_attention(qkv, torch.zeros(1, 4, 4), None, num_heads=1, window_size=2, scale=1.0)

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    for dimension, trials in ((0, 1), (1, 0)):
        torch._dynamo.reset()
        qkv = torch.randn(2, 4, 4, 24)
        torch._dynamo.mark_dynamic(qkv, dimension)
        expected = attend(qkv)
        clock.asked.clear()
        trial.CHOSEN.clear()
        torch.testing.assert_close(compiled(qkv), expected)
        assert len(clock.asked) == trials


def test_tracers_counters_and_fake_tensors_get_pytorch_s_path(clock, kernels):
    model, images = small_model(), golden_images(3, 2, 8)
    exported = [torch.export.export(model, (images,), strict=strict) for strict in (False, True)]
    with torch.no_grad():
        torch.jit.trace(model, images, check_trace=False)
    sizes = {"num_heads": 1, "window_size": 2, "scale": 1.0}
    torch.func.vmap(lambda qkv: window_attention(qkv, torch.zeros(1, 4, 4), None, **sizes))(torch.randn(2, 1, 4, 4, 24))
    with FlopCounterMode(display=False) as counter:
        model(images)
    with torch.device("meta"):
        SwinTransformer(img_size=32, window_size=2)(torch.empty(1, 3, 32, 32))
    assert not clock.asked and not kernels and counter.get_total_flops()
    torch.testing.assert_close(exported[0].module()(images), exported[1].module()(images))


@pytest.mark.gpu
@pytest.mark.parametrize("needs_grad", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_real_trial(dtype, needs_grad, monkeypatch, caplog):
    """Whichever is faster, the kernels compile and agree with PyTorch, and nothing of a trial stays in memory."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(trial, "CHOSEN", {})
    monkeypatch.setattr(trial.logger, "propagate", True)
    qkv = torch.randn(9, 56, 56, 288, device="cuda", dtype=dtype, requires_grad=needs_grad)
    bias, mask = torch.randn(3, 49, 49, device="cuda"), window_mask((56, 56), 7, 3).cuda()
    sizes = {"num_heads": 3, "window_size": 7, "shift_size": 3, "scale": 32**-0.5}
    before = torch.cuda.memory_allocated()
    ours = window_attention(qkv, bias, mask, **sizes, backend="auto")
    theirs = window_attention(qkv, bias, mask, **sizes, backend="sdpa")
    error = (ours - theirs).float().norm() / theirs.float().norm()
    assert error < (1e-2 if dtype == torch.bfloat16 else 1e-3)
    del ours, theirs, error
    assert torch.cuda.memory_allocated() == before
    (said,) = caplog.messages
    assert re.match(r"attention in 8 maps of 56x56.* is taken \(fused \d+\.\d{3} ms; .*sdpa \d+\.\d{3} ms\)$", said)


@pytest.mark.gpu
def test_real_compilers_and_graphs(monkeypatch):
    monkeypatch.setattr(trial, "CHOSEN", {})
    model, images = small_model().cuda(), golden_images(3, 4, 8).cuda()
    with torch.no_grad():
        set_attention_backend(model, "sdpa")
        expected = model(images)
        set_attention_backend(model, "auto")
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(images), expected, atol=1e-4, rtol=1e-4)
        assert len(trial.CHOSEN) == 2 and all(call.compiled for call, *_ in trial.CHOSEN)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):  # nothing was tried for it: PyTorch's path
            result = model(images)
        graph.replay()
        torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-4)
        assert len(trial.CHOSEN) == 2
