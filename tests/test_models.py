"""Swin models against the official numbers and against timm's and torchvision's own implementations."""

import hashlib
from functools import partial

import pytest
import timm
import torch
import torchvision
from conftest import BACKENDS, fill, golden, golden_images, make_config, swin_tiny

from models import build_model
from models.attention import set_attention_backend
from models.swin_mlp import SwinMLP
from models.swin_transformer import BasicLayer, SwinTransformer, SwinTransformerBlock, WindowAttention
from models.swin_transformer_moe import SwinTransformerMoE
from models.swin_transformer_v2 import SwinTransformerV2
from optimizer import build_optimizer

OFFICIAL = {name: numbers for name, numbers in golden("models").items() if "simmim_pretrain" not in name}
SLOW = ("large", "384", "_base_", "small_patch4_window16", "moe_base", "simmim", "22k")
QUICK = [name for name in OFFICIAL if "configs/swin/" in name and "large" not in name and "384" not in name]
QUICK += [name for name in OFFICIAL if "configs/swin/" not in name and not any(part in name for part in SLOW)]
QUICK += [name for name in OFFICIAL if "swin_moe_small" in name]


def build(name: str, **kwargs) -> torch.nn.Module:
    numbers = OFFICIAL[name]
    config = make_config(name, "MODEL.NUM_CLASSES", numbers["num_classes"])
    return build_model(config), config


@pytest.mark.parametrize("name", OFFICIAL)
def test_sizes_keys_flops_and_groups_are_the_official_ones(name):
    expected = OFFICIAL[name]
    with torch.device("meta"):
        model, config = build(name)
    state = model.state_dict()
    lines = "\n".join(f"{key} {list(state[key].shape)}" for key in sorted(state))
    assert sum(p.numel() for p in model.parameters()) == expected["n_parameters"]
    assert len(state) == expected["state_dict_keys"]
    assert hashlib.sha256(lines.encode()).hexdigest() == expected["state_dict_sha256"]
    assert model.flops() == expected["flops"]
    assert sorted(model.no_weight_decay()) == expected["no_weight_decay"]
    assert sorted(model.no_weight_decay_keywords()) == expected["no_weight_decay_keywords"]
    check_groups(build_optimizer(config, model, simmim="simmim" in name), expected["optimizer"])


def check_groups(optimizer: torch.optim.Optimizer, expected: dict) -> None:
    assert type(optimizer).__name__ == expected["class"]
    assert len(optimizer.param_groups) == len(expected["groups"])
    for group, numbers in zip(optimizer.param_groups, expected["groups"], strict=True):
        assert len(group["params"]) == numbers["n"]
        assert sum(p.numel() for p in group["params"]) == numbers["numel"]
        for key in ("weight_decay", "lr", "lr_scale", "group_name"):
            assert group.get(key) == pytest.approx(numbers.get(key)) if key != "group_name" else True
        assert group.get("group_name") == numbers.get("group_name")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in OFFICIAL])
def test_logits_loss_and_gradients_are_the_official_ones(name, backend):
    expected = OFFICIAL[name]
    model, _ = build(name)
    fill(model).eval()
    set_attention_backend(model, backend)
    images = golden_images(expected["input_seed"], expected["batch"], expected["img_size"])
    logits = model(images)
    if "aux" in expected:
        logits, auxiliary = logits
        assert auxiliary.item() == expected["aux"]
    loss = torch.nn.functional.cross_entropy(logits, torch.arange(expected["batch"]) % expected["num_classes"])
    loss.backward()
    torch.testing.assert_close(logits[:, :10], torch.tensor(expected["logits_first10"]), atol=1e-4, rtol=1e-5)
    assert logits.norm(dim=1).tolist() == pytest.approx(expected["logits_norm"], rel=1e-5)
    assert logits.argmax(1).tolist() == expected["argmax"]
    assert loss.item() == pytest.approx(expected["loss"], abs=1e-4, rel=1e-5)
    norms = {n: p.grad.norm().item() for n, p in model.named_parameters()}
    assert sum(n**2 for n in norms.values()) ** 0.5 == pytest.approx(expected["grad_norm_total"], rel=1e-3)
    assert {n: norms[n] for n in expected["grad_norms"]} == pytest.approx(expected["grad_norms"], rel=1e-3)


