"""Experts over processes: every way from one number of processes to another and back, in every form of checkpoint."""

import logging
import os
import re
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from conftest import make_config
from hypothesis import given, settings
from hypothesis import strategies as st
from yacs.config import CfgNode

import distributed
import storage
import utils
import utils_moe
from checkpoint_moe import (
    ExpertLayer,
    expert_layers,
    gather_experts,
    is_expert,
    merge_master,
    names_in_groups,
    optimizer_by_name,
    optimizer_by_position,
    process_optimizer,
    process_state,
    split_experts,
    upcycle,
)
from config import to_dict
from expert_writer import Place, place_of
from lr_scheduler import build_scheduler
from models import build_model
from optimizer import build_optimizer, load_optimizer_state
from tools import reshard_moe

LAYER = "layers.0.blocks.1.mlp._moe_layer."
COUNTER = f"{LAYER}_num_global_experts"


def whole_state(E: int, H: int, C: int, seed: int = 0, cosine: bool = False) -> dict[str, torch.Tensor]:
    """A model with one dense MLP and one layer of E experts, in the order of the official one's names."""
    torch.manual_seed(seed)
    gates = {"wg.weight": (E, C)}
    if cosine:
        gates = {
            "temperature": (1,),
            "sim_matrix": (4, E),
            "cosine_projector.weight": (4, C),
            "cosine_projector.bias": (4,),
        }
    shapes = {
        "patch_embed.proj.weight": (C, 3, 2, 2),
        "patch_embed.proj.bias": (C,),
        "layers.0.blocks.0.attn.cpb_mlp.0.weight": (8, 2),
        "layers.0.blocks.0.mlp.fc1.weight": (H, C),
        "layers.0.blocks.0.mlp.fc1.bias": (H,),
        f"{LAYER}experts.batched_fc1_w": (E, H, C),
        f"{LAYER}experts.batched_fc2_w": (E, H, C),
        f"{LAYER}experts.batched_fc1_bias": (E, H),
        f"{LAYER}experts.batched_fc2_bias": (E, C),
        **{f"{LAYER}gates.0.{name}": shape for name, shape in gates.items()},
        "head.weight": (3, C),
        "head.bias": (3,),
    }
    state = {name: torch.randn(shape) for name, shape in shapes.items()}
    return {**state, COUNTER: torch.tensor(E)}


