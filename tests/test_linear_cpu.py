"""kernels/linear, by its extension: against float64, for every instruction set, in models, and where they take it."""

import copy

import extensions
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, fill, golden, golden_images, make_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_window_attention import check_same, logits_and_gradients
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from compilation import compile_in_place
from kernels import linear as kernel
from kernels.linear import operators as compiled
from kernels.window_attention import cpu
from models import build_model
from models import linear as module
from models.experts import Experts
from models.layers import Linear, Mlp, PatchMerging
from models.recomputation import RecomputingMlp
from models.swin_transformer import SwinTransformer, SwinTransformerBlock, WindowAttention

SOURCE = ROOT / "kernels" / "linear"
TOLERANCE = 1e-5  # of a tensor's norm


@pytest.fixture(scope="session")
def built(request):
    return extensions.load(request, SOURCE)


@pytest.fixture
def operators(built, monkeypatch):
    """The operators; models use them, whatever this processor is."""
    monkeypatch.setattr(kernel, "PROBLEM", "")
    monkeypatch.setattr(kernel, "BFLOATS", torch.ops.swin_linear.lanes(torch.empty(0, dtype=torch.bfloat16)))
    monkeypatch.setattr(module, "is_amd", lambda: True)
    monkeypatch.setattr(module, "has_avx512", lambda: False)
    for name in ("FEWEST_ROWS", "LEAST_WORK", "LEAST_WORK_OF_MLP"):
        monkeypatch.setattr(module, name, 0)
    return torch.ops.swin_linear


@pytest.fixture
def calls(operators, monkeypatch) -> list[str]:
    """The names of the functions that models call."""
    seen = []

    def watch(name):
        run = getattr(kernel, name)
        monkeypatch.setattr(kernel, name, lambda *args, **named: seen.append(name) or run(*args, **named))

    for name in ("linear", "joined_linear", "mlp", "residual_mlp", "experts"):
        watch(name)
    return seen


def lanes(operators) -> list[int]:
    """Those of the instruction sets that this processor runs."""
    found = []
    for count in (4, 8, 16, 256):
        try:
            operators.forward(torch.ones(1, 1), torch.ones(1, 1), None, count)
        except RuntimeError as err:
            assert f"no code of {count} lanes runs on this processor" in str(err)
        else:
            found.append(count)
    assert 4 in found
    return found


def close(ours: torch.Tensor, exact: torch.Tensor) -> None:
    assert ours.shape == exact.shape
    assert (ours.double() - exact).norm() <= TOLERANCE * exact.norm()


def mlps_in_float64(x, counts, w1, b1, w2, b2, grad, across):
    """Output and gradients."""
    inputs = [None if part is None else part.double().requires_grad_() for part in (x, w1, b1, w2, b2)]
    x, w1, b1, w2, b2 = inputs
    parts = []
    for i, rows in enumerate(x.split(counts)):
        hidden = F.linear(rows, w1[i], None if b1 is None else b1[i])
        parts.append(F.linear(F.gelu(hidden), w2[i] if across else w2[i].t(), None if b2 is None else b2[i]))
    y = torch.cat(parts)
    wanted = [part for part in inputs if part is not None]
    return y.detach(), torch.autograd.grad(y, wanted, grad.double())


sizes = st.one_of(st.integers(1, 40), st.sampled_from([64, 96, 97, 200, 1025]))


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.one_of(sizes, st.sampled_from([800, 1700])), inputs=sizes, outputs=sizes, bias=st.booleans())
def test_layers_are_those_of_float64(operators, rows, inputs, outputs, bias):
    torch.manual_seed(rows)
    x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
    added, grad = torch.randn(outputs) if bias else None, torch.randn(rows, outputs)
    for count in lanes(operators):
        exact = x.double() @ weight.double().t() + (added.double() if bias else 0)
        close(operators.forward(x, weight, added, count), exact)
        grad_x, grad_w, grad_b = operators.backward(grad, x, weight, True, True, count)
        close(grad_x, grad.double() @ weight.double())
        close(grad_w, grad.double().t() @ x.double())
        close(grad_b, grad.double().sum(0))


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    counts=st.lists(st.one_of(st.integers(0, 30), st.sampled_from([900, 1700])), min_size=1, max_size=4),
    channels=sizes,
    hidden=sizes,
    outputs=sizes,
    biases=st.tuples(st.booleans(), st.booleans()),
    across=st.booleans(),
)
def test_mlps_are_those_of_float64(operators, counts, channels, hidden, outputs, biases, across):
    torch.manual_seed(sum(counts))
    E, rows = len(counts), sum(counts)
    x, grad = torch.randn(rows, channels), torch.randn(rows, outputs)
    w1, w2 = torch.randn(E, hidden, channels) / channels**0.5, torch.randn(E, outputs, hidden)
    w2 = w2 if across else w2.mT.contiguous()
    b1, b2 = (torch.randn(E, n) if wanted else None for n, wanted in zip((hidden, outputs), biases, strict=True))
    exact, exact_grads = mlps_in_float64(x, counts, w1, b1, w2, b2, grad, across)
    for count in lanes(operators):
        y, kept = operators.mlp(x, counts, w1, b1, w2, b2, across, True, count)
        close(y, exact)
        assert torch.equal(operators.mlp(x, counts, w1, b1, w2, b2, across, False, count)[0], y)
        grads = operators.mlp_backward(grad, x, kept, counts, w1, w2, across, True, True, count)
        exists = (True, True, biases[0], True, biases[1])
        wanted = [ours for ours, there in zip(grads, exists, strict=True) if there]
        for ours, theirs in zip(wanted, exact_grads, strict=True):
            close(ours, theirs)


