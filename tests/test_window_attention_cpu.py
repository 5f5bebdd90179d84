"""kernels/window_attention on a CPU, by its extension: against float64, in models, and where ``auto`` takes it.

Cases and comparisons are those of tests/test_window_attention.py.
"""

import extensions
import pytest
import torch
from conftest import ROOT, fill, golden, golden_images, make_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_window_attention import MODELS, check_same, compare, draw, logits_and_gradients, run, shapes
from torch.utils.flop_counter import FlopCounterMode

from kernels.window_attention import attend, cpu, geometry, operators, reference
from models import attention, build_model
from models.attention import set_attention_backend
from models.layers import window_mask
from models.swin_transformer import SwinTransformer, WindowAttention

SOURCE = ROOT / "kernels" / "window_attention"
pytestmark = pytest.mark.skipif(geometry.INTERPRETED, reason="Triton's interpreter takes its place")


@pytest.fixture(scope="session")
def built(request):
    return extensions.load(request, SOURCE)


@pytest.fixture
def extension(built, monkeypatch):
    """The operators; models use them."""
    monkeypatch.setattr(cpu, "PROBLEM", "")
    return torch.ops.swin_cpu


@pytest.fixture
def calls(extension, monkeypatch) -> list[tuple]:
    """The shapes of the maps that the extension has been given."""
    seen, forward = [], cpu.forward

    def spy(qkv, *rest):
        seen.append(tuple(qkv.shape))
        return forward(qkv, *rest)

    monkeypatch.setattr(cpu, "forward", spy)
    return seen


def lanes(extension) -> list[int]:
    """Those that this processor can run, besides the ones that it chooses."""
    qkv, bias, _ = draw(1, 2, 2, 1, 4, (2, 2), False, torch.float32)
    found = []
    for count in (4, 8, 16):
        try:
            extension.attend(qkv, bias, None, 1, [2, 2], [0, 0], False, 1.0, count)
        except RuntimeError as err:
            assert f"no code of {count} lanes runs on this processor" in str(err)
        else:
            found.append(count)
    return found


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shape=shapes(), seed=st.integers(0, 99))
def test_outputs_and_gradients_are_those_of_float64(extension, shape, seed):
    if shape["dtype"] == torch.float16:
        shape["dtype"] = torch.bfloat16
    compare(**shape, seed=seed)


# B, map, heads, their width, window, shift: stages of Swin and SwinV2, the limits, odd sizes.
REAL = [
    (2, (14, 14), 3, 32, (7, 7), (3, 3)),
    (1, (16, 16), 2, 32, (8, 8), (4, 4)),
    (1, (24, 12), 2, 32, (12, 12), (6, 0)),
    (1, (48, 24), 1, 40, (24, 24), (12, 0)),
    (1, (17, 9), 2, 24, (7, 14), (3, 7)),
    (1, (6, 6), 1, 128, (3, 3), (1, 1)),
    (3, (4, 6), 2, 5, (1, 2), (0, 1)),
    (1, (2, 2), 1, 1, (1, 1), (0, 0)),
]
real = pytest.mark.parametrize("shape", REAL, ids=lambda shape: f"{shape[4][0]}x{shape[4][1]}of{shape[3]}")


@pytest.mark.parametrize("dtype", cpu.DTYPES)
@pytest.mark.parametrize("cosine", [False, True])
@real
def test_every_instruction_set_agrees_with_float64(extension, shape, cosine, dtype):
    B, (H, W), num_heads, D, window, shift = shape
    qkv, bias, logit_scale = draw(B, H, W, num_heads, D, window, cosine, dtype)
    arguments = (num_heads, window, shift, any(shift), 1.0 if cosine else D**-0.5)
    exact = [x if x is None else x.double() for x in (qkv, bias, logit_scale)]
    grad = reference.attend(*exact, *arguments).to(dtype)
    expected = run(reference.attend, exact, grad.double(), arguments)
    for count in lanes(extension):
        out = extension.attend(qkv, bias, logit_scale, *arguments, count)
        grads = extension.attend_backward(grad, qkv, bias, logit_scale, *arguments, count)
        results = [out, *(grads if cosine else grads[:2])]
        for name, ours, theirs in zip(("out", "qkv", "bias", "scale"), results, expected, strict=False):
            if window != (1, 1) or name in ("out", "qkv"):  # one key alone: no gradient but that of v
                error = (ours.double().flatten() - theirs.flatten()).norm() / theirs.norm()
                assert error < (1e-5 if dtype == torch.float32 or name in ("bias", "scale") else 5e-3), (count, name)


