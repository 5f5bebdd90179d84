"""Feature maps, attention maps and new heads, for every family."""

import pytest
import torch
from test_sizes import FAMILIES, NAMES, every_family, logits_of, small
from torch import nn

from models.features import take_indices
from models.swin_mlp import SwinMLP
from models.swin_transformer import SwinTransformer
from models.swin_transformer_v2 import SwinTransformerV2
from optimizer import build_optimizer

ATTENTIVE = [(f, n) for f, n in zip(FAMILIES, NAMES, strict=True) if f is not SwinMLP]
with_attention = pytest.mark.parametrize("family", [f for f, _ in ATTENTIVE], ids=[n for _, n in ATTENTIVE])


@every_family
def test_intermediates_are_what_the_stages_pass_on(family):
    """Seen by hooks: the map of a stage is the output of its last block."""
    model, images, seen = small(family), torch.randn(2, 3, 32, 32), []
    for stage in model.layers:
        stage.blocks[-1].register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        pooled, maps = model.forward_intermediates(images)
        nhwc = model.forward_intermediates(images, output_fmt="NHWC", intermediates_only=True)
        features = model.forward_features(images)
    features = features[0] if isinstance(features, tuple) else features
    torch.testing.assert_close(pooled, features)
    torch.testing.assert_close(model.forward_head(pooled), logits_of(model, images))
    for tokens, chw, hwc in zip(seen, maps, nhwc, strict=False):
        assert torch.equal(chw.flatten(2).transpose(1, 2), tokens)
        assert torch.equal(hwc.flatten(1, 2), tokens)