@pytest.mark.parametrize("size", [1, 1e-30, 1e30, 3.4e38])
def test_products_with_one_are_the_numbers_themselves(operators, size):
    """On either side: also where a number is the sum of parts, none of its digits is lost."""
    torch.manual_seed(0)
    x, one = torch.empty(70, 40).uniform_(0.5, 1) * torch.randn(70, 40).sign() * size, torch.eye(40)
    for count in lanes(operators):
        assert torch.equal(operators.forward(x, one, None, count), x)
        assert torch.equal(operators.forward(one, x, None, count), x.t())
        for grad in operators.backward(one, x[:40], x[:40].clone(), True, True, count)[:2]:
            assert torch.equal(grad, x[:40])


def test_every_sum_is_as_exact_as_one_of_floats(operators):
    """Of terms of very different sizes: against what rounding each of them to a float may do."""
    torch.manual_seed(0)
    x, weight, grad = (
        torch.randn(size) * 10.0 ** torch.randint(-6, 7, size) for size in ((900, 70), (65, 70), (900, 65))
    )
    for count in lanes(operators):
        pairs = [(operators.forward(x, weight, None, count), x, weight)]
        grad_x, grad_w, _ = operators.backward(grad, x, weight, True, True, count)
        pairs += [(grad_x, grad, weight.t()), (grad_w, grad.t(), x.t())]
        for ours, a, b in pairs:
            a, b = a.double(), b.double().t()
            assert ((ours.double() - a @ b).abs() <= 1e-6 * (a.abs() @ b.abs())).all()


def test_gelu_and_its_slope_are_those_of_float64_everywhere(operators):
    one, x = torch.ones(1, 1, 1), torch.cat([torch.linspace(-12, 12, 20001), torch.tensor([-1e4, -100.0, 100.0, 1e4])])
    exact = x.double().requires_grad_()
    F.gelu(exact).sum().backward()
    for count in lanes(operators):
        y, kept = operators.mlp(x[:, None], [len(x)], one, None, one, None, True, True, count)
        slope = operators.mlp_backward(
            torch.ones(len(x), 1), x[:, None], kept, [len(x)], one, one, True, True, False, count
        )
        bound = 4e-7 * exact.detach().abs().clamp(min=1)
        assert ((y[:, 0].double() - F.gelu(exact)).abs() <= bound).all()
        assert ((slope[0][:, 0].double() - exact.grad).abs() <= 1e-6).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_shows_where_it_does_in_pytorch(operators, bad):
    torch.manual_seed(0)
    layer = Mlp(9, 20)
    for place in ("x", "fc1.weight", "fc1.bias", "fc2.weight", "grad"):
        model, x, grad = copy.deepcopy(layer), torch.randn(7, 9), torch.randn(7, 9)
        {"x": x, "grad": grad, **dict(model.named_parameters())}[place].data.view(-1)[3] = bad
        results = []
        for there in (True, False):
            kernel.PROBLEM = "" if there else "not here"
            inputs = [x.clone().requires_grad_(), *model.parameters()]
            y = model(inputs[0])
            results.append([y, *torch.autograd.grad(y, inputs, grad)])
        for ours, theirs in zip(*results, strict=True):
            assert torch.equal(ours.isfinite(), theirs.isfinite()), place


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.one_of(sizes, st.just(900)),
    channels=sizes,
    hidden=sizes,
    eps=st.sampled_from([1e-5, 1e-2]),
    biases=st.tuples(st.booleans(), st.booleans()),
)
def test_mlps_with_norm_and_residual_are_those_of_float64(operators, rows, channels, hidden, eps, biases):
    torch.manual_seed(rows)
    x, norm_weight, norm_bias = 3 * torch.randn(rows, channels) + 1, torch.randn(channels), torch.randn(channels)
    w1, w2 = torch.randn(hidden, channels) / channels**0.5, torch.randn(channels, hidden)
    b1, b2 = (torch.randn(n) if wanted else None for n, wanted in zip((hidden, channels), biases, strict=True))
    parts = [part if part is None else part.double() for part in (x, norm_weight, norm_bias, w1, b1, w2, b2)]
    normed = F.layer_norm(parts[0], (channels,), *parts[1:3], eps)
    exact = parts[0] + F.linear(F.gelu(F.linear(normed, *parts[3:5])), *parts[5:])
    for count in lanes(operators):
        close(operators.residual_mlp(x, norm_weight, norm_bias, eps, w1, b1, w2, b2, count), exact)


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.one_of(sizes, st.just(900)),
    channels=sizes,
    outputs=sizes,
    normed=st.booleans(),
    residual=st.booleans(),
    bias=st.booleans(),
)
def test_layers_with_norm_and_residual_are_those_of_float64(operators, rows, channels, outputs, normed, residual, bias):
    torch.manual_seed(rows)
    x, weight = 3 * torch.randn(rows, channels) + 1, torch.randn(outputs, channels) / channels**0.5
    norm = tuple(torch.randn(2, channels)) if normed else (None, None)
    added, start = torch.randn(rows, outputs) if residual else None, torch.randn(outputs) if bias else None
    exact = x.double()
    if normed:
        exact = F.layer_norm(exact, (channels,), *(part.double() for part in norm), 1e-3)
    exact = F.linear(exact, weight.double(), start.double() if bias else None)
    exact = exact + added.double() if residual else exact
    for count in lanes(operators):
        close(operators.forward(x, weight, start, count, *norm, 1e-3, added), exact)


