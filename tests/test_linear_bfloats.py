"""kernels/linear in bfloat16, on processors that multiply it: against float64, and in models under autocast."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import fill, golden, golden_images, make_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_linear_cpu import JOINED, small_block
from test_linear_cpu import built as built
from test_linear_cpu import calls as calls
from test_linear_cpu import operators as operators
from torch import nn
from torch.profiler import ProfilerActivity, profile

from compilation import compile_in_place
from kernels import linear as kernel
from kernels.linear import operators as compiled
from models import build_model
from models.layers import Linear, Mlp
from models.swin_transformer import SwinTransformer

LANES = 512
HALF_A_STEP = 2**-8  # of bfloat16, as a share of a number
PROPERTY = {"deadline": None, "derandomize": True, "suppress_health_check": [HealthCheck.function_scoped_fixture]}

sizes = st.one_of(st.integers(1, 40), st.sampled_from([64, 96, 97, 200, 1025]))
rows_of_all_paths = st.one_of(sizes, st.sampled_from([800, 1700]))


@pytest.fixture(autouse=True)
def of_bfloats(operators):
    if not kernel.BFLOATS:
        pytest.skip("this processor does not multiply bfloat16 in tile registers")
    assert kernel.BFLOATS == LANES


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


def rounded(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.bfloat16().double()


def product(x, weight, bias):
    """Of what the kernels multiply, in float64, and the sum of its terms' sizes."""
    x, weight = rounded(x), rounded(weight)
    return F.linear(x, weight, None if bias is None else bias.double()), F.linear(x.abs(), weight.abs())


def close(ours: torch.Tensor, exact: torch.Tensor) -> None:
    """Within twice of what rounding hidden values and results to bfloat16 makes."""
    assert ours.dtype == torch.bfloat16 and ours.shape == exact.shape
    assert (ours.double() - exact).norm() <= 4e-3 * exact.norm()


@settings(max_examples=40, **PROPERTY)
@given(rows=rows_of_all_paths, inputs=sizes, outputs=sizes, bias=st.booleans())
def test_every_number_of_a_layer_is_the_exact_one_rounded(operators, rows, inputs, outputs, bias):
    torch.manual_seed(rows)
    x, weight = torch.randn(rows, inputs).bfloat16(), torch.randn(outputs, inputs)
    added = torch.randn(outputs) if bias else None
    y = operators.forward(x, weight, added)
    exact, terms = product(x, weight, added)
    assert y.dtype == torch.bfloat16
    assert ((y.double() - exact).abs() <= HALF_A_STEP * exact.abs() + 1e-6 * (terms + 1)).all()
    assert torch.equal(operators.forward_packed(x, operators.pack(weight, LANES), added, outputs), y)


@settings(max_examples=40, **PROPERTY)
@given(
    rows=rows_of_all_paths, channels=sizes, hidden=sizes, outputs=sizes, biases=st.tuples(st.booleans(), st.booleans())
)
def test_mlps_are_those_of_float64(operators, rows, channels, hidden, outputs, biases):
    torch.manual_seed(rows)
    x, w1, w2 = torch.randn(rows, channels), torch.randn(hidden, channels) / channels**0.5, torch.randn(outputs, hidden)
    b1, b2 = (torch.randn(n) if wanted else None for n, wanted in zip((hidden, outputs), biases, strict=True))
    batched = [None if part is None else part[None] for part in (w1, b1, w2, b2)]
    y = operators.mlp(x.bfloat16(), [rows], *batched, True, False)[0]
    b1_exact, b2_exact = (None if part is None else part.double() for part in (b1, b2))
    close(y, F.linear(F.gelu(F.linear(rounded(x), rounded(w1), b1_exact)), rounded(w2), b2_exact))
    packed = operators.pack(w1, LANES), b1, operators.pack(w2, LANES), b2
    assert torch.equal(operators.mlp_packed(x.bfloat16(), *packed, hidden, outputs), y)


@settings(max_examples=30, **PROPERTY)
@given(
    rows=rows_of_all_paths,
    channels=sizes,
    hidden=sizes,
    eps=st.sampled_from([1e-5, 1e-2]),
    biases=st.tuples(st.booleans(), st.booleans()),
)
def test_mlps_with_norm_and_residual_are_those_of_float64(operators, rows, channels, hidden, eps, biases):
    torch.manual_seed(rows)
    x, norm_weight, norm_bias = (3 * torch.randn(rows, channels) + 1).bfloat16(), *torch.randn(2, channels)
    w1, w2 = torch.randn(hidden, channels) / channels**0.5, torch.randn(channels, hidden)
    b1, b2 = (torch.randn(n) if wanted else None for n, wanted in zip((hidden, channels), biases, strict=True))
    y = operators.residual_mlp(x, norm_weight, norm_bias, eps, w1, b1, w2, b2)
    exact = [part if part is None else part.double() for part in (x, norm_weight, norm_bias, b1, b2)]
    normed = F.layer_norm(exact[0], (channels,), *exact[1:3], eps)
    mixed = F.linear(F.gelu(F.linear(normed, rounded(w1), exact[3])), rounded(w2), exact[4])
    close(y, exact[0] + mixed)