SMALL_INIT = {
    **{"img_size": 64, "patch_size": 2, "embed_dim": 24, "depths": [2, 2, 2], "num_heads": [2, 4, 8]},
    **{"window_size": 4, "ape": True, "num_classes": 10},
}
INIT_CASES = {
    "swin_tiny_patch4_window7_224": partial(SwinTransformer, drop_path_rate=0.2),
    "swin_small_ape": partial(SwinTransformer, **SMALL_INIT, qkv_bias=False),
    "swinv2_tiny_patch4_window8_256": partial(SwinTransformerV2, img_size=256, window_size=8, drop_path_rate=0.2),
    "swinv2_small_ape": partial(SwinTransformerV2, **SMALL_INIT, qkv_bias=False, pretrained_window_sizes=[2, 2, 2]),
    "swin_mlp_tiny_c24_patch4_window8_256": partial(
        SwinMLP, img_size=256, window_size=8, num_heads=[4, 8, 16, 32], drop_path_rate=0.2
    ),
    "swin_mlp_small_ape": partial(SwinMLP, **SMALL_INIT),
    "swin_moe_small_dense": partial(
        SwinTransformerMoE, **SMALL_INIT, mlp_fc2_bias=False, init_std=0.005, pretrained_window_sizes=[0, 0, 0]
    ),
}


@pytest.mark.parametrize("case", INIT_CASES)
def test_initial_weights_are_the_official_ones(case):
    torch.manual_seed(0)
    check_initial_weights(INIT_CASES[case](), golden("init")[case])


def check_initial_weights(model: torch.nn.Module, expected: dict) -> None:
    parameters = dict(model.named_parameters())
    assert list(parameters) == list(expected)
    for name, (size, total, weighted) in expected.items():
        x = parameters[name].detach().double().flatten()
        r = torch.arange(len(x), dtype=torch.float64) % 97 / 97
        assert len(x) == size
        assert [x.sum().item(), (x * r).sum().item()] == pytest.approx([total, weighted], abs=1e-5, rel=1e-6), name


def test_timm_gives_the_same_logits():
    ours = swin_tiny()
    state = {}
    for name, value in ours.state_dict().items():
        if name.endswith(("relative_position_index", "attn_mask")):
            continue
        if ".downsample." in name:  # timm merges patches at the start of the next stage
            stage, rest = name.removeprefix("layers.").split(".", 1)
            name = f"layers.{int(stage) + 1}.{rest}"
        state[name.replace("head.", "head.fc.")] = value
    theirs = timm.create_model("swin_tiny_patch4_window7_224", pretrained=False).eval()
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected and all(name.endswith(("relative_position_index", "attn_mask")) for name in missing)
    images = golden_images(5, 2, 224)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), atol=1e-4, rtol=1e-4)


def test_torchvision_gives_the_same_logits():
    ours = swin_tiny()
    renames = {"patch_embed.proj": "features.0.0", "patch_embed.norm": "features.0.2", "fc1": "0", "fc2": "3"}
    state = {}
    for name, value in ours.state_dict().items():
        if name.endswith("attn_mask"):
            continue
        for stage in range(4):
            name = name.replace(f"layers.{stage}.blocks.", f"features.{2 * stage + 1}.")
            name = name.replace(f"layers.{stage}.downsample.", f"features.{2 * stage + 2}.")
        for ours_name, theirs_name in renames.items():
            name = name.replace(ours_name, theirs_name)
        state[name] = value.flatten() if name.endswith("relative_position_index") else value
    theirs = torchvision.models.swin_t(weights=None).eval()
    theirs.load_state_dict(state)
    images = golden_images(5, 2, 224)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), atol=1e-4, rtol=1e-4)


