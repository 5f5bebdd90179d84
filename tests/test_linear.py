"""Linear layers by oneDNN beside PyTorch's, in training and in inference."""

import pytest
import torch
from torch import nn

from models import linear as module
from models.layers import Mlp
from models.linear import Linear, has_pointwise, linear_act

needs_pointwise = pytest.mark.skipif(not has_pointwise(), reason="this PyTorch has no such operator")


@pytest.fixture
def amd(monkeypatch):
    """Any processor taken for one of AMD's with AVX-512."""
    monkeypatch.setattr(module, "is_amd", lambda: True)
    monkeypatch.setattr(module, "has_avx512", lambda: True)


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The activations that the operator for inference was called with."""
    seen, run = [], module._pointwise

    def spy(x, weight, bias, activation):
        seen.append(activation)
        return run(x, weight, bias, activation)

    has_pointwise()  # its own calls are not counted
    monkeypatch.setattr(module, "_pointwise", spy)
    return seen


@pytest.mark.parametrize("shape", [(5, 6), (2, 7, 6), (2, 3, 4, 6), (0, 6)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_by_onednn_is_linear(monkeypatch, shape, bias):
    """Values and gradients, on data that is contiguous and that is not."""
    torch.manual_seed(0)
    layer, x = Linear(6, 4, bias=bias), torch.randn(*shape, requires_grad=True)
    results = []
    monkeypatch.setattr(module, "has_avx512", lambda: True)
    for amd in (True, False):
        monkeypatch.setattr(module, "is_amd", lambda amd=amd: amd)
        for data in (x, x.transpose(0, -1).contiguous().transpose(0, -1)):
            y = layer(data)
            gradients = torch.autograd.grad(y.sin().sum(), [x, *layer.parameters()])
            results.append([y.detach(), *gradients])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert a.is_contiguous() == b.is_contiguous() or a.ndim > 1
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@needs_pointwise
@pytest.mark.parametrize("shape", [(5, 64), (2, 49, 64), (2, 3, 4, 64)])
@pytest.mark.parametrize("bias", [True, False])
def test_inference_by_onednn_is_linear_and_gelu(amd, calls, shape, bias):
    torch.manual_seed(0)
    layer, x = Linear(64, 32, bias=bias), torch.randn(*shape)
    exact = nn.Linear(64, 32, bias=bias).double()
    exact.load_state_dict(layer.state_dict())
    for data in (x, x.transpose(0, -1).contiguous().transpose(0, -1)):
        for context in (torch.no_grad(), torch.inference_mode()):
            with context:
                expected = exact(data.double())
                torch.testing.assert_close(layer(data).double(), expected, atol=1e-5, rtol=1e-5)
                expected = nn.functional.gelu(expected)
                torch.testing.assert_close(linear_act(data, layer, nn.GELU()).double(), expected, atol=1e-5, rtol=1e-5)
    assert calls == ["none", "gelu"] * 4


def test_an_operator_that_is_not_as_expected_is_not_taken(amd, monkeypatch):
    wrong = [lambda x, weight, bias, activation: nn.functional.linear(x, weight, bias)]  # without GELU
    for error in (AttributeError, RuntimeError, TypeError):
        wrong.append(lambda *_, error=error: (_ for _ in ()).throw(error()))
    layer, x = Linear(6, 4), torch.randn(2, 6)
    with torch.no_grad():
        expected = nn.functional.gelu(nn.functional.linear(x, layer.weight, layer.bias))
        for operator in wrong:
            monkeypatch.setattr(module, "_pointwise", operator)
            has_pointwise.cache_clear()
            assert not has_pointwise()
            torch.testing.assert_close(linear_act(x, layer, nn.GELU()), expected)
    has_pointwise.cache_clear()


@pytest.mark.parametrize("watched", ["fc1", "act"])
def test_hooks_see_what_is_between_layer_and_activation(amd, calls, watched):
    mlp, x, seen = Mlp(8, 16), torch.randn(3, 8), []
    mlp.get_submodule(watched).register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    with torch.no_grad():
        mlp(x)
        before = nn.functional.linear(x, mlp.fc1.weight, mlp.fc1.bias)
        expected = (x, before) if watched == "fc1" else (before, nn.functional.gelu(before))
    torch.testing.assert_close(seen, [expected])
    assert "gelu" not in calls


@pytest.mark.parametrize("act", [nn.ReLU(), nn.GELU("tanh")])
def test_other_activations_and_layers_run_as_they_are(amd, calls, act):
    x = torch.randn(3, 8)
    for layer in (Linear(8, 4), nn.Linear(8, 4), nn.Identity()):
        with torch.no_grad():
            torch.testing.assert_close(linear_act(x, layer, act), act(layer(x)))
    assert "gelu" not in calls


def test_gradients_flow_where_only_inputs_or_parameters_need_them(amd):
    x, layer = torch.randn(2, 6), Linear(6, 4)
    linear_act(x, layer, nn.GELU()).sum().backward()
    assert layer.weight.grad.abs().sum() > 0
    layer.requires_grad_(False)
    x.requires_grad_()
    linear_act(x, layer, nn.GELU()).sum().backward()
    assert x.grad.abs().sum() > 0


def test_tangents_flow_without_grad_mode(amd):
    x, layer = torch.randn(2, 6), Linear(6, 4, bias=False)
    with torch.no_grad():
        _, tangent = torch.func.jvp(layer, (x,), (x + 1,))
    torch.testing.assert_close(tangent, (x + 1) @ layer.weight.detach().T)


def test_linear_leaves_other_precisions_to_pytorch(amd, monkeypatch):
    monkeypatch.setattr(module.F, "conv2d", None)
    monkeypatch.setattr(module, "_pointwise", None)
    layer, x = Linear(6, 4), torch.randn(2, 6)
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            with torch.autocast("cpu", torch.bfloat16):
                assert layer(x).dtype == torch.bfloat16
            assert layer.double()(x.double()).dtype == torch.float64
            layer.float()


@needs_pointwise
@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_products_are_written_where_they_belong(monkeypatch, onednn, bias):
    """Of transposed matrices as well, and to rows and columns of others."""
    monkeypatch.setattr(module, "is_amd", lambda: onednn)
    monkeypatch.setattr(module, "has_avx512", lambda: True)
    for x, weight, shape in (
        (torch.randn(5, 6), torch.randn(4, 6).t(), (5, 4)),
        (torch.randn(6, 5).t(), torch.randn(6, 4), (5, 4)),
        (torch.randn(0, 6), torch.randn(6, 4), (0, 4)),
        (torch.randn(5, 0), torch.randn(0, 4), (5, 4)),
    ):
        added = torch.randn(shape[1]) if bias else None
        expected = (x.double() @ weight.double()) + (added.double() if bias else 0)
        torch.testing.assert_close(module.product(x, weight, added).double(), expected, atol=1e-5, rtol=1e-5)
        for out in (torch.empty(2, *shape)[1], torch.empty(shape[::-1]).t()):
            module.product(x, weight, added, out)
            torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