def test_indices_and_norm_choose_maps():
    model, images = small(SwinTransformer), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        first, second = model.forward_intermediates(images, intermediates_only=True)
        nothing, only = model.forward_intermediates(images, [0], stop_early=True)
        assert nothing is None and torch.equal(only[0], first)
        (normed,) = model.forward_intermediates(images, 1, norm=True, intermediates_only=True)
        torch.testing.assert_close(normed, model.norm(second.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        both = model.forward_intermediates(images, [-1, -2], intermediates_only=True)
    assert torch.equal(both[0], first) and torch.equal(both[1], second)  # in the order of stages
    with pytest.raises(ValueError, match="output_fmt='NLC'; choose from"):
        model.forward_intermediates(images, output_fmt="NLC")
    with pytest.raises(ValueError, match=r"stages \[2\]: choose from 0 to 1"):
        model.forward_intermediates(images, [2])


def test_take_indices():
    assert take_indices(4, None) == take_indices(4, 4) == [0, 1, 2, 3]
    assert take_indices(4, 2) == [2, 3] and take_indices(4, (-1, 0, 3)) == [0, 3]
    for wrong, message in (
        (5, "the last 5 stages: choose from 1 to 4"),
        (0, "last 0"),
        ([], r"\[\]"),
        ([4], r"stages \[4\]"),
    ):
        with pytest.raises(ValueError, match=message):
            take_indices(4, wrong)


@every_family
def test_feature_backbone_gives_normalised_maps(family):
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        raw = small(family).forward_intermediates(images, intermediates_only=True)
        backbone = small(family).as_feature_backbone()
        maps = backbone(images)
    assert not any(name.startswith(("head", "norm.")) for name in backbone.state_dict())
    assert [info["reduction"] for info in backbone.feature_info] == [2, 4]
    for i, (a, b) in enumerate(zip(maps, raw, strict=True)):
        torch.testing.assert_close(a, nn.functional.layer_norm(b.permute(0, 2, 3, 1), b.shape[1:2]).permute(0, 3, 1, 2))
        assert isinstance(getattr(backbone, f"norm{i}"), nn.LayerNorm)


def test_feature_backbone_without_the_last_stage_has_no_more_than_it_needs():
    backbone = small(SwinTransformer).as_feature_backbone([0])
    names = list(backbone.state_dict())
    assert not any("layers.1." in name or "downsample" in name for name in names)
    assert [m.shape for m in backbone(torch.randn(1, 3, 32, 32))] == [(1, 8, 16, 16)]
    gradients = backbone(torch.randn(1, 3, 32, 32))[0].sum()
    gradients.backward()
    assert all(p.grad is not None for p in backbone.parameters())  # DDP would wait for unused ones
    bare = small(SwinTransformer).as_feature_backbone(norms=False)
    assert not any("norm0" in name for name in bare.state_dict())


def test_feature_backbone_may_be_made_again():
    backbone = small(SwinTransformer).as_feature_backbone()
    backbone.as_feature_backbone([0])
    assert backbone.out_indices == (0,) and not any("norm1." in n.split("layers")[0] for n in backbone.state_dict())
    backbone(torch.randn(1, 3, 32, 32))[0].sum().backward()
    assert all(p.grad is not None for p in backbone.parameters())


def test_pruning_keeps_a_model_that_works():
    for norm, head in ((False, True), (True, False), (False, False)):
        model = small(SwinTransformer)
        assert model.prune_intermediate_layers([0], prune_norm=norm, prune_head=head) == [0]
        out = logits_of(model, torch.randn(2, 3, 32, 32))
        assert out.shape == (2, 8 if head else 3)


def test_feature_backbone_trains_on_changing_sizes_without_decay_of_norms():
    from conftest import make_config

    backbone = small(SwinTransformerV2, pad_maps=True).as_feature_backbone()
    groups = build_optimizer(make_config(), backbone).param_groups
    undecayed = {id(p) for p in groups[1]["params"]}
    assert id(backbone.norm0.weight) in undecayed and id(backbone.layers[0].blocks[0].attn.logit_scale) in undecayed
    for shape in ((24, 40), (31, 17)):
        maps = backbone.train()(torch.randn(1, 3, *shape))
        assert [m.shape[1] for m in maps] == [8, 16]
        sum(m.square().sum() for m in maps).backward()


@with_attention
@pytest.mark.parametrize("shape", [(32, 32), (22, 38)])
@pytest.mark.parametrize("block", [0, 1])
def test_attention_maps_mix_values_as_the_block_does(family, shape, block):
    """The inverse: values weighed by the un-windowed map, then projected, are what the attention gives."""
    model, images, seen = small(family, pad_maps=True), torch.randn(2, 3, *shape), []
    attention = model.layers[0].blocks[block].attn
    attention.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    with torch.no_grad():
        full = model.attention_maps(images, stage=0, block=block)
        x, expected = seen[0]  # B, H, W, C
        B, H, W, C = x.shape
        v = attention.packed_qkv(x).view(B, H * W, 3, 2, C // 2)[:, :, 2]  # B, L, nH, d
        mixed = torch.einsum("bhqk,bkhd->bqhd", full.reshape(B, 2, H * W, H * W), v).reshape(B, H, W, C)
        torch.testing.assert_close(attention.proj(mixed), expected, atol=1e-5, rtol=1e-5)
        one = model.attention_maps(images, 0, block, query=(H - 1, 3))
    torch.testing.assert_close(one, full[:, :, H - 1, 3])
    torch.testing.assert_close(full.sum((-2, -1)), torch.ones(B, 2, H, W))
    model.train()
    assert torch.equal(model.attention_maps(images, 0, block), full) and attention.training


def test_attention_maps_of_what_is_not_there():
    model, images = small(SwinTransformer), torch.randn(1, 3, 32, 32)
    with pytest.raises(ValueError, match=r"stage=0, block=2: the model has stages of \[2, 2\] blocks"):
        model.attention_maps(images, 0, 2)
    with pytest.raises(ValueError, match=r"query=\(16, 0\) is outside the 16x16 map"):
        model.attention_maps(images, 0, 0, query=(16, 0))
    with pytest.raises(ValueError, match="SwinMLP mixes tokens without attention"):
        small(SwinMLP).attention_maps(images, 0, 0)


@every_family
def test_reset_classifier(family):
    model, images = small(family).double(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    body = {name: value.clone() for name, value in model.state_dict().items() if not name.startswith("head.")}
    model.reset_classifier(7)
    assert logits_of(model, images).shape == (2, 7) and model.num_classes == 7
    assert 0.01 < model.head.weight.std() < 0.03 and not model.head.bias.any()
    model.reset_classifier(0)
    assert logits_of(model, images).shape == (2, model.num_features)
    assert all(torch.equal(body[name], value) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="global_pool='max'"):
        model.reset_classifier(7, global_pool="max")


def test_reset_keeps_the_official_initialisation_of_moe():
    model = small(FAMILIES[3], init_std=0.005)
    model.reset_classifier(500)
    assert 0.004 < model.head.weight.std() < 0.006