@pytest.mark.parametrize("shape", REAL[:2])
def test_gradients_are_the_same_bits_for_any_number_of_threads(extension, shape):
    B, (H, W), num_heads, D, window, shift = shape
    inputs, threads = draw(B, H, W, num_heads, D, window, True, torch.float32), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            results.append(run(attend, inputs, None, (num_heads, window, shift, True, 1.0)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_very_negative_logits_weigh_nothing_and_large_ones_do_not_overflow(extension):
    qkv, bias, _ = draw(1, 2, 2, 1, 4, (2, 2), False, torch.float32)
    qkv[..., :8] *= 1e4
    expected = reference.attend(qkv.double(), bias.double(), None, 1, (2, 2), (0, 0), False, 1.0)
    torch.testing.assert_close(attend(qkv, bias, None, 1, (2, 2), (0, 0), False, 1.0).double(), expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", ["q", "k", "v", "bias", "grad"])
def test_what_is_not_finite_shows_where_it_does_in_float64(extension, place, bad):
    qkv, bias, _ = draw(1, 4, 4, 1, 8, (2, 4), False, torch.float32)
    grad = torch.ones(1, 4, 4, 8)
    if place == "grad":
        grad[0, 0, 1, 2] = bad
    elif place == "bias":
        bias[0, 1, 2] = bad
    else:
        qkv[0, 0, 1, "qkv".index(place) * 8 + 2] = bad
    arguments = (1, (2, 4), (0, 0), False, 0.3)
    expected = run(reference.attend, [qkv.double(), bias.double(), None], grad.double(), arguments)
    for ours, theirs in zip(run(attend, [qkv, bias, None], grad, arguments), expected, strict=True):
        assert torch.equal(ours.isfinite(), theirs.isfinite())


def test_second_and_forward_mode_derivatives_are_refused(extension):
    qkv, bias, _ = draw(1, 4, 4, 1, 8, (2, 2), False, torch.float32)
    qkv.requires_grad_()
    out = attend(qkv, bias, None, 1, (2, 2), (0, 0), False, 1.0)
    (grad,) = torch.autograd.grad(out.square().sum(), qkv, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"no second derivatives; choose MODEL.ATTENTION_BACKEND reference"):
        grad.sum().backward()
    layer = WindowAttention(16, 4, 2).requires_grad_(False)
    layer.backend = "fused"
    with pytest.raises(ValueError, match="it has no forward-mode derivatives; choose auto"):
        torch.func.jvp(layer, (torch.randn(1, 8, 8, 16),), (torch.randn(1, 8, 8, 16),))


def test_opcheck(extension):
    inputs = [x.requires_grad_() for x in draw(1, 2, 3, 1, 8, (2, 3), True, torch.float32)]
    arguments = (1, [2, 3], [1, 1], True, 0.3)
    torch.library.opcheck(operators.forward, (*inputs, *arguments))
    with torch.no_grad():
        out, lse = operators.forward(*inputs, *arguments)
    torch.library.opcheck(operators.backward, (out, *inputs, None, lse, *arguments), test_utils="test_faketensor")


def test_inputs_need_not_be_contiguous_and_batches_may_be_empty(extension):
    qkv, bias, _ = draw(1, 4, 6, 2, 8, (2, 3), False, torch.float32)
    arguments = (2, (2, 3), (1, 1), True, 0.3)
    expected = run(attend, [qkv, bias, None], qkv[..., :16], arguments)
    qkv, bias = qkv.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0), bias.mT.contiguous().mT
    assert not qkv.is_contiguous() and not bias.is_contiguous()
    for a, b in zip(run(attend, [qkv, bias, None], qkv[..., :16], arguments), expected, strict=True):
        assert torch.equal(a, b)
    for empty in (qkv[:0], qkv[:, :0]):
        nothing = run(attend, [empty, bias, None], None, arguments)
        assert nothing[0].shape == (*empty.shape[:3], 16) and not nothing[2].any()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"qkv": torch.zeros(1, 4, 4, 25)}, "qkv must be"),
        ({"qkv": torch.zeros(1, 4, 4, 24, dtype=torch.float64)}, "float32 or bfloat16"),
        ({"qkv": torch.zeros(1, 4, 24, 4).mT}, "must be contiguous"),
        ({"bias": torch.zeros(1, 4, 1).expand(1, 4, 4)}, "must be contiguous"),
        ({"window": [2, 0]}, "window must be two positive numbers"),
        ({"window": [24, 25]}, "a window must have 576 tokens or fewer"),
        ({"qkv": torch.zeros(1, 4, 4, 3 * 129)}, "heads must be 128 channels wide or fewer"),
        ({"shift": [2, 0]}, "shift must be two numbers within the window"),
        ({"bias": torch.zeros(1, 4, 3)}, "bias must be"),
        ({"logit_scale": torch.zeros(2)}, "logit_scale must have a number for each head"),
    ],
)
def test_wrong_arguments_are_errors_not_crashes(extension, change, message):
    call = {"qkv": torch.zeros(1, 4, 4, 24), "bias": torch.zeros(1, 4, 4), "logit_scale": None, "heads": 1}
    call |= {"window": [2, 2], "shift": [0, 0], "masked": False, "scale": 1.0} | change
    with pytest.raises(RuntimeError, match=message):
        extension.attend(**call)
    with pytest.raises(RuntimeError, match=message):
        extension.attend_backward(torch.zeros(1, 4, 4, 8), **call)