def test_layers_with_norm_and_residual_are_those_of_float64(operators):
    torch.manual_seed(0)
    for rows, channels, outputs in ((5, 7, 9), (300, 96, 70), (700, 200, 96)):
        x, residual = (3 * torch.randn(rows, channels) + 1).bfloat16(), torch.randn(rows, outputs).bfloat16()
        norm, weight, bias = torch.randn(2, channels), torch.randn(outputs, channels), torch.randn(outputs)
        y = operators.forward(x, weight, bias, 0, *norm, 1e-5, residual)
        normed = F.layer_norm(x.double(), (channels,), *norm.double(), 1e-5)
        close(y, F.linear(normed, rounded(weight), bias.double()) + residual.double())


def test_gelu_is_that_of_float64_everywhere(operators):
    one, x = (
        torch.ones(1, 1, 1),
        torch.cat([torch.linspace(-12, 12, 20001), torch.tensor([-1e30, -100.0, 100.0, 1e30])]),
    )
    x = x.bfloat16()
    y = operators.mlp(x[:, None], [len(x)], one, None, one, None, True, False)[0][:, 0].double()
    exact = F.gelu(x.double())
    assert ((y - exact).abs() <= HALF_A_STEP * exact.abs() + 1.1e-5).all()


def test_weights_are_rounded_as_pytorch_rounds_them_and_rows_not_at_all(operators):
    torch.manual_seed(0)
    weight = torch.randn(70, 40) * 10.0 ** torch.randint(-30, 30, (70, 40))
    weight[:3] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 3.3e38])[:, None]  # ties, and near the largest
    one = torch.eye(40).bfloat16()
    assert torch.equal(operators.forward(one, weight, None), weight.bfloat16().t())
    x = weight.bfloat16()
    assert torch.equal(operators.forward(x, torch.eye(40), None), x)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", ["x", "fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"])
def test_what_is_not_finite_shows_where_it_does_in_pytorch(operators, bad, place):
    torch.manual_seed(0)
    layer, x = Mlp(9, 20), torch.randn(7, 9)
    {"x": x, **dict(layer.named_parameters())}[place].data.view(-1)[3] = bad
    results = []
    for lanes in (LANES, 0):
        kernel.BFLOATS = lanes
        with autocast(), torch.no_grad():
            results.append(layer(x).isfinite())
    assert torch.equal(*results)


@pytest.mark.parametrize("rows, channels", [(2000, 70), (300, 70), (300, 20)])
def test_results_are_the_same_bits_for_any_number_of_threads(operators, rows, channels):
    torch.manual_seed(0)
    layer, x, results = nn.Sequential(Linear(33, channels), Mlp(channels, 250)), torch.randn(rows, 33), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 8, 1):
            torch.set_num_threads(threads)
            with autocast(), torch.no_grad():
                results.append(layer(x))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(4, 3, dtype=torch.bfloat16).t()}, r"x must be contiguous bfloat16 on the CPU, \(\*, \*\)"),
        ({"x": torch.zeros(3, 4, dtype=torch.float16)}, r"x must be contiguous float32 on the CPU, \(\*, \*\)"),
        ({"w1": torch.zeros(1, 6, 4, dtype=torch.bfloat16)}, r"w1 must be contiguous float32 on the CPU"),
        ({"keep": True}, r"of bfloat16 there are no gradients"),
        ({"lanes": 16}, r"code of 16 lanes takes other numbers than x"),
        ({"x": torch.zeros(3, 4), "lanes": LANES}, r"code of 512 lanes takes other numbers than x"),
    ],
)
def test_wrong_arguments_are_errors_not_crashes(operators, change, message):
    call = {"x": torch.zeros(3, 4).bfloat16(), "w1": torch.zeros(1, 6, 4), "w2": torch.zeros(1, 2, 6), "keep": False}
    with pytest.raises(RuntimeError, match=message):
        operators.mlp(**(call | change), counts=[3], b1=None, b2=None, across=True)


def test_gradients_are_of_float32_alone(operators):
    x, weight, hidden, w2 = torch.zeros(3, 4), torch.zeros(2, 4), torch.zeros(3, 32), torch.zeros(1, 2, 6)
    with pytest.raises(RuntimeError, match=r"x must be contiguous float32 on the CPU, \(\*, \*\)"):
        operators.backward(x.bfloat16(), x.bfloat16(), weight, True, True)
    with pytest.raises(RuntimeError, match=r"code of 512 lanes takes other numbers than x"):
        operators.backward(weight.t().contiguous()[:3], x, weight, True, True, LANES)
    with pytest.raises(RuntimeError, match=r"code of 512 lanes takes other numbers than x"):
        arguments = (torch.zeros(3, 2), x, hidden, [3], torch.zeros(1, 6, 4), w2)
        operators.mlp_backward(*arguments, True, True, True, LANES)