@pytest.mark.parametrize("rows, channels", [(2000, 70), (300, 70), (300, 20)])
def test_results_are_the_same_bits_for_any_number_of_threads(operators, rows, channels):
    """Of 300 rows weights are packed on the way, unless there are more threads than panels: of 20 columns two."""
    torch.manual_seed(0)
    layer = nn.Sequential(Linear(33, channels), Mlp(channels, 250))
    check_bits_of_threads(layer, list(layer.parameters()), torch.randn(rows, 33))


@pytest.mark.parametrize("rows", [49, 300, 2000])
def test_norms_and_residuals_are_the_same_bits_for_any_number_of_threads(operators, rows):
    """Which decides whether a weight's panels are packed on the way: the same arithmetic in other code."""
    torch.manual_seed(0)
    x, norm, before = torch.randn(rows, 96), (*torch.randn(2, 96), 1e-5), torch.get_num_threads()
    w1, b1, w2, b2, other = (torch.randn(size) / 10 for size in ((384, 96), 384, (96, 384), 96, (96, 96)))
    try:
        for count in lanes(operators):
            results = []
            for threads in (1, 2, 3, 8):
                torch.set_num_threads(threads)
                y = operators.residual_mlp(x, *norm, w1, b1, w2, b2, count)
                results.append((y, operators.forward(x, other, b2, count, *norm, x)))
            for others in results[1:]:
                assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True)), count
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2, 8, 32])
def test_threads_may_be_more_than_there_is_work_for(operators, threads):
    """Blocks of rows are not cut below a tile of any instruction set, for many threads or for wide hidden layers."""
    torch.manual_seed(0)
    before = torch.get_num_threads()
    x, weight, wide = torch.randn(600, 32), torch.randn(33, 32), torch.randn(1, 8192, 32)
    try:
        torch.set_num_threads(threads)
        for count in lanes(operators):
            for rows in (32, 90, 200, 600):
                close(operators.forward(x[:rows], weight, None, count), x[:rows].double() @ weight.double().t())
            y, kept = operators.mlp(x, [600], wide, None, wide, None, False, True, count)
            exact = F.gelu(x.double() @ wide[0].double().t()) @ wide[0].double()
            close(y, exact)
            close(
                operators.mlp_backward(y, x, kept, [600], wide, wide, False, False, True, count)[4], exact.sum(0)[None]
            )
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("counts", [[5, 0, 300, 700, 1], [500] * 9])
def test_experts_results_are_the_same_bits_for_any_number_of_threads(operators, counts):
    """Those of few rows are computed together, up to 4096 rows; 700 rows are not few."""
    torch.manual_seed(0)
    mixture = Experts(20, 90, len(counts))
    mixture.reset_parameters(0.2, 0)
    check_bits_of_threads(
        lambda x: mixture.grouped(x, torch.tensor(counts)), list(mixture.parameters()), torch.randn(sum(counts), 20)
    )


def check_bits_of_threads(run, parameters, x):
    x.requires_grad_()
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            with torch.no_grad():
                without = run(x)
            y = run(x)
            results.append([without, y, *torch.autograd.grad(y.square().sum(), [x, *parameters])])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0][0], results[0][1])
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("shape", [(5, 24), (2, 7, 24), (2, 3, 4, 24), (24,)])
@pytest.mark.parametrize("bias", [True, False])
def test_modules_take_any_shape_and_order(calls, shape, bias):
    torch.manual_seed(0)
    x = torch.randn(shape)
    for layer, name in ((Linear(24, 10, bias=bias), "linear"), (Mlp(24, 40, 10, mlp_fc2_bias=bias), "mlp")):
        exact = copy.deepcopy(layer).double()
        for data in (x, x.transpose(0, -1).contiguous().transpose(0, -1)):
            inputs, doubles = data.detach().requires_grad_(), data.double().detach().requires_grad_()
            y, expected = layer(inputs), exact(doubles)
            close(y.detach(), expected.detach())
            grads = torch.autograd.grad(y.sin().sum(), [inputs, *layer.parameters()])
            exact_grads = torch.autograd.grad(expected.sin().sum(), [doubles, *exact.parameters()])
            for ours, theirs in zip(grads, exact_grads, strict=True):
                close(ours, theirs)
            with torch.inference_mode():
                assert torch.equal(layer(data), y)
        assert calls == [name] * 4
        calls.clear()


def test_only_the_gradients_that_are_needed_are_there(operators):
    x = torch.randn(6, 8, requires_grad=True)
    for layer in (Linear(8, 4), Mlp(8, 16)):
        for frozen in (["weight"], ["bias"], ["weight", "bias"]):
            for name, parameter in layer.named_parameters():
                parameter.requires_grad_(name.split(".")[-1] not in frozen)
                parameter.grad = None
            layer(x.detach()).sum().backward() if len(frozen) == 1 else layer(x).sum().backward()
            for parameter in layer.parameters():
                assert (parameter.grad is not None) == parameter.requires_grad