def by_definition(whole: dict, E: int, W: int, rank: int) -> dict[str, torch.Tensor]:
    """What process ``rank`` of W holds, as MOE.md's table says it: the oracle, by chunks."""
    state, s = dict(whole), max(W // E, 1)
    for name in filter(is_expert, whole):
        value = whole[name]
        if s == 1:
            state[name] = value.chunk(W)[rank]
            continue
        own = value[rank // s][None]
        if name.endswith("fc2_bias"):
            piece = -(-own.shape[1] // s)
            own = torch.nn.functional.pad(own, (0, s * piece - own.shape[1]))
        state[name] = own.chunk(s, 1)[rank % s]
    return state


def mid_2022(state: dict) -> dict[str, torch.Tensor]:
    """With biases of rank 3 and without counters, as in files of mid-2022."""
    old = {name: value for name, value in state.items() if not name.endswith("_num_global_experts")}
    return {n: v[:, None] if is_expert(n) and n.endswith("bias") else v for n, v in old.items()}


def assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


@st.composite
def sizes(draw) -> tuple[int, int, int, list[int]]:
    """E, H, C, and numbers of processes that E and H divide over, or that E divides."""
    E, most = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    counts = [W for W in range(1, E + 1) if E % W == 0] + [E * s for s in range(2, most + 1)]
    H = draw(st.integers(1, 2)) * (12 if most > 2 else 2)
    return E, H, draw(st.integers(1, 7)), draw(st.lists(st.sampled_from(counts), min_size=1, max_size=4))


@settings(deadline=None, max_examples=60)
@given(sizes(), st.booleans(), st.booleans())
def test_states_are_as_defined_and_come_back_bit_by_bit(sizes, old, cosine):
    E, H, C, counts = sizes
    whole = whole_state(E, H, C, cosine=cosine)
    current = [mid_2022(whole)] if old else [whole]
    for W in counts:
        states = [process_state(current, rank, W) for rank in range(W)]
        assert_same(gather_experts(states), whole)
        for rank, state in enumerate(states):
            assert_same(state, by_definition(whole, E, W, rank))
        current = [mid_2022(state) for state in states] if old else states
    assert_same(gather_experts(current), whole)
    assert_same(gather_experts(split_experts(whole, counts[0])), whole)


@settings(deadline=None, max_examples=25)
@given(sizes(), st.sampled_from(["adamw", "sgd"]))
def test_moments_follow_their_parameters(sizes, kind):
    E, H, C, counts = sizes
    whole = whole_state(E, H, C)
    names = [[n for n in whole if n != COUNTER and exempt(n, whole[n]) is free] for free in (False, True)]
    trained = [name for own in names for name in own]
    moments = ["exp_avg", "exp_avg_sq"] if kind == "adamw" else ["momentum_buffer"]
    parts = [whole_state(E, H, C, seed) for seed, _ in enumerate(moments, 1)]
    optimizer = {
        "state": {
            n: {**{m: part[n] for m, part in zip(moments, parts, strict=True)}, "step": torch.tensor(7.0)}
            for n in trained
        },
        "param_groups": [{"lr": 0.1, "params": own} for own in names],
    }
    current, states = [optimizer], [whole]
    for W in [*counts, 1]:
        layers = expert_layers(states)
        current = [process_optimizer(current, layers, rank, W) for rank in range(W)]
        states = [process_state(states, rank, W) for rank in range(W)]
        for rank, (own, state) in enumerate(zip(current, states, strict=True)):
            by_number = optimizer_by_position(own, names)
            assert names_in_groups(state, by_number, exempt) == names
            again = optimizer_by_name(by_number, names)
            for moment, part in zip(moments, parts, strict=True):
                wanted = by_definition(part, E, W, rank)
                found = {name: again["state"][name][moment] for name in trained}
                assert_same(found, {name: wanted[name] for name in trained})
            assert all(entry["step"] == 7 for entry in again["state"].values())
            assert again["param_groups"] == optimizer["param_groups"]


def exempt(name: str, value: torch.Tensor) -> bool:
    """Official Swin-MoE's parameters without weight decay."""
    words = ("cpb_mlp", "fc1_bias", "fc2_bias", "temperature", "cosine_projector", "sim_matrix")
    return value.ndim == 1 or name.endswith(".bias") or any(word in name for word in words)


def test_untrained_biases_have_no_number_in_an_optimizer():
    whole = whole_state(2, 4, 3)
    whole[f"{LAYER}experts.batched_fc2_bias"].zero_()
    trained = [n for n in whole if n != COUNTER and not n.endswith("fc2_bias")]
    names = [[n for n in trained if exempt(n, whole[n]) is free] for free in (False, True)]
    sizes = [len(own) for own in names]
    groups = [{"params": list(range(sizes[0]))}, {"params": list(range(sizes[0], sum(sizes)))}]
    assert names_in_groups(whole, {"state": {}, "param_groups": groups}, exempt) == names
    groups[1]["params"].pop()
    with pytest.raises(ValueError, match=rf"groups of \[{sizes[0]}, {sizes[1] - 1}\] parameters"):
        names_in_groups(whole, {"state": {}, "param_groups": groups}, exempt)
    groups[1]["params"].append(99)
    state = {0: {"exp_avg": torch.zeros(1, 2)}}
    with pytest.raises(ValueError, match=r"exp_avg of patch_embed\.proj\.weight is 1x2 float32, the weight 3x3x2x2"):
        names_in_groups(whole, {"state": state, "param_groups": groups}, exempt)


def test_optimizers_of_other_groups_are_named():
    state = {"state": {0: {}, 5: {}}, "param_groups": [{"params": [0]}, {"params": [5]}]}
    named = optimizer_by_name(state, [["a"], ["b"]])
    assert named["state"].keys() == {"a", "b"}
    with pytest.raises(ValueError, match=r"\[1, 1\] parameters, not \[2, 0\]"):
        optimizer_by_name(state, [["a", "b"], []])
    with pytest.raises(ValueError, match="group 0 and this one differ in a, c"):
        optimizer_by_position(named, [["c"], ["b"]])
    lacking = [{"state": {f"{LAYER}experts.batched_fc1_w": {"step": 1}}}, {"state": {}}]
    with pytest.raises(ValueError, match="batched_fc1_w is not of the same kind in ranks 0 and 1"):
        process_optimizer(lacking, {LAYER: ExpertLayer(2, 1, 4, 3)}, 0, 1)


@pytest.mark.parametrize("W", [3, 5, 0, -2])
def test_experts_that_do_not_divide_are_refused(W):
    with pytest.raises(ValueError, match=rf"4 experts do not divide over {W} process"):
        process_state([whole_state(4, 6, 3)], 0, W)


def test_hidden_channels_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="6 hidden channels of an expert do not divide over 4 processes"):
        split_experts(whole_state(2, 6, 3), 8)


def test_states_that_do_not_belong_together_are_named():
    whole = whole_state(4, 6, 3)
    states, files = split_experts(whole, 4), [f"a.pth.rank{rank}" for rank in range(4)]
    other = split_experts(whole, 2)[1]
    with pytest.raises(ValueError, match=r"fc1_w is 1x6x3 float32 in a.pth.rank0, 2x6x3 float32 in a.pth.rank3"):
        gather_experts([*states[:3], other], files)
    for few, text in ((states[:3], "3 state"), (states + states, "batched_fc2_bias in rank 0 is 1x3, expected 1x2")):
        with pytest.raises(ValueError, match=text):  # a missing file; left-overs
            gather_experts(few)
    with pytest.raises(ValueError, match=r"3 state\(s\) \(a.pth.rank0 …\) hold 1 each, their gate has 4"):
        gather_experts(states[:3], files[:3])
    shards = split_experts(whole, 8)
    with pytest.raises(ValueError, match="fc2_bias in rank 0 is 1x2, expected 1x3 for 4"):
        gather_experts(shards[:4])
    lacking = {name: value for name, value in states[2].items() if name != "head.bias"}
    with pytest.raises(ValueError, match=r"head.bias is in a.pth.rank0, not in a.pth.rank2"):
        gather_experts([*states[:2], lacking, states[3]], files)
    half = {name: value.half() if is_expert(name) else value for name, value in states[1].items()}
    with pytest.raises(ValueError, match=r"1x6x3 float32 in rank 0, 1x6x3 float16 in rank 1"):
        gather_experts([states[0], half, *states[2:]])
    for name, text in ((f"{LAYER}gates.0.wg.weight", "gates is missing in rank 0"), (COUNTER, None)):
        without = {key: value for key, value in mid_2022(whole).items() if key != name}
        if text:
            with pytest.raises(ValueError, match=text):
                gather_experts([without])
        else:
            assert_same(gather_experts([without]), whole)
    del whole[f"{LAYER}experts.batched_fc1_bias"]
    with pytest.raises(ValueError, match="batched_fc1_bias is missing in rank 0"):
        gather_experts([whole])


def test_reading_one_process_touches_only_what_it_needs():
    """States of other processes stay unread: their values would show."""
    states = split_experts(whole_state(8, 4, 3), 8)
    for rank, state in enumerate(states):
        for name in filter(is_expert, state):
            if rank not in (2, 3):
                state[name] = torch.empty_like(state[name], device="meta")
    assert process_state(states, 1, 4)[f"{LAYER}experts.batched_fc1_w"].device.type == "cpu"


def test_the_master_file_is_merged():
    whole = whole_state(4, 6, 3)
    bias = f"{LAYER}experts.batched_fc2_bias"
    whole[bias].zero_()
    states = split_experts(whole, 8)  # two processes to an expert: fc2's bias is in slices of 2
    experts = [{n: v for n, v in state.items() if is_expert(n) and n != bias} for state in states]
    master = {n: v for n, v in states[0].items() if not is_expert(n) or n == bias}
    assert_same(gather_experts(merge_master(experts, master, "a.pth.master")), whole)
    with pytest.raises(ValueError, match=r"fc2_bias in a.pth.master is not zero"):
        merge_master(experts, {**master, bias: torch.ones(1, 2)}, "a.pth.master")
    with pytest.raises(ValueError, match=r"fc1_w is in a.pth.master, which holds no experts"):
        merge_master(experts, states[0], "a.pth.master")


def test_models_without_experts_stay_as_they_are():
    dense = {name: value for name, value in whole_state(2, 4, 3).items() if "_moe_layer" not in name}
    assert_same(gather_experts([dense, dense]), dense)
    assert_same(split_experts(dense, 3)[2], dense)


# Files, with a small model of 4 experts in two of its four blocks.

LOGGER = logging.getLogger("test")
SMALL_MOE = [
    *("MODEL.TYPE", "swin_moe", "MODEL.NAME", "small_moe", "MODEL.NUM_CLASSES", 3, "DATA.IMG_SIZE", 16),
    *("MODEL.SWIN_MOE.PATCH_SIZE", 2, "MODEL.SWIN_MOE.EMBED_DIM", 8, "MODEL.SWIN_MOE.DEPTHS", [2, 2]),
    *("MODEL.SWIN_MOE.NUM_HEADS", [2, 4], "MODEL.SWIN_MOE.WINDOW_SIZE", 4, "MODEL.SWIN_MOE.MLP_RATIO", 2.0),
    *("MODEL.SWIN_MOE.IS_GSHARD_LOSS", True, "MODEL.DROP_PATH_RATE", 0.0, "TRAIN.EPOCHS", 4, "TRAIN.WARMUP_EPOCHS", 0),
    *("MODEL.SWIN_MOE.NUM_LOCAL_EXPERTS", 4, "MODEL.SWIN_MOE.MOE_BLOCKS", [[1], [0]]),
]
DENSE = ("MODEL.SWIN_MOE.MOE_BLOCKS", [[-1], [-1]])


class Parts:
    """A model with everything that a checkpoint holds, after two steps."""

    def __init__(self, folder: Path, *opts, steps: int = 2, seed: int = 0):
        torch.manual_seed(seed)
        self.config = make_config(None, *SMALL_MOE, *opts, output=str(folder))
        os.makedirs(self.config.OUTPUT, exist_ok=True)
        self.folder = Path(self.config.OUTPUT)
        self.model = build_model(self.config)
        self.optimizer = build_optimizer(self.config, self.model)
        self.scheduler = build_scheduler(self.config, self.optimizer, 10)
        self.scaler = utils.NativeScalerWithGradNormCount("cpu", enabled=False)
        self.train(steps)

    def train(self, steps: int) -> None:
        for step in range(steps):
            self.optimizer.zero_grad()
            logits, loss = self.model(torch.randn(2, 3, 16, 16))
            self.scaler(logits.square().sum() + loss, self.optimizer, clip_grad=5.0)
            self.scheduler.step_update(step)

    def save(self, epoch: int | str = 5, official: bool = False, **extra) -> Path:
        self.config.defrost()
        self.config.TRAIN.MOE.CHECKPOINT = "official" if official else "native"
        self.config.freeze()
        parts = (self.optimizer, self.scheduler, self.scaler, LOGGER)
        return utils_moe.save_checkpoint(self.config, epoch, self.model, 12.5, *parts, **extra)

    def resume(self, path: str | Path) -> dict:
        self.set("RESUME", path)
        return utils_moe.resume(self.config, self.model, self.optimizer, self.scheduler, self.scaler, LOGGER)

    def set(self, key: str, path: str | Path) -> None:
        self.config.defrost()
        self.config.MODEL[key] = str(path)
        self.config.freeze()

    def names(self) -> list[list[str]]:
        return utils_moe.group_names(self.model, self.optimizer)

    def optimizer_by_name(self) -> dict:
        return optimizer_by_name(self.optimizer.state_dict(), self.names())


def assert_equal_parts(a: Parts, b: Parts) -> None:
    assert_same(a.model.state_dict(), b.model.state_dict())
    assert reshard_moe.digest(a.optimizer.state_dict()) == reshard_moe.digest(b.optimizer.state_dict())


def official_contents(parts: Parts, W: int, old: bool = True) -> list[dict]:
    """What each of W processes saves officially, cut by definition; with ``old`` as in mid-2022."""
    whole, named, contents = parts.model.state_dict(), parts.optimizer_by_name(), []
    for rank in range(W):
        form = mid_2022 if old else dict
        state = form(by_definition({**whole, **counters(whole)}, 4, W, rank))
        moments = ("exp_avg", "exp_avg_sq")
        cut = {
            m: form(by_definition({n: entry[m] for n, entry in named["state"].items()}, 4, W, rank)) for m in moments
        }
        entries = {n: {"step": entry["step"], **{m: cut[m][n] for m in moments}} for n, entry in named["state"].items()}
        contents.append(
            {
                "model": state,
                "optimizer": optimizer_by_position({**named, "state": entries}, parts.names()),
                "lr_scheduler": parts.scheduler.state_dict(),
                "max_accuracy": 12.5,
                "scaler": {},
                "epoch": 5,
                "config": CfgNode(to_dict(parts.config)),
            }
        )
    return contents


def counters(state: dict) -> dict:
    return {name: value for name, value in state.items() if name.endswith("_num_global_experts")}


def write_ranks(folder: Path, contents: list[dict], name: str = "ckpt_epoch_5.pth") -> Path:
    for rank, content in enumerate(contents):
        torch.save(content, folder / f"{name}.rank{rank}")
    return folder / name


@pytest.fixture
def parts(tmp_path):
    return Parts(tmp_path / "run")


@pytest.mark.parametrize("W", [1, 2, 4, 8])
@pytest.mark.parametrize("fc2_bias", [True, False])
def test_official_files_of_any_number_of_processes_are_resumed(tmp_path, W, fc2_bias):
    parts = Parts(tmp_path / "run", "MODEL.SWIN_MOE.MLP_FC2_BIAS", fc2_bias)
    path = write_ranks(tmp_path, official_contents(parts, W))
    for given_path in (path, f"{path}.rank0"):
        other = Parts(tmp_path / "other", "MODEL.SWIN_MOE.MLP_FC2_BIAS", fc2_bias, steps=0, seed=1)
        saved = other.resume(given_path)
        assert_equal_parts(parts, other)
        assert saved["max_accuracy"] == 12.5 and other.config.TRAIN.START_EPOCH == 6
    share = utils_moe.read_process(path, 1, 2)
    assert_same(share["model"], by_definition(parts.model.state_dict(), 4, 2, 1))


@pytest.mark.parametrize("fc2_bias", [True, False])
def test_official_files_of_a_run_s_end_are_merged(tmp_path, fc2_bias):
    parts = Parts(tmp_path / "run", "MODEL.SWIN_MOE.MLP_FC2_BIAS", fc2_bias)
    contents = official_contents(parts, 8)
    own = [n for n in contents[0]["model"] if is_expert(n) and (fc2_bias or not n.endswith("fc2_bias"))]
    path = write_ranks(tmp_path, [{"model": {n: content["model"][n] for n in own}} for content in contents], "end.pth")
    with pytest.raises(FileNotFoundError, match=r"end.pth.master: missing; end.pth.rank0 holds experts alone"):
        utils_moe.read_process(path)
    torch.save({"model": {n: v for n, v in contents[0]["model"].items() if n not in own}}, f"{path}.master")
    for given_path in (path, f"{path}.rank3", f"{path}.master"):
        assert_same(utils_moe.read_process(given_path)["model"], parts.model.state_dict())
    other = Parts(tmp_path / "other", "MODEL.SWIN_MOE.MLP_FC2_BIAS", fc2_bias, "MODEL.NUM_CLASSES", 5, seed=1)
    other.set("PRETRAINED", path)
    utils_moe.load_pretrained(other.config, other.model, LOGGER)
    wanted = parts.model.state_dict() | {"head.weight": torch.zeros(5, 16), "head.bias": torch.zeros(5)}
    assert_same(other.model.state_dict(), wanted)


def test_a_model_of_mid_2022_takes_files_of_today(tmp_path, parts):
    """Tutel's layer of that time, with biases of rank 3 and no counters, stands behind the other backend."""

    def age(old: Parts) -> None:
        for module in [m for m in old.model.modules() if hasattr(m, "batched_fc1_bias")]:
            for bias in (module.batched_fc1_bias, module.batched_fc2_bias):
                bias.data = bias.data[:, None]
        for module in [m for m in old.model.modules() if hasattr(m, "_num_global_experts")]:
            del module._num_global_experts

    other = Parts(tmp_path / "other", steps=0, seed=1)
    age(other)
    other.resume(parts.save())
    assert_same(other.model.state_dict(), mid_2022(parts.model.state_dict()))
    moments, own = other.optimizer_by_name()["state"], parts.optimizer_by_name()["state"]
    for key in ("exp_avg", "exp_avg_sq"):
        assert_same({n: e[key] for n, e in moments.items()}, mid_2022({n: e[key] for n, e in own.items()}))


def test_missing_and_stale_files_are_named(tmp_path, parts):
    eight, two = official_contents(parts, 8), official_contents(parts, 2)
    path = write_ranks(tmp_path, eight)
    (tmp_path / f"{path.name}.rank3").rename(tmp_path / "rank3")
    with pytest.raises(FileNotFoundError, match=r"ckpt_epoch_5.pth.rank3: missing; 7 other"):
        utils_moe.read_process(path)
    (tmp_path / "rank3").rename(f"{path}.rank3")
    (tmp_path / f"{path.name}.rank7").unlink()
    with pytest.raises(ValueError, match=r"7 state\(s\) .*files are missing"):
        utils_moe.read_process(path)
    write_ranks(tmp_path, two)  # 2 .. 6 are left over from 8 processes
    with pytest.raises(ValueError, match=r"in ckpt_epoch_5.pth.rank0, .* in ckpt_epoch_5.pth.rank2; one is of another"):
        utils_moe.read_process(path)
    later = official_contents(parts, 2)
    later[1]["epoch"] = 4
    path = write_ranks(tmp_path, later, "other.pth")
    with pytest.raises(ValueError, match=r"other.pth.rank1: its epoch is 4, that of other.pth.rank0 5"):
        utils_moe.read_process(path)
    Path(f"{path}.rank1").write_bytes(Path(f"{path}.rank1").read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"other.pth.rank1: truncated"):
        utils_moe.read_process(path)
    with pytest.raises(FileNotFoundError, match=r"gone.pth: no such checkpoint"):
        utils_moe.read_process(tmp_path / "gone.pth")
    with pytest.raises(ValueError, match=r"ckpt_epoch_5.pth: 4 experts do not divide over 3"):
        utils_moe.read_process(parts.save(), 0, 3)


def test_a_global_file_of_one_of_several_processes_is_refused(tmp_path, parts):
    torch.save(official_contents(parts, 1)[0], tmp_path / "a.pth.global")
    assert_same(utils_moe.read_process(tmp_path / "a.pth")["model"], parts.model.state_dict())
    torch.save(official_contents(parts, 2)[0], tmp_path / "b.pth.global")
    with pytest.raises(ValueError, match=r"1 state\(s\) \(b.pth.global …\) hold 2 each, their gate has 4"):
        utils_moe.read_process(tmp_path / "b.pth.global")


@pytest.mark.parametrize("official", [True, False])
@pytest.mark.parametrize("master", [True, False])
def test_one_process_saves_and_resumes(parts, official, master):
    parts.config.defrost()
    parts.config.TRAIN.MOE.SAVE_MASTER = master
    earlier = [parts.save(5, official, step=step, rng=[1], classes=["a"]) for step in (2, 4)]
    assert [file.name[:23] for file in parts.folder.iterdir()] == [earlier[1].name]
    path = parts.save(5, official, rng=[distributed.rng_state(torch.device("cpu"))], classes=["a"])
    ending = (".global" if master else ".rank0") if official else ""
    assert list(parts.folder.iterdir()) == [Path(f"{path}{ending}")] and path.name == "ckpt_epoch_5.pth"
    other = Parts(parts.folder / "other", steps=0, seed=1)
    saved = other.resume(path)
    assert_equal_parts(parts, other)
    assert saved["classes"] == ["a"] and len(saved["rng"]) == 1 and saved["epoch"] == 5
    if official:  # what the official code reads: its optimizer loads numbers, from plain data
        content = torch.load(f"{path}{ending}", weights_only=True)
        load_optimizer_state(Parts(parts.folder / "other", steps=0).optimizer, content["optimizer"])
        assert content["optimizer"]["param_groups"][0]["params"][0] == 0
    else:  # other code loads it too: PyTorch takes names for numbers
        content = torch.load(path, weights_only=True)
        plain = Parts(parts.folder / "other", steps=0)
        plain.optimizer.load_state_dict(content["optimizer"])
        plain.model.load_state_dict(content["model"])
        assert_equal_parts(parts, plain)


@pytest.mark.parametrize("weights_alone", [True, False])
def test_models_without_experts_have_all_forms_too(tmp_path, weights_alone):
    parts = Parts(tmp_path / "run", *DENSE)
    for official in (True, False):
        path = parts.save(5, official, zero_redundancy=weights_alone)
        assert_same(utils_moe.read_process(path)["model"], parts.model.state_dict())
    contents = official_contents(parts, 2)
    assert_same(utils_moe.read_process(write_ranks(tmp_path, contents))["model"], parts.model.state_dict())


def test_auto_resume_finds_the_newest_that_is_complete(tmp_path, parts, caplog):
    helper = utils_moe.auto_resume_helper
    folder = parts.folder
    assert helper(folder) is None
    first = parts.save(3)
    assert helper(folder, False, LOGGER) == str(first)
    write_ranks(folder, official_contents(parts, 4), "ckpt_epoch_10.pth")
    assert helper(folder) == str(folder / "ckpt_epoch_10.pth.rank0")
    for rank in range(4):  # weights alone are not for resuming
        torch.save({"model": {}}, folder / f"ckpt_epoch_final.pth.rank{rank}")
        content = torch.load(folder / f"ckpt_epoch_10.pth.rank{rank}", weights_only=False)
        torch.save({"model": content["model"]}, folder / f"ckpt_epoch_11.pth.rank{rank}")
    (folder / "ckpt_epoch_12.pth.0123abcd.experts0of2").write_bytes(b"of a save that broke off")
    with caplog.at_level(logging.WARNING, "test"):
        assert helper(folder, logger=LOGGER) == str(folder / "ckpt_epoch_10.pth.rank0")
    assert "weights alone" in caplog.text
    (folder / "ckpt_epoch_10.pth.rank2").unlink()
    with caplog.at_level(logging.WARNING, "test"):
        assert helper(folder, logger=LOGGER) == str(first)
    assert "ckpt_epoch_10.pth.rank2: missing" in caplog.text
    first.write_bytes(first.read_bytes()[:5000])
    with pytest.raises(ValueError, match="none of its 3 checkpoint"):
        helper(folder)


# Two processes with two of the four experts each. Starting them takes most of the time, so they start once.


def in_each_process(rank: int, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    try:
        save_every_form(rank, tmp_path)
        refuse_together(rank, tmp_path)
        write_one_of_two_copies(rank, tmp_path)
        distributed.leave(0)
    finally:
        distributed.stop()


def half(folder: Path, seed: int) -> Parts:
    """Not trained: exchanges of tokens are not the point here."""
    return Parts(folder, "MODEL.SWIN_MOE.NUM_LOCAL_EXPERTS", 2, steps=0, seed=seed)


def save_every_form(rank: int, tmp_path: Path) -> None:
    parts = half(tmp_path / "halves", seed=rank + 1)
    parts.resume(tmp_path / "one.pth")
    assert_same(parts.model.state_dict(), by_definition(torch.load(tmp_path / "whole.pth"), 4, 2, rank))
    for name, (official, master, weights_alone, _) in FORMS.items():
        parts.config.defrost()
        parts.config.OUTPUT = str(tmp_path / name)
        parts.config.TRAIN.MOE.SAVE_MASTER = master
        os.makedirs(parts.config.OUTPUT, exist_ok=True)
        for _ in range(2):  # again over its own files
            path = parts.save(5, official, zero_redundancy=weights_alone, rng=distributed.gather_objects(rank))
        again = half(tmp_path / "halves", seed=rank + 7)
        if weights_alone:
            again.set("PRETRAINED", path)
            utils_moe.load_pretrained(again.config, again.model, LOGGER)
            assert_same(parts.model.state_dict(), again.model.state_dict())
        else:
            again.resume(path)
            assert_equal_parts(parts, again)
    for _ in range(2):
        utils_moe.save_best(parts.config, 5, parts.model, 50.0, ["a"], LOGGER)
    assert utils.best_accuracy(parts.config) == 50.0


def refuse_together(rank: int, tmp_path: Path) -> None:
    parts = half(tmp_path / "refused", seed=1)
    before = parts.save()
    files = sorted(path.name for path in parts.folder.iterdir())
    write = storage.write_temporary
    for broken, official in ((1, False), (0, False), (1, True)):
        calls = []

        def fail(content, path, broken=broken, calls=calls):
            calls.append(path)
            if rank == broken and (broken or len(calls) == 2):  # the main process fails at the shared file
                raise RuntimeError("the disk is full")
            return write(content, path)

        storage.write_temporary = fail
        error, text = (
            (RuntimeError, "^the disk") if rank == broken else (OSError, f"^process {broken}: RuntimeError: the")
        )
        with pytest.raises(error, match=text):
            parts.save(official=official)
        storage.write_temporary = write
        distributed.barrier()
        assert sorted(path.name for path in parts.folder.iterdir()) == files
        parts.resume(before)
    error, text = (FileNotFoundError, "^.*gone") if rank else (OSError, "^process 1: FileNotFoundError: .*gone.pth")
    with pytest.raises(error, match=text):
        parts.resume(parts.folder / "gone.pth" if rank else before)


def write_one_of_two_copies(rank: int, tmp_path: Path) -> None:
    """Each process holds all experts: the first writes one whole file."""
    torch.manual_seed(rank)
    parts = Parts(tmp_path / "copies", steps=0)
    parts.config.defrost()
    parts.config.MODEL.SWIN_MOE.EXPERT_PARALLEL = 1
    parts.model = build_model(parts.config)
    parts.optimizer = build_optimizer(parts.config, parts.model)
    parts.save()
    assert [path.name for path in parts.folder.iterdir()] == ["ckpt_epoch_5.pth"]
    assert place_of(parts.model) == Place(0, 1, rank == 0)


PARTS = [".<save>.experts0of2", ".<save>.experts1of2"]
FORMS = {  # official, SAVE_MASTER, weights alone: endings
    "native": (False, False, False, ["", *PARTS]),
    "official": (True, False, False, [".rank0", ".rank1"]),
    "global": (True, True, False, [".global"]),
    "end": (True, False, True, [".master", ".rank0", ".rank1"]),
    "weights": (False, False, True, ["", "", PARTS[0], PARTS[0], PARTS[1], PARTS[1]]),  # ckpt_best.pth too
}


def test_two_processes_read_and_write_every_form_and_fail_together(tmp_path):
    parts = Parts(tmp_path / "one")
    path = parts.save()
    path.rename(tmp_path / "one.pth")
    torch.save(parts.model.state_dict(), tmp_path / "whole.pth")
    mp.start_processes(in_each_process, (tmp_path,), nprocs=2, start_method="forkserver")
    content = utils_moe.read_process(tmp_path / "one.pth")
    weights = reshard_moe.digest(content["model"])
    for name, (*_, endings) in FORMS.items():
        found = [re.sub(r"\.[0-9a-f]{8}\.e", ".<save>.e", file.name) for file in (tmp_path / name).iterdir()]
        assert sorted(file.split(".pth")[1] for file in found) == endings
        saved = utils_moe.read_process(tmp_path / name / "ckpt_epoch_5.pth")
        assert reshard_moe.digest(saved["model"]) == weights
        if "optimizer" in saved:
            assert reshard_moe.digest(saved["optimizer"]) == reshard_moe.digest(content["optimizer"])
            assert saved["rng"] == [0, 1] and "save" not in saved and "expert_parts" not in saved
    assert reshard_moe.digest(utils_moe.read_process(tmp_path / "weights" / "ckpt_best.pth")["model"]) == weights
    share = utils_moe.read_process(tmp_path / "native" / "ckpt_epoch_5.pth", 3, 8)
    assert_same(share["model"], by_definition(parts.model.state_dict(), 4, 8, 3))
    reshard_moe.split(tmp_path / "native" / "ckpt_epoch_5.pth", tmp_path / "eight.pth", 8)
    for rank, wanted in enumerate(official_contents(parts, 8, old=False)):
        found = torch.load(tmp_path / f"eight.pth.rank{rank}", weights_only=True)
        assert reshard_moe.digest(found["model"]) == reshard_moe.digest(wanted["model"])
        assert reshard_moe.digest(found["optimizer"]) == reshard_moe.digest(wanted["optimizer"])
    refuse_broken_parts(tmp_path / "native" / "ckpt_epoch_5.pth")


def refuse_broken_parts(path: Path) -> None:
    part = next(path.parent.glob("*experts1of2"))
    data = part.read_bytes()
    part.write_bytes(data[:-1])
    with pytest.raises(ValueError, match=rf"experts1of2: {len(data) - 1} bytes, of {len(data)} that ckpt_epoch_5.pth"):
        utils_moe.read_process(path)
    part.unlink()
    with pytest.raises(FileNotFoundError, match=r"experts1of2: missing; ckpt_epoch_5.pth needs it"):
        utils_moe.read_process(path)
    with pytest.raises(ValueError, match="none of its 1 checkpoint"):
        utils_moe.auto_resume_helper(path.parent)


# The tool, and upcycling.


def test_the_tool_goes_from_official_to_ours_and_back(tmp_path, parts, monkeypatch, caplog):
    def tool(*arguments) -> str:
        monkeypatch.setattr("sys.argv", ["reshard_moe.py", *map(str, arguments)])
        caplog.clear()
        with caplog.at_level(logging.INFO):
            reshard_moe.main()
        return caplog.records[-1].message.rsplit("sha256 ", 1)[1]

    contents = official_contents(parts, 4, old=False)
    official = write_ranks(tmp_path, contents)
    digests = [tool("gather", official, tmp_path / "one.pth")]
    digests.append(tool("split", tmp_path / "one.pth", tmp_path / "two.pth", "--processes", 2))
    digests.append(tool("split", tmp_path / "two.pth.rank1", tmp_path / "eight.pth", "--processes", 8))
    digests.append(tool("gather", tmp_path / "eight.pth", tmp_path / "again.pth"))
    digests.append(tool("split", tmp_path / "again.pth", tmp_path / "four.pth", "--processes", 4))
    assert len(set(digests)) == 1
    for rank, content in enumerate(contents):
        with torch.serialization.safe_globals(storage.OFFICIAL_PICKLES):
            back = torch.load(tmp_path / f"four.pth.rank{rank}", weights_only=True)
        for key in ("model", "optimizer", "lr_scheduler", "epoch"):
            assert reshard_moe.digest(back[key]) == reshard_moe.digest(content[key]), key
    assert not list(tmp_path.glob(".*"))
    for target, source, text in (
        ("one.pth", official, "one.pth exists"),
        ("four.pth", official, "four.pth.rank0 exists"),
        ("one.bin", official, "ends in .pth"),
        ("gone/one.pth", official, "no such folder"),
        ("three.pth", tmp_path / "gone.pth", "no such checkpoint"),
    ):
        with pytest.raises(SystemExit, match=text):
            tool("gather", source, tmp_path / target)
    with pytest.raises(SystemExit, match="4 experts do not divide over 3"):
        tool("split", official, tmp_path / "three.pth", "--processes", 3)
    assert not list(tmp_path.glob("three*"))
    monkeypatch.setattr(
        reshard_moe, "write_temporary", lambda content, path: storage.write_temporary({"model": {}}, path)
    )
    with pytest.raises(SystemExit, match="differs from what was written"):
        tool("gather", official, tmp_path / "bad.pth")
    assert not list(tmp_path.glob("*bad*"))


UPCYCLED = [*("MODEL.SWIN_MOE.TOP_VALUE", 2, "MODEL.SWIN_MOE.NORMALIZE_GATE", True)]
UPCYCLED += ["MODEL.SWIN_MOE.CAPACITY_FACTOR", 0.0, "MODEL.SWIN_MOE.GATE_NOISE", 0.0]


def upcycled(tmp_path: Path, **options) -> Path:
    """A file with 4 experts of `dense.pth`, which is written too."""
    dense = Parts(tmp_path / "dense", *DENSE)
    torch.save({"model": dense.model.state_dict()}, tmp_path / "dense.pth")
    opts = [o if isinstance(o, str) else repr(o) for o in (*SMALL_MOE, *UPCYCLED)]
    reshard_moe.make_experts(tmp_path / "dense.pth", tmp_path / "moe.pth", None, 4, opts=opts, **options)
    return tmp_path / "moe.pth"


def test_an_upcycled_model_gives_the_dense_logits(tmp_path):
    path = upcycled(tmp_path)
    dense, moe = Parts(tmp_path / "dense", *DENSE, steps=0), Parts(tmp_path / "moe", *UPCYCLED, steps=0, seed=3)
    dense.model.load_state_dict(torch.load(tmp_path / "dense.pth")["model"])
    moe.set("PRETRAINED", path)
    utils_moe.load_pretrained(moe.config, moe.model, LOGGER)
    images = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        assert torch.allclose(moe.model.eval()(images)[0], dense.model.eval()(images)[0], atol=1e-5)
    gate = moe.model.state_dict()["layers.0.blocks.1.mlp._moe_layer.gates.0.wg.weight"]
    assert 0.01 < gate.std() < 0.03  # INIT_STD


def test_noise_is_relative_and_frozen_experts_stay(tmp_path):
    path = upcycled(tmp_path, noise=0.1, freeze=2, seed=5)
    name = "layers.0.blocks.1.mlp._moe_layer.experts.batched_fc2_w"
    dense = torch.load(tmp_path / "dense.pth")["model"]["layers.0.blocks.1.mlp.fc2.weight"].T
    state = torch.load(path)["model"]
    assert torch.equal(state[name][:2], dense.expand(2, -1, -1))
    difference = state[name][2:] - dense
    assert difference.std() / dense.std() == pytest.approx(0.1, rel=0.15)
    assert not torch.equal(difference[0], difference[1])

    parts = Parts(tmp_path / "moe", *UPCYCLED, steps=0)
    parts.set("PRETRAINED", path)
    with pytest.raises(ValueError, match=r"moe.pth has frozen experts; load_pretrained must be given the optimizer"):
        utils_moe.load_pretrained(parts.config, parts.model, LOGGER)
    parts = Parts(tmp_path / "moe", *UPCYCLED, steps=0)
    parts.set("PRETRAINED", path)
    utils_moe.load_pretrained(parts.config, parts.model, LOGGER, parts.optimizer)
    parts.train(3)
    again = Parts(tmp_path / "moe", *UPCYCLED, steps=0, seed=2)
    again.resume(parts.save())
    again.train(3)
    for trained in (parts, again):
        weights = trained.model.state_dict()
        for key in filter(is_expert, state):
            assert torch.equal(weights[key][:2], state[key][:2])
            assert not torch.equal(weights[key][2:], state[key][2:])
    with pytest.raises(ValueError, match=r"frozen expert 4: .* has 4"):
        utils_moe.freeze_experts(parts.model, parts.optimizer, [4])


def test_what_cannot_be_upcycled_is_said(tmp_path):
    dense = Parts(tmp_path / "dense", *DENSE, steps=0).model.state_dict()
    expected = Parts(tmp_path / "moe", steps=0).model.state_dict()
    for name, family in (("relative_position_bias_table", "Swin V1"), ("logit_scale", "SwinV2")):
        with pytest.raises(ValueError, match=f"it is a {family}, whose position bias is not Swin-MoE's"):
            upcycle({**dense, f"layers.0.blocks.0.attn.{name}": torch.zeros(1)}, expected)
    with pytest.raises(ValueError, match="it has experts already"):
        upcycle(expected, expected)
    with pytest.raises(ValueError, match="MOE_BLOCKS names no blocks"):
        upcycle(dense, dense)
    with pytest.raises(ValueError, match=r"layers.0.blocks.1.mlp.fc1.weight is missing"):
        upcycle({n: v for n, v in dense.items() if "blocks.1" not in n}, expected)
    wider = {n: torch.zeros(32, *v.shape[1:]) if n.endswith("blocks.1.mlp.fc1.weight") else v for n, v in dense.items()}
    with pytest.raises(ValueError, match=r"batched_fc1_w: 4x32x8 in the file, 4x16x8 in the model"):
        upcycle(wider, expected)
    for options in ({"experts": 0}, {"experts": 2, "freeze": 3}, {"experts": 2, "noise": -1.0}):
        with pytest.raises(ValueError, match="--experts"):
            reshard_moe.make_experts("dense.pth", tmp_path / "a.pth", None, **options)
