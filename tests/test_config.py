"""Configuration: official values, inheritance, flags, and errors that name the way out."""

import json
from types import SimpleNamespace

import pytest
from conftest import ROOT, golden, make_config

import launch
from config import get_config, to_dict

OFFICIAL = golden("configs")
OFFICIAL_FILES = list(OFFICIAL["configs"])
FAMILIES = ("swin", "swinv2", "swinmlp", "swinmoe", "simmim")
SCRIPTS = {"swinmoe": "main_moe.py", "simmim_pretrain": "main_simmim_pt.py", "simmim_finetune": "main_simmim_ft.py"}


def assert_contains(actual: dict, expected: dict) -> None:
    for key, value in expected.items():
        if isinstance(value, dict):
            assert_contains(actual[key], value)
        else:
            assert actual[key] == value, key
            assert type(actual[key]) is type(value), key


def test_defaults_are_the_official_ones():
    expected = json.loads(json.dumps(OFFICIAL["defaults"]))
    expected["OUTPUT"] = "output/swin_tiny_patch4_window7_224/default"
    assert_contains(to_dict(make_config()), expected)


@pytest.mark.parametrize("name", OFFICIAL_FILES)
def test_yaml_files_are_the_official_ones(name):
    config, expected = to_dict(make_config(name)), to_dict(make_config())
    assert_contains(config, OFFICIAL["configs"][name])

    def override(target: dict, values: dict) -> None:
        for key, value in values.items():
            override(target[key], value) if isinstance(value, dict) else target.update({key: value})

    override(expected, OFFICIAL["configs"][name])
    expected["OUTPUT"] = config["OUTPUT"]
    assert config == expected  # nothing else is changed


OWN_FILES = ["configs/swin/swin_tiny_patch4_window4_64_tiny_imagenet.yaml"]


def test_every_official_file_is_there_and_says_its_command():
    files = [path.relative_to(ROOT).as_posix() for family in FAMILIES for path in (ROOT / "configs" / family).iterdir()]
    assert sorted(files) == sorted([*OFFICIAL_FILES, *OWN_FILES])
    for name in files:
        text = (ROOT / name).read_text()
        script = next((script for part, script in SCRIPTS.items() if part in name), "main.py")
        assert "arxiv.org" in text and f" {script} --cfg {name}" in text and "# Expected:" in text


def test_base_files_come_first(tmp_path):
    (tmp_path / "base.yaml").write_text("DATA: {IMG_SIZE: 64, BATCH_SIZE: 2}\nTRAIN: {EPOCHS: 7}")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "leaf.yaml").write_text("BASE: ['../base.yaml']\nDATA: {BATCH_SIZE: 4}")
    config = make_config(tmp_path / "sub" / "leaf.yaml", "TRAIN.EPOCHS", 9)
    assert (config.DATA.IMG_SIZE, config.DATA.BATCH_SIZE, config.TRAIN.EPOCHS) == (64, 4, 9)


def test_base_that_leads_back_is_an_error(tmp_path):
    (tmp_path / "a.yaml").write_text("BASE: ['b.yaml']")
    (tmp_path / "b.yaml").write_text("BASE: ['a.yaml']")
    with pytest.raises(ValueError, match="BASE leads back"):
        make_config(tmp_path / "a.yaml")


def test_a_flag_counts_only_when_given(tmp_path):
    (tmp_path / "c.yaml").write_text("DATA: {CACHE_MODE: full}\nOUTPUT: elsewhere\nTAG: mine")
    arguments = launch.build_parser("").parse_args(["--cfg", str(tmp_path / "c.yaml")])
    config = get_config(arguments)
    assert config.DATA.CACHE_MODE == "full"
    assert config.OUTPUT == "elsewhere/swin_tiny_patch4_window7_224/mine"
    assert config.AMP_ENABLE and not config.EVAL_MODE