@pytest.mark.parametrize("grad", [torch.zeros(1), torch.zeros(1, 4, 4, 8).bfloat16(), torch.zeros(1, 4, 8, 4).mT])
def test_gradients_of_another_shape_type_or_order_are_errors(extension, grad):
    qkv, bias, _ = draw(1, 4, 4, 1, 8, (2, 2), False, torch.float32)
    with pytest.raises(RuntimeError, match="grad must be"):
        extension.attend_backward(grad, qkv, bias, None, 1, [2, 2], [0, 0], False, 1.0)


# --- Models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_models_give_the_same_logits_and_gradients(calls, kind):
    size = 22 if kind == "v1" else 24  # 22: maps of 11, padded to 12
    shape = {"img_size": size, "patch_size": 2, "embed_dim": 8, "depths": [2, 1], "num_heads": [1, 2]}
    shape |= {"window_size": 4 if kind == "v1" else 6, "num_classes": 5, "drop_path_rate": 0.0}
    model, images = fill(MODELS[kind](**shape)).eval(), golden_images(3, 2, size)
    set_attention_backend(model, "reference")
    expected = logits_and_gradients(model, images)
    assert not calls
    set_attention_backend(model, "auto")
    check_same(logits_and_gradients(model, images), expected, 1e-4)
    with torch.no_grad():
        check_same([torch.cat(list(model(images)[:1])) if kind == "moe" else model(images)], expected[:1], 1e-4)
    assert len(calls) == 6


