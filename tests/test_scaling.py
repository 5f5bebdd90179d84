"""The plan of a large Swin-MoE: its figures are those of formulas and of real passes, and those of docs/scaling.md."""

import re

import pytest
import torch
from conftest import ROOT, make_config

from kernels import linear
from models import build_model
from models.expert_parallel import ExpertGroups, expert_parameters
from tools import plan_scaling
from tools.plan_scaling import Planned, dry_run, meta_model, plan

EXAMPLE = "configs/demo/swin_moe_10b_6x16expert.yaml"
DIGITS = "configs/demo/swin_moe_digits.yaml"
DOC = (ROOT / "docs" / "scaling.md").read_text()


def test_the_page_has_what_the_tool_prints():
    config = make_config(EXAMPLE)
    printed = re.search(r"<!-- plan (\d+) (\d+) -->\n\n(.*\n)\n<!-- end -->", DOC, re.DOTALL)
    ours = plan(config, int(printed[1]), int(printed[2]))
    assert printed[3] == ours
    assert f"--processes {printed[1]} --batch-size {printed[2]}" in DOC
    ddp, fsdp2 = sums(ours)
    assert f"needs {ddp} GiB" in DOC and f"saves {float(ddp) - float(fsdp2):.2f} GiB" in DOC
    ddp, fsdp2 = sums(plan(config, 8, 64))
    assert f"{ddp} GiB with `ddp`, {fsdp2} GiB with `fsdp2`" in DOC


def sums(text: str) -> tuple[str, str]:
    return re.search(r"\| sum \| ([\d.]+) \| ([\d.]+) \|", text).groups()


def test_figures_are_those_of_the_formulas():
    """Written from the paper's layer, not from the code."""
    config = make_config(EXAMPLE)
    model = meta_model(config, Planned(size=48))
    layers = {1024: 8, 2048: 1}  # channels: blocks with experts
    experts = {C: 96 * (2 * C * 4 * C + 4 * C) for C in layers}  # no second bias
    own = sum(p.numel() for p in expert_parameters(model).values() if p.requires_grad)
    assert own * 48 == sum(layers[C] * experts[C] for C in layers) == 9_667_608_576
    assert 9.9e9 < 9_667_608_576 + plan_scaling._dense_numbers(model) < 10.1e9

    run = dry_run(model, 64, torch.bfloat16)
    assert len(run.exchanges) == 2 * sum(layers.values())  # there and back
    for exchange in run.exchanges:
        C, side = (1024, 12) if exchange.layer.startswith("layers.2") else (2048, 6)
        tokens = 64 * side**2
        slots = 2 * int(1.25 * (tokens // 96))
        assert (exchange.tokens, exchange.slots, exchange.bytes) == (tokens, slots, 96 * slots * C * 2)


def test_what_is_kept_is_what_a_real_pass_keeps(monkeypatch):
    """On the CPU, whose tensors are the same in blocks without experts and kernels, and one process's parameters."""
    monkeypatch.setattr(linear, "PROBLEM", "not built")
    config = make_config(DIGITS, "MODEL.NUM_CLASSES", 10, "MODEL.ATTENTION_BACKEND", "reference")
    planned, real = meta_model(config, Planned(size=1)), build_model(config)
    assert [p.shape for p in planned.parameters()] == [p.shape for p in real.parameters()]
    one, two = dry_run(planned, 4, torch.float32), dry_run(real, 4, torch.float32)
    assert one.inputs == two.inputs and not two.exchanges
    for block in ("layers.0.blocks.0", "layers.1.blocks.0", ""):
        assert one.kept[block] == two.kept[block] > one.attention.get(block, -1)
        assert one.attention.get(block) == two.attention.get(block)


def test_sizes_follow_the_processes():
    config = make_config(DIGITS)
    halves, whole, copies = (
        meta_model(config, groups) for groups in (Planned(size=2), ExpertGroups(), Planned(size=2, copies=2))
    )
    count = plan_scaling._expert_numbers
    assert 2 * count(halves) == count(whole) and count(copies) == count(halves)
    text = plan(config, 4, 32)
    alone = plan(make_config(DIGITS, "MODEL.SWIN_MOE.EXPERT_PARALLEL", 2), 4, 32)
    assert "| all-reduce over copies of experts | 0.0 |" in text
    size = 2 * (1 / 2) * 4 * count(copies) / 1e6
    assert f"| all-reduce over copies of experts | {size:.1f} |" in alone


@pytest.mark.parametrize(
    ("cfg", "opts", "message"),
    [
        ("configs/swin/swin_tiny_patch4_window7_224.yaml", [], "MODEL.TYPE='swin'"),
        (DIGITS, ["MODEL.SWIN_MOE.PATH", "dropless"], "PATH='dropless'"),
        (DIGITS, ["MODEL.SWIN_MOE.NUM_EXPERTS", 5], "NUM_EXPERTS=5"),
        (DIGITS, ["MODEL.SWIN_MOE.EXPERT_PARALLEL", 3], "EXPERT_PARALLEL=3"),
        (DIGITS, ["MODEL.SWIN_MOE.MOE_BLOCKS", [[-1], [-1]]], "no block has experts"),
    ],
)
def test_what_cannot_be_planned_is_told(cfg, opts, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        plan(make_config(cfg, *opts), 4, 8)
