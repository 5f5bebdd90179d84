"""SimMIM's model against the official numbers."""

import hashlib

import numpy as np
import pytest
import torch
from conftest import fill, golden, golden_images, make_config
from test_models import SMALL_INIT, check_groups, check_initial_weights

from models import build_model
from models.simmim import SimMIM, SwinTransformerForSimMIM, SwinTransformerV2ForSimMIM, norm_targets
from optimizer import build_optimizer

PRETRAINING = {name: numbers for name, numbers in golden("models").items() if "simmim_pretrain" in name}
TARGETS = golden("simmim")["norm_targets"]


@pytest.mark.parametrize("name", PRETRAINING)
def test_sizes_keys_and_groups_are_the_official_ones(name):
    expected, config = PRETRAINING[name], make_config(name)
    with torch.device("meta"):
        model = build_model(config, is_pretrain=True)
    state = model.state_dict()
    lines = "\n".join(f"{key} {list(state[key].shape)}" for key in sorted(state))
    assert sum(p.numel() for p in model.parameters()) == expected["n_parameters"]
    assert len(state) == expected["state_dict_keys"]
    assert hashlib.sha256(lines.encode()).hexdigest() == expected["state_dict_sha256"]
    assert sorted(model.no_weight_decay()) == expected["no_weight_decay"]
    assert sorted(model.no_weight_decay_keywords()) == expected["no_weight_decay_keywords"]
    check_groups(build_optimizer(config, model, simmim=True, is_pretrain=True), expected["optimizer"])


@pytest.mark.parametrize("name", PRETRAINING)
def test_maps_loss_and_gradients_are_the_official_ones(name):
    expected = PRETRAINING[name]
    model = fill(build_model(make_config(name), is_pretrain=True)).eval()
    seed, batch, size = (expected[key] for key in ("input_seed", "batch", "img_size"))
    images = golden_images(seed, batch, size)
    cells = np.random.RandomState(seed + 1).uniform(size=(batch, size // 32, size // 32)) < 0.6
    mask = torch.from_numpy(cells.astype(np.int64)).repeat_interleave(8, 1).repeat_interleave(8, 2)
    with torch.no_grad():
        encoded = model.encoder(images, mask)
        check_map(encoded, expected["encoder_out"])
        check_map(model.decoder(encoded), expected["reconstruction"])
    loss = model(images, mask)
    loss.backward()
    assert loss.item() == pytest.approx(expected["loss"], abs=1e-4, rel=1e-5)
    norms = {n: p.grad.norm().item() for n, p in model.named_parameters()}
    assert sum(n**2 for n in norms.values()) ** 0.5 == pytest.approx(expected["grad_norm_total"], rel=1e-3)
    assert {n: norms[n] for n in expected["grad_norms"]} == pytest.approx(expected["grad_norms"], rel=1e-3)


def check_map(x: torch.Tensor, expected: dict) -> None:
    assert list(x.shape) == expected["shape"]
    assert x.norm().item() == pytest.approx(expected["norm"], rel=1e-5)
    assert x.flatten()[:8].tolist() == pytest.approx(expected["first8"], abs=1e-4, rel=1e-5)


def test_normalised_targets_are_the_official_ones():
    images = torch.from_numpy(np.random.RandomState(5).standard_normal((2, 3, 64, 64)).astype(np.float32))
    targets = norm_targets(images, TARGETS["patch_size"])
    assert targets.norm().item() == pytest.approx(TARGETS["norm"], rel=1e-5)
    assert targets.flatten()[:8].tolist() == pytest.approx(TARGETS["first8"], abs=1e-4)
    with pytest.raises(ValueError, match=r"patch_size=4 .* must be odd"):
        norm_targets(images, 4)


@pytest.mark.parametrize("kind, encoder", [("swin", SwinTransformerForSimMIM), ("swinv2", SwinTransformerV2ForSimMIM)])
def test_initial_weights_are_the_official_ones(kind, encoder):
    torch.manual_seed(0)
    arguments = {key: value for key, value in SMALL_INIT.items() if key not in ("ape", "num_classes")}
    model = SimMIM(None, encoder(**arguments, num_classes=0), encoder_stride=8, in_chans=3, patch_size=2)
    check_initial_weights(model, golden("init")[f"simmim_{kind}_small"])


def test_oblong_images_of_four_channels_are_reconstructed():
    arguments = {**SMALL_INIT, "img_size": (32, 64), "in_chans": 4, "num_classes": 0}
    config = make_config(None, "MODEL.SIMMIM.NORM_TARGET.ENABLE", True).MODEL.SIMMIM
    model = SimMIM(config, SwinTransformerForSimMIM(**arguments), encoder_stride=8, in_chans=4, patch_size=2).eval()
    images, mask = torch.randn(2, 4, 32, 64), (torch.rand(2, 16, 32) < 0.6).long()
    assert model.decoder(model.encoder(images, mask)).shape == images.shape
    changed = images + torch.randn_like(images) * mask.repeat_interleave(2, 1).repeat_interleave(2, 2).unsqueeze(1)
    with torch.no_grad():  # hidden pixels are not seen
        torch.testing.assert_close(model.encoder(changed, mask), model.encoder(images, mask))
    assert model(images, mask).isfinite()


def test_a_type_that_cannot_be_an_encoder_is_named():
    with pytest.raises(ValueError, match=r"MODEL.TYPE='swin_mlp' cannot be pre-trained .*\['swin', 'swinv2'\]"):
        build_model(make_config(None, "MODEL.TYPE", "swin_mlp"), is_pretrain=True)