def test_second_derivatives_are_pytorchs(operators):
    torch.manual_seed(0)
    x = torch.randn(3, 5, requires_grad=True)
    for layer in (Linear(5, 4), Mlp(5, 6)):
        results = []
        for model, data in ((layer, x), (copy.deepcopy(layer).double(), x.detach().double().requires_grad_())):
            (grad,) = torch.autograd.grad(model(data).square().sum(), data, create_graph=True)
            results.append(torch.autograd.grad(grad.square().sum(), [data, *model.parameters()], allow_unused=True))
        for ours, theirs in zip(*results, strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None and theirs.norm():
                close(ours, theirs)


def test_others_compute_what_the_kernels_do_not(calls):
    """Other precisions, tangents, vmap, tracers, counters, exported models."""
    layer, x = Mlp(8, 16), torch.randn(3, 8)
    expected = layer(x)
    assert calls.pop() == "mlp"
    with torch.autocast("cpu", torch.bfloat16):
        layer(x)
    copy.deepcopy(layer).double()(x.double())
    torch.func.jvp(layer, (x,), (x,))
    torch.testing.assert_close(torch.func.vmap(layer)(x[None])[0], expected)
    torch.testing.assert_close(torch.jit.trace(layer, x, check_trace=False)(x), expected)
    exported = torch.export.export(layer, (x,))
    assert "swin" not in str(exported.graph)
    torch.testing.assert_close(exported.module()(x), expected)
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == 2 * 2 * 3 * 8 * 16
    layer(x[:0])
    assert not calls


@pytest.mark.parametrize("recomputing", [False, True])
@pytest.mark.parametrize("bias", [True, False])
def test_compiled_layers_are_the_same(operators, bias, recomputing):
    torch.manual_seed(0)
    mlp = Mlp(24, 40, 10, mlp_fc2_bias=bias)
    mlp.__class__ = RecomputingMlp if recomputing else Mlp
    layer, x = nn.Sequential(Linear(16, 24, bias=bias), mlp), torch.randn(2, 60, 16, requires_grad=True)
    graphs = []

    def backend(graph, _):
        graphs.append(str(graph.graph))
        return graph.forward

    expected = layer(x)
    torch.testing.assert_close(torch.compile(layer, backend=backend, fullgraph=True)(x), expected)
    assert graphs[0].count("swin.linear.default") == graphs[0].count("swin.mlp.default") == 1
    fast = torch.compile(layer, backend="aot_eager", fullgraph=True)
    inputs = [x, *layer.parameters()]
    for data in (x, x.detach()):
        wanted = [part for part in inputs if part is not x or data is x]
        ours = torch.autograd.grad(fast(data).sin().sum(), wanted)
        for a, b in zip(ours, torch.autograd.grad(layer(data).sin().sum(), wanted), strict=True):
            torch.testing.assert_close(a, b)
    with torch.no_grad():
        assert torch.equal(fast(x), layer(x))


def test_compiled_programs_name_the_width_of_packed_weights(operators):
    """So that a compiler's cache does not take what was compiled for one instruction set for another."""
    layer, graphs = Linear(16, 24), []

    def backend(graph, _):
        graphs.append(str(graph.graph))
        return graph.forward

    with torch.no_grad():
        torch.compile(layer, backend=backend, fullgraph=True)(torch.randn(3, 16))
    (line,) = (line for line in graphs[0].splitlines() if "swin.pack_weight.default" in line)
    assert f", 0, {operators.packed_width(16)})" in line


def test_packed_weights_give_the_same_bits(operators):
    torch.manual_seed(0)
    for count in lanes(operators):
        for M, C, H, N in ((7, 5, 9, 3), (1, 1, 1, 1), (33, 17, 32, 65)):
            x, w1, b1, w2, b2 = (torch.randn(shape) for shape in ((M, C), (H, C), (H,), (N, H), (N,)))
            packed1, packed2 = (operators.pack(weight, count) for weight in (w1, w2))
            for bias in (b1, None):
                expected = operators.forward(x, w1, bias, count)
                assert torch.equal(operators.forward_packed(x, packed1, bias, H, count), expected)
            expected, _ = operators.mlp(x, [M], w1[None], b1[None], w2[None], b2[None], True, False, count)
            assert torch.equal(operators.mlp_packed(x, packed1, b1, packed2, b2, H, N, count), expected)


def test_frozen_weights_are_packed_once(operators):
    """By inductor, which computes what depends on them alone."""
    layer, x = nn.Sequential(Linear(16, 24), Mlp(24, 40)), torch.randn(60, 16)
    compile_in_place(layer, x.device, "default")
    with torch.no_grad():
        torch.testing.assert_close(layer(x), layer.forward(x))
        for weight in layer.parameters():
            weight.zero_()
        assert layer(x).any()
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            layer(x)
    names = {event.key for event in recorded.key_averages()}
    assert {"swin_linear::forward_packed", "swin_linear::mlp_packed"} <= names and "swin_linear::pack" not in names


@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap"])
def test_compiled_transforms_are_the_same(operators, transform):
    """Operators of ours have no rules for them; as an opaque call, one would have the tangent 0."""
    torch.manual_seed(0)
    layer, x = nn.Sequential(Linear(16, 24), Mlp(24, 40)), torch.randn(2, 30, 16)
    run = {
        "grad": lambda y: torch.func.grad(lambda z: layer(z).square().sum())(y),
        "jvp": lambda y: torch.func.jvp(layer, (y,), (x,))[1],
        "vmap": lambda y: torch.func.vmap(layer)(y[None])[0],
    }[transform]
    torch.testing.assert_close(torch.compile(run, backend="eager")(x), run(x))


def test_a_compiled_tangent_of_attention_is_an_error_of_pytorchs_not_zero(request, monkeypatch):
    extensions.load(request, ROOT / "kernels" / "window_attention")
    monkeypatch.setattr(cpu, "PROBLEM", "")
    layer, x = WindowAttention(16, 4, 2), torch.randn(1, 8, 8, 16)
    with pytest.raises(NotImplementedError, match="forward AD"):
        torch.compile(lambda y: torch.func.jvp(layer, (y,), (x,))[1], backend="eager")(x)


@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(operators, bias):
    x, weight, w2 = (torch.randn(shape, requires_grad=True) for shape in ((6, 4), (5, 4), (3, 5)))
    b1, b2 = (torch.randn(n, requires_grad=True) if bias else None for n in (5, 3))
    torch.library.opcheck(compiled.linear, (x, weight, b1))
    (grad,) = torch.autograd.grad(compiled.linear(x, weight, b1).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"^compiled linear layers have no second derivatives; leave out"):
        grad.sum().backward()
    torch.library.opcheck(compiled.mlp, (x, weight, b1, w2, b2))
    x, weight, w2 = (part.detach() for part in (x, weight, w2))
    grad_h, grad, hidden = torch.randn(6, 5), torch.randn(6, 3), compiled.mlp(x, weight, None, w2, None)[1]
    torch.library.opcheck(compiled.mlp, (x, weight, None, w2, None))
    widths = [compiled.packed_width(part.shape[1], 0) for part in (weight, w2)]
    torch.library.opcheck(compiled.pack_weight, (weight, 0, widths[0]))
    packed1, packed2 = compiled.pack_weight(weight, 0, widths[0]), compiled.pack_weight(w2, 0, widths[1])
    b1, b2 = (part if part is None else part.detach() for part in (b1, b2))
    torch.library.opcheck(compiled.linear_packed, (x, packed1, b1, 5))
    torch.library.opcheck(compiled.mlp_packed, (x, packed1, b1, packed2, b2, 5, 3))
    norm = torch.randn(4), torch.randn(4), 1e-5
    torch.library.opcheck(compiled.linear_packed, (x, packed1, b1, 5, *norm, torch.randn(6, 5)))
    packed3 = compiled.pack_weight(weight.t().contiguous(), 0, widths[1])
    torch.library.opcheck(compiled.mlp_packed, (x, packed1, b1, packed3, None, 5, 4, *norm, True))
    for needs in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(compiled.linear_backward, (grad_h, x, weight, *needs))
        torch.library.opcheck(compiled.mlp_backward, (grad, x, hidden, weight, w2, *needs))


@pytest.mark.parametrize("watched", ["fc1", "act", "drop", "fc2"])
def test_hooks_see_what_is_between(calls, watched):
    layer, x, seen = Mlp(8, 16), torch.randn(3, 8), []
    expected = layer(x)
    module = layer.get_submodule(watched)
    for register in (
        module.register_forward_hook,
        module.register_forward_pre_hook,
        module.register_full_backward_hook,
        module.register_full_backward_pre_hook,
    ):
        handle = register(lambda *_: seen.append(1))
        calls.clear()
        y = layer(x)
        torch.testing.assert_close(y, expected)
        y.sum().backward()
        assert seen and "mlp" not in calls
        handle.remove()
        seen.clear()
    layer(x)
    assert calls[-1] == "mlp"


def small_block(**named) -> SwinTransformerBlock:
    torch.manual_seed(0)
    block = SwinTransformerBlock(24, (7, 7), 3, **{"window_size": 7, "drop_path": 0.5, **named})
    block.attn.backend = "reference"  # whether attention is fused or not
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return block.eval()


JOINED = ["joined_linear", "joined_linear", "residual_mlp"]  # qkv with its norm, proj with its residual


def test_a_block_joins_norms_and_residuals_to_its_layers_in_inference(calls):
    block, x = small_block(), torch.randn(2, 49, 24)
    with torch.no_grad():
        y = block(x)
    assert calls == JOINED
    calls.clear()
    torch.testing.assert_close(y, block(x), atol=1e-5, rtol=1e-5)  # with gradients
    assert calls == ["linear", "linear", "mlp"]
    with torch.no_grad():
        torch.manual_seed(1)
        calls.clear()
        dropped = block.train()(x)
        assert not set(JOINED) & set(calls) and not torch.allclose(dropped, y)
        assert torch.isfinite(small_block(norm_layer=lambda dim: nn.LayerNorm(dim, bias=False))(x)).all()
        assert torch.isfinite(small_block(norm_layer=lambda dim: nn.LayerNorm((49, dim)))(x)).all()
        assert not set(JOINED) & set(calls)
        assert torch.isfinite(small_block(act_layer=nn.ReLU)(x)).all()
        assert "residual_mlp" not in calls


def test_a_compiled_block_joins_them_too(operators):
    block, x, graphs = small_block(), torch.randn(2, 49, 24), []

    def backend(graph, _):
        graphs.append(str(graph.graph))
        return graph.forward

    fast = torch.compile(block, backend=backend, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), block(x), atol=1e-6, rtol=1e-5)
    assert graphs[0].count("swin.linear_packed.default") == 2 and graphs[0].count("swin.mlp_packed.default") == 1
    assert "layer_norm" not in graphs[0]
    torch.testing.assert_close(fast(x), block(x))  # with gradients
    assert "layer_norm" in graphs[1]