def test_every_official_flag_sets_its_key(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("")
    command = (
        f"--cfg {path} --batch-size 6 --data-path D --zip --cache-mode no --pretrained P --resume R "
        "--accumulation-steps 3 --use-checkpoint --disable_amp --output O --tag T --eval --throughput --local_rank 0 "
        "--fused_window_process --fused_layernorm --optim sgd --enable-amp --amp-dtype bf16"
    )
    config = get_config(launch.build_parser("").parse_args(command.split()))
    data, train = config.DATA, config.TRAIN
    assert (data.BATCH_SIZE, data.DATA_PATH, data.ZIP_MODE, data.CACHE_MODE) == (6, "D", True, "no")
    assert (config.MODEL.PRETRAINED, config.MODEL.RESUME, config.TAG) == ("P", "R", "T")
    assert (train.ACCUMULATION_STEPS, train.USE_CHECKPOINT, train.OPTIMIZER.NAME) == (3, True, "sgd")
    assert not config.AMP_ENABLE and config.ENABLE_AMP and config.AMP_DTYPE == "bf16"
    assert config.EVAL_MODE and config.THROUGHPUT_MODE
    assert config.FUSED_WINDOW_PROCESS and config.FUSED_LAYERNORM
    assert config.OUTPUT == "O/swin_tiny_patch4_window7_224/T"


def test_amp_opt_level_o0_turns_amp_off():
    assert not get_config(SimpleNamespace(cfg=None, amp_opt_level="O0")).AMP_ENABLE


@pytest.mark.parametrize(
    "opts, message",
    [
        (["MODEL.SWIN.EMBED_DIMS", "8"], "did you mean MODEL.SWIN.EMBED_DIM?"),
        (["TRAIN.EPOCHS", "many"], "TRAIN.EPOCHS='many' is of type str, expected int"),
        (["TRAIN.EPOCHS"], "has no partner"),
        (["DATA.BATCH_SIZE", "0"], "DATA.BATCH_SIZE=0; the smallest allowed value is 1"),
        (["DATA.NUM_WORKERS", "-1"], "DATA.NUM_WORKERS=-1; the smallest allowed value is 0"),
        (["AMP_DTYPE", "bf32"], "choose from"),
        (["AUG.MIXUP_MODE", "elm"], "choose from"),
        (["MODEL.DROP_PATH_RATE", "2"], "the largest allowed value is 1"),
        (["MODEL.SWIN.DEPTHS", "['a',2]"], "MODEL.SWIN.DEPTHS='a' is of type str"),
        (["model.type", "swin"], "did you mean MODEL.TYPE?"),
    ],
)
def test_wrong_options_name_the_way_out(opts, message):
    with pytest.raises(ValueError) as error:
        make_config(None, *opts)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_unknown_key_in_a_file_names_file_and_nearest_key(tmp_path):
    (tmp_path / "c.yaml").write_text("TRAIN: {BASE_LRS: 1}")
    with pytest.raises(ValueError, match=r"c\.yaml: unknown key TRAIN\.BASE_LRS; did you mean TRAIN\.BASE_LR\?"):
        make_config(tmp_path / "c.yaml")


def test_none_and_empty_values_mean_what_they_did_officially(tmp_path):
    (tmp_path / "c.yaml").write_text("DATA:\nTRAIN: {CLIP_GRAD: null}\nMODEL: {PRETRAINED: ~}\nTAG: mine")
    config = make_config(tmp_path / "c.yaml", tag="", optim="", resume="")
    assert config.TRAIN.CLIP_GRAD is None and config.MODEL.PRETRAINED == "" and config.TAG == "mine"
    assert config.TRAIN.OPTIMIZER.NAME == "adamw"
    with pytest.raises(FileNotFoundError, match=r"BASE of .*d\.yaml: .*nowhere\.yaml: no such file"):
        (tmp_path / "d.yaml").write_text("BASE: nowhere.yaml")
        make_config(tmp_path / "d.yaml")


def test_values_take_the_type_of_the_default():
    config = make_config(None, "TRAIN.CLIP_GRAD", 5, "TRAIN.BASE_LR", "5e-4", "MODEL.SWIN.DEPTHS", "[1,1]", "TAG", "7")
    assert (config.TRAIN.CLIP_GRAD, config.TRAIN.BASE_LR) == (5.0, 5e-4)
    assert (config.MODEL.SWIN.DEPTHS, config.TAG) == ([1, 1], "7")


@pytest.mark.parametrize("flag, nearest", [("--batchsize=4", "--batch-size"), ("--resme", "--resume")])
def test_mistyped_flag_names_the_nearest(flag, nearest, capsys):
    with pytest.raises(SystemExit) as stop:
        launch.build_parser("").parse_args(["--cfg", "x", flag])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and f"did you mean {nearest}?" in error and error.count("\n") == 1


def test_learning_rates_scale_with_the_images_per_update():
    config = make_config(None, "DATA.BATCH_SIZE", 64, "TRAIN.ACCUMULATION_STEPS", 2)
    settled = launch.settle(config)
    assert pytest.approx(config.TRAIN.BASE_LR * 128 / 512) == settled.TRAIN.BASE_LR
    assert pytest.approx(config.TRAIN.MIN_LR * 128 / 512) == settled.TRAIN.MIN_LR
    assert config.TRAIN.BASE_LR == 5e-4  # the given configuration stays as it is
