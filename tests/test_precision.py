"""Autocast for types that the CPU lacks: models compute in float32, with the same numbers as without autocast."""

from types import SimpleNamespace

import pytest
import torch
from conftest import fill, golden_images
from test_sizes import every_family, small

from models import precision
from models.simmim import SimMIM, SwinTransformerForSimMIM
from models.swin_transformer import SwinTransformer


def run(model: torch.nn.Module, images: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    with torch.autocast("cpu", dtype):
        result = model(images)
    return result[0] if isinstance(result, tuple) else result


@every_family
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_compute_in_float32_where_the_cpu_lacks_the_type(monkeypatch, family, dtype):
    model, images = small(family), golden_images(1, 2, 32)
    expected = model(images)
    expected = expected[0] if isinstance(expected, tuple) else expected
    monkeypatch.setattr(precision, "LACKING", frozenset([dtype]))
    result = run(model, images, dtype)
    assert result.dtype == torch.float32 and torch.equal(result, expected)
    result = run(model, images.to(dtype), dtype)  # images may be of the type themselves
    assert result.dtype == torch.float32
    monkeypatch.setattr(precision, "LACKING", frozenset())
    assert run(model, images, dtype).dtype == dtype


def test_gradients_are_those_of_float32(monkeypatch):
    monkeypatch.setattr(precision, "LACKING", frozenset([torch.bfloat16]))
    model, images = small(SwinTransformer), golden_images(1, 2, 32)
    gradients = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = model(images).square().sum()
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_pre_training_too(monkeypatch):
    shape = {"img_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
    config = SimpleNamespace(NORM_TARGET=SimpleNamespace(ENABLE=True, PATCH_SIZE=5))
    model = fill(SimMIM(config, SwinTransformerForSimMIM(**shape, num_classes=0), 4, 3, 2)).eval()
    images, mask = golden_images(1, 2, 32), (torch.arange(2 * 16 * 16).view(2, 16, 16) % 3 == 0).long()
    expected = model(images, mask), *model.reconstruct(images, mask)
    monkeypatch.setattr(precision, "LACKING", frozenset([torch.bfloat16]))
    with torch.autocast("cpu", torch.bfloat16):
        results = model(images, mask), *model.reconstruct(images, mask)
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_models_whose_weights_are_of_the_type_are_left_alone(monkeypatch):
    monkeypatch.setattr(precision, "LACKING", frozenset([torch.bfloat16]))
    model = small(SwinTransformer).bfloat16().eval()
    assert run(model, torch.zeros(1, 3, 32, 32, dtype=torch.bfloat16), torch.bfloat16).dtype == torch.bfloat16


def test_a_compiled_model_follows(monkeypatch):
    monkeypatch.setattr(precision, "LACKING", frozenset([torch.bfloat16]))
    model, images = small(SwinTransformer), golden_images(1, 2, 32)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(compiled, images, torch.bfloat16), model(images), atol=1e-5, rtol=1e-5)