def test_a_block_without_attention_of_ours_is_not_taken_apart(calls):
    class Other(nn.Module):
        def forward(self, x, mask, shift_size):
            return -x

    class Louder(WindowAttention):
        def forward(self, x, mask=None, shift_size=0):
            return 2 * super().forward(x, mask, shift_size)

    x = torch.randn(2, 49, 24)
    for attention in (Other(), Louder(24, 7, 3)):
        block = small_block()
        block.attn = attention
        with torch.no_grad():
            expected = x + attention(block.norm1(x).view(2, 7, 7, 24), None, 0).view(2, 49, 24)
            calls.clear()
            torch.testing.assert_close(block.add_mixed(x, (7, 7)), expected)
        assert "joined_linear" not in calls


def test_a_block_of_which_only_the_bias_table_is_trained_is_not_taken_apart(calls):
    block, x = small_block().requires_grad_(False), torch.randn(2, 49, 24)
    table = block.attn.relative_position_bias_table.requires_grad_()
    block(x).square().sum().backward()
    assert table.grad.norm() > 0 and "joined_linear" not in calls


@pytest.mark.parametrize("backend", ["auto", "sdpa", "reference", "window_process"])
def test_padded_maps_are_the_same(operators, monkeypatch, backend):
    monkeypatch.setattr(cpu, "PROBLEM", "not here")
    torch.manual_seed(0)
    block = SwinTransformerBlock(24, (9, 10), 3, window_size=7, pad_maps=True).eval()
    block.attn.backend = backend
    x = torch.randn(2, 90, 24)
    with torch.no_grad():
        y = block(x)
    torch.testing.assert_close(y, block(x), atol=1e-5, rtol=1e-5)  # with gradients