# --- Modules and models under autocast --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_modules_take_what_autocast_takes(calls, dtype):
    torch.manual_seed(0)
    x = torch.randn(2, 7, 24)
    for layer, name in ((Linear(24, 10), "linear"), (Mlp(24, 40, 10), "mlp")):
        with autocast(), torch.no_grad():
            for data in (x, x.transpose(0, 1).contiguous().transpose(0, 1)):
                close(layer(data.to(dtype)), copy.deepcopy(layer).double()(rounded(x)))
        assert calls == [name] * 2
        calls.clear()


def test_others_compute_what_the_kernels_do_not(calls):
    """Gradients, other precisions, weights or biases in bfloat16, no rows."""
    layer, x = Mlp(8, 16), torch.randn(3, 8)
    with autocast():
        layer(x).sum().backward()
        with torch.no_grad():
            Linear(8, 4)(x[:0])
    with torch.autocast("cpu", torch.float16), torch.no_grad():
        layer(x)
    half = copy.deepcopy(layer)
    half.fc1.bias.data, half.fc2.bias.data = half.fc1.bias.data.bfloat16(), half.fc2.bias.data.bfloat16()
    with autocast(), torch.no_grad():
        half(x)
        half.fc1(x)
    with torch.no_grad():
        layer.bfloat16()(x.bfloat16())
        with autocast():
            layer(x.bfloat16())
    assert not calls


def test_a_block_joins_norms_and_residuals_to_its_layers(calls):
    block, x = small_block(), torch.randn(2, 49, 24)
    with autocast(), torch.no_grad():
        y = block(x.bfloat16())
        assert calls == JOINED and y.dtype == torch.bfloat16
        calls.clear()
        kept = block(x)  # a residual in float32 stays so
        assert calls == ["linear", "linear", "mlp"] and kept.dtype == torch.float32
    exact = copy.deepcopy(block).double()(x.double())
    for ours in (y, kept):
        assert (ours.double() - exact).norm() <= 1e-2 * exact.norm()


@pytest.mark.parametrize("kind", ["swin/swin_tiny_patch4_window7_224", "swinv2/swinv2_tiny_patch4_window8_256"])
def test_golden_models(calls, kind):
    """As near to the official logits, which are of float32, as PyTorch's layers under autocast come."""
    name = f"configs/{kind}.yaml"
    expected = golden("models")[name]
    model = fill(build_model(make_config(name, "MODEL.NUM_CLASSES", expected["num_classes"]))).eval()
    images = golden_images(expected["input_seed"], expected["batch"], expected["img_size"])
    exact, away = torch.tensor(expected["logits_first10"]), []
    for lanes in (0, LANES):
        kernel.BFLOATS = lanes
        assert not calls
        with autocast(), torch.no_grad():
            away.append((model(images)[:, :10].float() - exact).norm() / exact.norm())
    assert calls.count("mlp") + calls.count("residual_mlp") == 12
    assert away[1] <= max(1e-2, 1.2 * away[0])


def test_compiled_models_take_them_with_weights_that_are_packed_once(operators):
    shape = {"img_size": 24, "patch_size": 2, "embed_dim": 8, "depths": [2, 1], "num_heads": [1, 2], "window_size": 6}
    model, images = fill(SwinTransformer(**shape, num_classes=5)).eval(), golden_images(3, 2, 24)
    with autocast(), torch.no_grad():
        expected = model(images)
        compile_in_place(model, images.device, "default")
        torch.testing.assert_close(model(images), expected, atol=5e-2, rtol=5e-2)
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            model(images)
    names = {event.key for event in recorded.key_averages()}
    assert {"swin_linear::forward_packed", "swin_linear::mlp_packed"} <= names and "swin_linear::pack" not in names


def test_opcheck(operators):
    x, weight, w2 = torch.randn(6, 4).bfloat16(), torch.randn(5, 4), torch.randn(3, 5)
    widths = [compiled.packed_width(part.shape[1], LANES) for part in (weight, w2)]
    torch.library.opcheck(compiled.pack_weight, (weight, LANES, widths[0]))
    packed1, packed2 = (compiled.pack_weight(part, LANES, n) for part, n in zip((weight, w2), widths, strict=True))
    torch.library.opcheck(compiled.linear_packed, (x, packed1, torch.randn(5), 5))
    torch.library.opcheck(compiled.mlp_packed, (x, packed1, None, packed2, torch.randn(3), 5, 3))
