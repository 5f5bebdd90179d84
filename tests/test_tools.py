"""The digits: all of them or some of each, as scikit-learn has them, and nothing overwritten; steps of a demo."""

import cv2
import numpy as np
import pytest
from sklearn.datasets import load_digits

from tools import make_digits, steps


def names(folder, split):
    return sorted(path.relative_to(folder / split).as_posix() for path in (folder / split).glob("*/*.png"))


def test_digits_are_written_whole_and_can_be_read_back(tmp_path):
    folder, chosen = tmp_path / "digits", make_digits.choose()
    assert not make_digits.is_complete(folder, chosen)
    make_digits.write_digits(folder, chosen)
    assert make_digits.is_complete(folder, chosen)
    assert len(names(folder, "train")) == 1437 and len(names(folder, "val")) == 360
    digits = load_digits()
    seen = set()
    for path in folder.glob("*/*/*.png"):
        index = int(path.stem)
        seen.add(index)
        assert digits.target[index] == int(path.parent.name)
        image = cv2.imread(str(path))
        assert image.shape == (32, 32, 3)
        small = cv2.resize(image[:, :, 0].astype(float), (8, 8), interpolation=cv2.INTER_AREA)
        assert np.corrcoef(small.ravel(), digits.images[index].ravel())[0, 1] > 0.95
    assert len(seen) == 1797
    for split, least in (("train", 139), ("val", 34)):
        assert min(len(list(path.iterdir())) for path in (folder / split).iterdir()) >= least


def test_some_of_each_digit_are_always_the_same_training_images(tmp_path, monkeypatch, capsys):
    folder, every = tmp_path / "few", make_digits.choose()
    for said in ("30 training and 360 validation images", "holds these digits already"):
        monkeypatch.setattr("sys.argv", ["make_digits.py", str(folder), "--per-class", "3"])
        make_digits.main()
        assert said in capsys.readouterr().out
    assert names(folder, "val") == sorted(every["val"])
    few = names(folder, "train")
    assert set(few) < set(every["train"]) and not set(few) & set(every["val"])
    assert [name[0] for name in few] == [str(digit) for digit in range(10) for _ in range(3)]
    assert set(few) < set(make_digits.choose(4)["train"])


@pytest.mark.parametrize("per_class", [0, 140])
def test_digits_that_are_not_there_are_named(per_class):
    with pytest.raises(ValueError, match=f"--per-class {per_class}: there are 1 to 139 training images"):
        make_digits.choose(per_class)


@pytest.mark.parametrize("other", [[], ["--per-class", "2"]])
def test_digits_overwrite_nothing(tmp_path, monkeypatch, other):
    folder = tmp_path / "digits"
    make_digits.write_digits(folder, make_digits.choose(1))
    before = sorted(folder.rglob("*"))
    monkeypatch.setattr("sys.argv", ["make_digits.py", str(folder), *other])
    with pytest.raises(SystemExit, match="move it away"):
        make_digits.main()
    assert sorted(folder.rglob("*")) == before and [path.name for path in tmp_path.iterdir()] == ["digits"]


def test_steps_of_a_demo_run_side_by_side_and_end_it_where_one_fails(capsys):
    logs = steps.run_together({name: (f"say {name}", ["-c", f"print({name!r})"]) for name in ("one", "two")})
    assert logs == {"one": "one\n", "two": "two\n"}
    shown = capsys.readouterr().out
    assert "== say one\n$ python -c " in shown and "one | one\n" in shown and "two | two\n" in shown
    with pytest.raises(SystemExit, match="ended with 1, expected 0"):
        steps.run_together({"good": ("", ["-c", ""]), "bad": ("", ["-c", "raise SystemExit('too bad')"])})
    assert "bad | too bad\n" in capsys.readouterr().out