class Louder(nn.Module):
    def forward(self, x):
        return 2 * x


@pytest.mark.parametrize("name", ["attn.proj_drop", "drop_path"])
def test_what_stands_in_for_a_layer_that_drops_is_not_left_out(operators, name):
    block, x = small_block(), torch.randn(2, 49, 24)
    plain = block(x)
    block.set_submodule(name, Louder())
    with torch.no_grad():
        y = block(x)
    torch.testing.assert_close(y, block(x), atol=1e-5, rtol=1e-5)  # with gradients
    assert not torch.allclose(y, plain)


@pytest.mark.parametrize("name", ["norm1", "attn", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"])
def test_a_forward_in_the_place_of_its_class_s_is_taken(operators, name):
    block, x = small_block(), torch.randn(2, 49, 24)
    module = block.get_submodule(name)
    plain, own = block(x), module.forward
    module.forward = lambda *args: 2 * own(*args)
    with torch.no_grad():
        y = block(x)
    torch.testing.assert_close(y, block(x), atol=1e-5, rtol=1e-5)  # with gradients
    assert not torch.allclose(y, plain)


def test_layers_are_as_wide_as_their_weights(operators):
    """Not as their attributes say, which pruning leaves as they were."""
    layer, norm, x = Linear(8, 6), nn.LayerNorm(8), torch.randn(5, 8)
    layer.weight, layer.bias = nn.Parameter(layer.weight[:4]), nn.Parameter(layer.bias[:4])
    with torch.no_grad():
        y = module.normed_linear(x, norm, layer)
    torch.testing.assert_close(y, F.linear(norm(x), layer.weight, layer.bias))


def test_merging_patches_joins_its_norm(calls):
    merge, x = PatchMerging((6, 4), 8), torch.randn(2, 24, 8)
    nn.init.normal_(merge.norm.weight)
    with torch.no_grad():
        y = merge(x)
    assert calls == ["joined_linear"]
    torch.testing.assert_close(y, merge(x))
    assert calls == ["joined_linear", "linear"]


WATCHED = ["norm1", "attn", "attn.qkv", "attn.proj", "attn.proj_drop", "drop_path"]
WATCHED += ["norm2", "mlp", "mlp.fc1", "mlp.act", "mlp.drop", "mlp.fc2"]


@pytest.mark.parametrize("watched", WATCHED)
def test_hooks_see_what_is_within_a_block(calls, watched):
    block, x, seen = small_block(), torch.randn(2, 49, 24), []
    with torch.no_grad():
        expected = block(x)
        calls.clear()
        block.get_submodule(watched).register_forward_hook(lambda *_: seen.append(1))
        torch.testing.assert_close(block(x), expected, atol=1e-5, rtol=1e-5)
    assert seen and calls != JOINED


def test_dropout_and_other_activations_are_not_left_out(calls):
    torch.manual_seed(0)
    layer, x = Mlp(8, 16, drop=0.5), torch.randn(400, 8)
    assert (layer.train()(x) == 0).float().mean() > 0.4
    assert calls == ["linear", "linear"]
    layer.eval()(x)
    assert calls.pop() == "mlp"
    layer.drop = nn.Identity()
    layer.train()(x)
    calls.clear()
    for act in (nn.ReLU, lambda: nn.GELU("tanh")):
        other = Mlp(8, 16, act_layer=act)
        calls.clear()
        torch.testing.assert_close(other(x), other.fc2(other.act(other.fc1(x))))
        assert "mlp" not in calls


def test_an_mlp_keeps_no_more_than_one_that_computes_again(operators):
    """Hidden values before GELU, and the input."""
    kept = {}
    for kind in (Mlp, RecomputingMlp):
        sizes, layer, x = {}, Mlp(16, 64), torch.randn(10, 16)
        layer.__class__ = kind
        own = {parameter.data_ptr() for parameter in layer.parameters()}

        def pack(tensor, sizes=sizes, own=own):
            if tensor.data_ptr() not in own:
                sizes[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            layer(x)
        kept[kind] = sum(sizes.values())
    assert kept[Mlp] == kept[RecomputingMlp] == 10 * (16 + 64)


@pytest.mark.parametrize("counts", [[5, 0, 7], [4, 4, 4], [0, 0, 12]])
def test_experts_are_those_of_pytorch(calls, counts):
    torch.manual_seed(0)
    layer, x = Experts(8, 20, 3), torch.randn(12, 8)
    layer.reset_parameters(0.3, 1)
    nn.init.normal_(layer.batched_fc1_bias)
    nn.init.normal_(layer.batched_fc2_bias)
    results = []
    for there in (True, False):
        kernel.PROBLEM = "" if there else "not here"
        results.append([])
        for run in (lambda y: layer.grouped(y, torch.tensor(counts)), lambda y: layer(y.view(3, 4, 8))):
            data = x.clone().requires_grad_()
            y = run(data)
            results[-1] += [y, *torch.autograd.grad(y.square().sum(), [data, *layer.parameters()])]
    assert calls == ["experts", "experts"]
    layer.drop.register_forward_hook(lambda *_: calls.clear())
    kernel.PROBLEM = ""
    layer(x.view(3, 4, 8))
    assert not calls
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(3, 4, dtype=torch.float64)}, r"x must be contiguous float32 on the CPU, \(\*, \*\)"),
        ({"x": torch.zeros(4, 3).t()}, r"x must be contiguous"),
        ({"x": torch.zeros(4)}, r"x must be contiguous"),
        ({"x": torch.zeros(3, 5)}, r"w1 must be contiguous float32 on the CPU, \(1, \*, 5\)"),
        ({"counts": [2]}, r"counts must be those of x's rows"),
        ({"counts": [2**62] * 4, "w1": torch.zeros(4, 6, 4), "w2": torch.zeros(4, 2, 6)}, r"counts must be those"),
        ({"counts": [3, -1], "w1": torch.zeros(2, 6, 4), "w2": torch.zeros(2, 2, 6)}, r"counts must not be negative"),
        ({"w2": torch.zeros(1, 2, 5)}, r"w2 must be contiguous float32 on the CPU, \(1, 2, 6\)"),
        ({"w2": torch.zeros(2, 6)}, r"w2 must have three dimensions"),
        ({"w1": torch.zeros(1, 0, 4), "w2": torch.zeros(1, 2, 0)}, r"w1 and w2 must not be empty"),
    ],
)
def test_wrong_arguments_are_errors_not_crashes(operators, change, message):
    call = {"x": torch.zeros(3, 4), "counts": [3], "w1": torch.zeros(1, 6, 4), "w2": torch.zeros(1, 2, 6)} | change
    with pytest.raises(RuntimeError, match=message):
        operators.mlp(**call, b1=None, b2=None, across=True, keep=True)
    with pytest.raises(RuntimeError, match=message):
        operators.mlp_backward(
            torch.zeros(3, 2), h=torch.zeros(3, 6), **call, across=True, needs_x=True, needs_weights=True
        )


