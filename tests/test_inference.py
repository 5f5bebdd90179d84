"""Short cuts of inference on a CPU, beside what runs with gradients: windows gathered as rows, batches in parts."""

import pytest
import torch
from test_export import tensors
from test_sizes import every_family, small
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from kernels import linear
from kernels.window_attention import cpu
from models import attention, backbone
from models.attention import window_order
from models.layers import window_mask, window_partition
from models.linear import has_pointwise
from models.swin_transformer import SwinTransformer, WindowAttention
from models.swin_transformer_moe import SwinTransformerMoE
from models.swin_transformer_v2 import WindowAttention as WindowAttentionV2

GEOMETRIES = [
    ((8, 12), (4, 4), (0, 0)),
    ((8, 12), (4, 4), (2, 2)),
    ((6, 10), (3, 5), (1, 2)),
    ((6, 10), (3, 5), (0, 2)),
]


@pytest.fixture
def no_kernel(monkeypatch):
    """The fused kernel for CPUs is not built."""
    monkeypatch.setattr(cpu, "PROBLEM", "not built")


@pytest.fixture
def no_linear_kernel(monkeypatch):
    """That for linear layers, which takes whole batches, is not built."""
    monkeypatch.setattr(linear, "PROBLEM", "not built")


@pytest.fixture
def gathered(no_kernel, monkeypatch) -> list[tuple]:
    """The shapes of the maps whose windows were gathered."""
    seen, run = [], attention.AttentionBase._forward_gathered

    def spy(self, x, *rest):
        seen.append(tuple(x.shape))
        return run(self, x, *rest)

    monkeypatch.setattr(attention.AttentionBase, "_forward_gathered", spy)
    return seen


@pytest.mark.parametrize("resolution, window, shift", GEOMETRIES)
def test_window_order_is_roll_and_partition(resolution, window, shift):
    order, back = window_order(resolution, window, shift)
    places = torch.arange(resolution[0] * resolution[1]).view(1, *resolution, 1)
    rolled = torch.roll(places, (-shift[0], -shift[1]), (1, 2))
    assert torch.equal(order, window_partition(rolled, window).flatten())
    assert torch.equal(order[back], torch.arange(len(order)))


@pytest.mark.parametrize("kind", [WindowAttention, WindowAttentionV2])
@pytest.mark.parametrize("resolution, window, shift", GEOMETRIES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-12), (torch.bfloat16, 2e-2)])
def test_gathered_windows_attend_as_rolled_and_cut_ones(gathered, kind, resolution, window, shift, dtype, tolerance):
    torch.manual_seed(0)
    layer = kind(16, window, 2).to(dtype).eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(3, *resolution, 16, dtype=dtype)
    mask = window_mask(resolution, window, shift)
    mask = None if mask is None else mask.to(dtype)
    layer.backend = "reference"
    expected = layer(x, mask, shift).detach()
    layer.backend = "auto"
    for data in (x, x.transpose(1, 2).contiguous().transpose(1, 2)):
        with torch.no_grad():
            out = layer(data, mask, shift)
        assert out.dtype == dtype and out.is_contiguous()
        assert (out - expected).norm() <= tolerance * expected.norm()
    assert gathered == [tuple(x.shape)] * 2


def test_gathered_only_where_it_may(gathered):
    layer, x = WindowAttention(16, 4, 2).eval(), torch.randn(1, 8, 8, 16)
    layer(x)  # with gradients
    with torch.no_grad():
        for backend in ("reference", "window_process"):
            layer.backend = backend
            layer(x)
        layer.backend = "auto"
        torch.jit.trace(layer, x, check_trace=False)
        torch.compile(layer, backend="eager", fullgraph=True)(x)
        padded = torch.randn(1, 6, 8, 16)
        layer(padded, window_mask((6, 8), 4, 0))
        hook = layer.qkv.register_forward_hook(lambda *_: None)
        layer(x)
        hook.remove()
        assert layer(x[:0]).shape == x[:0].shape
        dropping = WindowAttention(16, 4, 2, attn_drop=0.5).train()
        dropping(x)
        assert gathered == []
        layer(x)
        assert gathered == [(1, 8, 8, 16)]


@every_family
def test_a_batch_in_parts_gives_what_the_whole_batch_gives(no_linear_kernel, monkeypatch, family):
    model = small(family).eval()
    images = torch.randn(5, 3, 32, 32)
    whole = tensors(model(images))  # with gradients: never in parts
    parts, run = [], backbone.Stage._run_blocks
    monkeypatch.setattr(backbone.Stage, "_run_blocks", lambda self, x, r: parts.append(len(x)) or run(self, x, r))
    monkeypatch.setattr(backbone, "CACHED", 1)
    with torch.no_grad():
        torch.testing.assert_close(tensors(model(images)), [x.detach() for x in whole], atol=1e-5, rtol=1e-5)
    if isinstance(model, SwinTransformerMoE):  # experts route whole batches
        assert not parts
    else:
        assert parts == [1] * 5 * len(model.layers)


def test_hooks_and_training_see_whole_batches(monkeypatch):
    model, images, seen = small(SwinTransformer).eval(), torch.randn(5, 3, 32, 32), []
    monkeypatch.setattr(backbone, "CACHED", 1)
    sizes = []
    run = backbone.Stage._run_blocks
    monkeypatch.setattr(backbone.Stage, "_run_blocks", lambda self, x, r: sizes.append(len(x)) or run(self, x, r))
    hook = model.layers[0].blocks[0].mlp.act.register_forward_hook(lambda _, inputs, output: seen.append(len(output)))
    with torch.no_grad():
        model(images)
        assert seen == [5] and sizes[0] == 5
        hook.remove()
        sizes.clear()
        model.train()(images)
    assert set(sizes) == {5}


@every_family
def test_modes_see_plain_operators_and_leave_nothing_behind(family):
    """Operations are counted as in training, and fake tensors do not outlive their mode."""
    model, images = small(family).eval(), torch.randn(2, 3, 32, 32)
    counts = []
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients), FlopCounterMode(display=False) as counter:
            model(images)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
    window_order.cache_clear()
    has_pointwise.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        model(mode.from_tensor(images))
    with torch.no_grad():
        assert all(torch.isfinite(out).all() for out in tensors(model(images)))


def test_a_part_has_as_many_images_as_the_caches_hold(no_linear_kernel, monkeypatch):
    stage = small(SwinTransformer).eval().layers[0]
    x = torch.randn(7, 64, 16)  # an MLP's hidden values of an image: 64 * 64 * 4 bytes
    with torch.no_grad():
        monkeypatch.setattr(backbone, "CACHED", 3 * 64 * 64 * 4)
        assert [len(part) for part in stage._parts(x)] == [3, 3, 1]
        assert [len(part) for part in stage._parts(x.bfloat16())] == [6, 1]
        assert [len(part) for part in stage._parts(x[:0])] == [0]


@pytest.mark.parametrize("dtype, uses_sdpa", [(torch.float32, True), (torch.bfloat16, False)])
def test_compilers_get_plain_products_in_half_precision(no_kernel, dtype, uses_sdpa):
    """They fuse them with bias, mask and softmax, which SDPA's kernel for CPUs does not match."""
    layer, graphs = WindowAttention(16, 4, 2).eval(), []

    def backend(graph, _):
        graphs.append(graph.code)
        return graph

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        x = torch.randn(1, 8, 8, 16)
        expected = layer(x)
        torch.testing.assert_close(torch.compile(layer, backend=backend)(x), expected, atol=1e-2, rtol=1e-2)
    assert ("scaled_dot_product_attention" in graphs[0]) == uses_sdpa
