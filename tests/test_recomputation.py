"""TRAIN.RECOMPUTE_ACTIVATIONS: the same gradients, fewer things kept, no matrix product done twice."""

import pytest
import torch
from conftest import SMALL, make_config
from test_engine import prepared, start
from torch.utils._python_dispatch import TorchDispatchMode

import engine
from models import build_model
from models.layers import Mlp
from models.recomputation import RecomputingMlp, recompute_activations
from supervised import SupervisedLoss


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, operator, types, arguments=(), kwargs=None):
        self.count += operator._overloadpacket in (
            torch.ops.aten.mm,
            torch.ops.aten.addmm,
            torch.ops.aten.bmm,
            torch.ops.aten.convolution,
        )
        return operator(*arguments, **(kwargs or {}))


def gradients(model, x):
    """Of a sum of squares; how many products it took, and how many bytes autograd kept, weights apart."""
    kept, own = {}, {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    model.zero_grad()
    torch.manual_seed(1)
    with Products() as products, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
    with products:
        y.square().sum().backward()
    return [p.grad.clone() for p in model.parameters()], products.count, sum(size for size, _ in kept.values())


@pytest.mark.parametrize("kind", ["swin", "swinv2", "swin_mlp"])
@pytest.mark.parametrize("opts", [[], ["MODEL.DROP_RATE", 0.2], ["TRAIN.USE_CHECKPOINT", True]])
def test_the_same_gradients_by_as_many_products(kind, opts):
    base = [key.replace("SWIN.", f"{kind.upper()}.") if isinstance(key, str) else key for key in SMALL]
    torch.manual_seed(0)
    model = build_model(make_config(None, *base, "MODEL.TYPE", kind, *opts)).train()
    names, x = list(model.state_dict()), torch.randn(2, 3, 16, 16)
    plain = gradients(model, x)
    recompute_activations(model)
    assert sum(isinstance(module, RecomputingMlp) for module in model.modules()) == 4
    lean = gradients(model, x)
    assert all(torch.equal(a, b) for a, b in zip(plain[0], lean[0], strict=True))
    assert list(model.state_dict()) == names
    if "TRAIN.USE_CHECKPOINT" not in opts:
        assert lean[1] == plain[1]


def test_one_of_the_two_hidden_maps_is_kept():
    mlp, x = Mlp(64, 256), torch.randn(4, 100, 64)
    hidden = 4 * 100 * 256 * 4
    _, _, plain = gradients(mlp, x)
    recompute_activations(mlp)
    _, _, lean = gradients(mlp, x)
    assert plain - lean == hidden and lean == hidden + x.nbytes


def test_training_takes_it_from_the_configuration(image_folder, tmp_path):
    losses = []
    for recompute in (False, True):
        with start(image_folder, tmp_path / str(recompute), "TRAIN.RECOMPUTE_ACTIVATIONS", recompute) as session:
            run, _ = prepared(session)
            assert any(isinstance(module, RecomputingMlp) for module in run.model.modules()) == recompute
            loss = SupervisedLoss(None, 0.1)
            engine.train_one_epoch(
                run, lambda m, b, loss=loss: (lambda r: (losses.append(r[0].item()), r)[1])(loss(m, b))
            )
    assert len(losses) == 14 and losses[:7] == losses[7:]