def test_wrong_biases_gradients_and_layers_are_errors_too(operators):
    x, weight = torch.zeros(3, 4), torch.zeros(2, 4)
    with pytest.raises(RuntimeError, match=r"bias must be contiguous float32 on the CPU, \(2\)"):
        operators.forward(x, weight, torch.zeros(3))
    with pytest.raises(RuntimeError, match=r"a norm has both a weight and a bias, or there is none"):
        operators.forward(x, weight, None, 0, torch.ones(4), None, 1e-5)
    with pytest.raises(RuntimeError, match=r"norm_weight must be contiguous float32 on the CPU, \(4\)"):
        operators.forward(x, weight, None, 0, torch.ones(3), torch.ones(3), 1e-5)
    with pytest.raises(RuntimeError, match=r"added must be contiguous float32 on the CPU, \(3, 2\)"):
        operators.forward(x, weight, None, 0, None, None, 0.0, torch.zeros(3, 4))
    with pytest.raises(RuntimeError, match=r"weight must be contiguous float32 on the CPU, \(\*, 4\)"):
        operators.forward(x, torch.zeros(2, 5), None)
    with pytest.raises(RuntimeError, match=r"weight must not be empty"):
        operators.forward(torch.zeros(3, 0), torch.zeros(2, 0), None)
    with pytest.raises(RuntimeError, match=r"weight must not be empty"):
        operators.pack(torch.zeros(2, 0))
    with pytest.raises(RuntimeError, match=r"packed weight must be contiguous float32 on the CPU, \(32, 4\)"):
        operators.forward_packed(x, weight, None, 2, 4)
    with pytest.raises(RuntimeError, match=r"a residual has as many channels as x"):
        w1, w2 = (operators.pack(part, 4) for part in (torch.zeros(5, 4), torch.zeros(2, 5)))
        operators.mlp_packed(x, w1, None, w2, None, 5, 2, 4, None, None, 0.0, True)
    with pytest.raises(RuntimeError, match=r"packed w2 must be contiguous float32 on the CPU, \(32, 33\)"):
        operators.mlp_packed(x, torch.zeros(64, 4), None, torch.zeros(33, 32), None, 33, 2, 4)
    with pytest.raises(RuntimeError, match=r"grad must be contiguous float32 on the CPU, \(3, 2\)"):
        operators.backward(torch.zeros(3, 3), x, weight, True, True)
    with pytest.raises(RuntimeError, match=r"h must be contiguous float32 on the CPU, \(3, 32\)"):
        arguments = (torch.zeros(3, 2), x, torch.zeros(3, 5), [3], torch.zeros(1, 6, 4), torch.zeros(1, 2, 6))
        operators.mlp_backward(*arguments, True, True, True)