def test_backends_agree_in_float64_with_gradients():
    torch.manual_seed(0)
    model = SwinTransformer(
        img_size=(32, 48), patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4, num_classes=5
    ).double()
    images = torch.randn(3, 3, 32, 48, dtype=torch.float64)
    results = {}
    for backend in BACKENDS:
        set_attention_backend(model, backend)
        model.zero_grad()
        loss = model.eval()(images).square().sum()
        loss.backward()
        results[backend] = [loss.detach(), *(p.grad.clone() for p in model.parameters())]
    for ours, theirs in zip(results["reference"], results["sdpa"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_gradient_checkpointing_changes_nothing():
    torch.manual_seed(0)
    options = {"img_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]}
    plain = SwinTransformer(**options, window_size=4, num_classes=5, drop_rate=0.1, drop_path_rate=0.3)
    thrifty = SwinTransformer(
        **options, window_size=4, num_classes=5, drop_rate=0.1, drop_path_rate=0.3, use_checkpoint=True
    )
    thrifty.load_state_dict(plain.state_dict())
    images, gradients, calls = torch.randn(2, 3, 32, 32), [], []
    for model in (plain, thrifty):
        model.layers[0].blocks[0].register_forward_pre_hook(lambda module, *_: calls.append(module.drop_path))
        torch.manual_seed(1)
        model(images).sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
    assert len(calls) == 3  # once, and once more in the backward pass


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("shifted", [False, True])
def test_window_attention_on_windows_is_that_on_maps(backend, shifted):
    """The official call on cut windows and the call on image-ordered maps agree."""
    from models.layers import shift_mask, window_partition, window_reverse

    torch.manual_seed(0)
    attention = WindowAttention(16, (4, 4), num_heads=4).eval()
    attention.backend = backend
    shift = 2 if shifted else 0
    mask = shift_mask((8, 12), 4, 2) if shifted else None
    x = torch.randn(3, 8, 12, 16)
    windows = window_partition(torch.roll(x, (-shift, -shift), (1, 2)), 4).view(-1, 16, 16)
    by_windows = window_reverse(attention(windows, mask).view(-1, 4, 4, 16), 4, 8, 12)
    by_windows = torch.roll(by_windows, (shift, shift), (1, 2))
    torch.testing.assert_close(attention(x, mask, shift), by_windows, atol=1e-6, rtol=1e-5)


def test_official_constructors_work_on_their_own():
    block = SwinTransformerBlock(dim=16, input_resolution=(8, 8), num_heads=2, window_size=4, shift_size=2)
    assert block(torch.randn(2, 64, 16)).shape == (2, 64, 16)
    layer = BasicLayer(dim=16, input_resolution=(8, 8), depth=2, num_heads=2, window_size=4)
    assert layer(torch.randn(2, 64, 16)).shape == (2, 64, 16)
    assert SwinTransformerBlock(16, (4, 4), 2, window_size=7, shift_size=3).shift_size == 0


def test_size_that_windows_do_not_divide_names_sizes_that_do():
    with pytest.raises(ValueError, match=r"img_size=200 .*50x50 map .*sizes near it that work: \[.*224"):
        SwinTransformer(img_size=200)
    model = SwinTransformer(img_size=32, patch_size=2, embed_dim=8, depths=[1], num_heads=[1], window_size=4)
    with pytest.raises(ValueError, match="images of 3x32x32, not of 3x64x64"):
        model(torch.zeros(1, 3, 64, 64))


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match=r"MODEL.TYPE='swim' .*choose from .*'swin'"):
        build_model(make_config(None, "MODEL.TYPE", "swim"))
    with pytest.raises(ValueError, match=r"MODEL.ATTENTION_BACKEND='flash'; choose from"):
        build_model(make_config(None, "MODEL.ATTENTION_BACKEND", "flash"))