@pytest.mark.parametrize("kind", ["swin/swin_tiny_patch4_window7_224", "swinv2/swinv2_tiny_patch4_window8_256"])
def test_golden_models(calls, kind):
    name = f"configs/{kind}.yaml"
    expected = golden("models")[name]
    config = make_config(name, "MODEL.NUM_CLASSES", expected["num_classes"], "MODEL.ATTENTION_BACKEND", "fused")
    model = fill(build_model(config)).eval()
    logits = model(golden_images(expected["input_seed"], expected["batch"], expected["img_size"]))
    loss = torch.nn.functional.cross_entropy(logits, torch.arange(expected["batch"]) % expected["num_classes"])
    loss.backward()
    torch.testing.assert_close(logits[:, :10], torch.tensor(expected["logits_first10"]), atol=2e-4, rtol=1e-4)
    assert loss.item() == pytest.approx(expected["loss"], abs=1e-4, rel=1e-5)
    norms = {name: parameter.grad.norm().item() for name, parameter in model.named_parameters()}
    assert {name: norms[name] for name in expected["grad_norms"]} == pytest.approx(expected["grad_norms"], rel=1e-3)
    assert len(calls) == 12


SMALL = {"img_size": 8, "patch_size": 2, "embed_dim": 8, "depths": [2], "num_heads": [1], "window_size": 2}


def small_model() -> SwinTransformer:
    return fill(SwinTransformer(**SMALL, num_classes=5, drop_path_rate=0.0)).eval()


def test_models_under_compilers_and_autocast(extension):
    model, images = small_model(), golden_images(3, 2, 8)
    set_attention_backend(model, "reference")
    expected = logits_and_gradients(model, images)
    set_attention_backend(model, "auto")
    with torch.autocast("cpu", torch.bfloat16):
        check_same(logits_and_gradients(model, images), expected, 0.1)
    graphs = []

    def backend(graph, _):
        graphs.append(str(graph.graph))
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    check_same(logits_and_gradients(compiled, images), expected, 1e-4)
    assert graphs[0].count("swin.window_attention") == 2
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    check_same(logits_and_gradients(compiled, images), expected, 1e-4)


def test_exported_traced_and_counted_models_have_pytorchs_operations(calls):
    """Those that other programs know, and counters can count."""
    model, images = small_model(), golden_images(3, 2, 8)
    with torch.no_grad():
        expected = model(images)
        assert len(calls) == 2
        exported = torch.export.export(model, (images,))
        assert "swin.window_attention" not in str(exported.graph)
        torch.testing.assert_close(exported.module()(images), expected, atol=1e-5, rtol=1e-5)
        traced = torch.jit.trace(model, images, check_trace=False)
        torch.testing.assert_close(traced(images), expected, atol=1e-5, rtol=1e-5)
        with FlopCounterMode(display=False) as counter:
            model(images)
        assert any("scaled_dot" in str(operation) for operation in counter.get_flop_counts()["Global"])
    assert len(calls) == 2


def test_auto_leaves_to_others_what_it_cannot(calls):
    layer, x, mask = WindowAttention(16, 4, 2), torch.randn(1, 8, 8, 16), window_mask((8, 8), 4, 2)
    layer(x, mask, 2)
    assert len(calls) == 1
    layer.double()(x.double(), mask.double(), 2)  # float64
    layer.float()(x, mask + 0, 0)  # a mask of the caller's own
    layer(x.view(4, 16, 16))  # windows that are cut already
    layer.attn_drop.p = 0.1
    layer.train()(x, mask, 2)
    assert len(calls) == 1
    layer.eval()(x, mask, 2)
    assert len(calls) == 2


def test_where_it_is_not_built_others_take_its_place_and_its_name_says_why(monkeypatch):
    monkeypatch.setattr(cpu, "PROBLEM", f"the extension for CPUs is not built: no module; {cpu.INSTALL}")
    layer, x = WindowAttention(16, 4, 2), torch.randn(1, 8, 8, 16)
    layer(x)
    layer.backend = "fused"
    with pytest.raises(ValueError, match=r"^MODEL.ATTENTION_BACKEND='fused': the extension .* pip install .*; choose"):
        layer(x)
    assert not attention.takes_fused("auto", torch.empty(1, 4, 4, 24), None, 1, (2, 2), (0, 0), 0.0)