# --- Models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointed", [False, True])
def test_models_give_the_same_logits_and_gradients(calls, checkpointed):
    shape = {"img_size": 24, "patch_size": 2, "embed_dim": 8, "depths": [2, 1], "num_heads": [1, 2], "window_size": 6}
    model = fill(SwinTransformer(**shape, num_classes=5, drop_path_rate=0.0, use_checkpoint=checkpointed)).eval()
    images = golden_images(3, 2, 24)
    kernel.PROBLEM = "not here"
    expected = logits_and_gradients(model, images)
    assert not calls
    kernel.PROBLEM = ""
    check_same(logits_and_gradients(model, images), expected, 1e-4)
    assert calls.count("mlp") == (6 if checkpointed else 3) and "linear" in calls
    with torch.no_grad():
        check_same([model(images)], expected[:1], 1e-4)


@pytest.mark.parametrize("kind", ["swin/swin_tiny_patch4_window7_224", "swinv2/swinv2_tiny_patch4_window8_256"])
def test_golden_models(calls, kind):
    name = f"configs/{kind}.yaml"
    expected = golden("models")[name]
    model = fill(build_model(make_config(name, "MODEL.NUM_CLASSES", expected["num_classes"]))).eval()
    logits = model(golden_images(expected["input_seed"], expected["batch"], expected["img_size"]))
    loss = F.cross_entropy(logits, torch.arange(expected["batch"]) % expected["num_classes"])
    loss.backward()
    torch.testing.assert_close(logits[:, :10], torch.tensor(expected["logits_first10"]), atol=2e-4, rtol=1e-4)
    assert loss.item() == pytest.approx(expected["loss"], abs=1e-4, rel=1e-5)
    norms = {name: parameter.grad.norm().item() for name, parameter in model.named_parameters()}
    assert {name: norms[name] for name in expected["grad_norms"]} == pytest.approx(expected["grad_norms"], rel=1e-3)
    assert calls.count("mlp") == 12


@pytest.mark.parametrize(
    "amd, avx512, problem, takes",
    [
        (True, False, "", True),
        (False, True, "", True),
        (True, True, "", False),
        (False, False, "", False),
        (True, False, "not built", False),
    ],
)
def test_which_processors_take_them(calls, monkeypatch, amd, avx512, problem, takes):
    """AMD's without AVX-512 and Intel's with it: on the others, nobody has measured them."""
    monkeypatch.setattr(module, "is_amd", lambda: amd)
    monkeypatch.setattr(module, "has_avx512", lambda: avx512)
    monkeypatch.setattr(kernel, "PROBLEM", problem)
    layer, x = Mlp(8, 16), torch.randn(3, 8)
    y = layer(x)
    torch.testing.assert_close(y, F.linear(F.gelu(F.linear(x, *layer.fc1.parameters())), *layer.fc2.parameters()))
    assert bool(calls) == takes


@pytest.mark.parametrize("rows, trains", [(1, False), (2, False), (9, True), (10, True)])
@pytest.mark.parametrize("layer, name, limit", [(Linear, "linear", "LEAST_WORK"), (Mlp, "mlp", "LEAST_WORK_OF_MLP")])
def test_one_row_and_small_layers_in_training_are_left_to_pytorch(calls, monkeypatch, rows, trains, layer, name, limit):
    monkeypatch.setattr(module, "FEWEST_ROWS", 2)
    monkeypatch.setattr(module, limit, 10 * 8 * 16)
    with torch.set_grad_enabled(trains):
        layer(8, 16)(torch.randn(1, rows, 8))
    assert (name in calls) == (rows in (2, 10))
