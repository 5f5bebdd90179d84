"""The digits: all of them, as scikit-learn has them, and nothing overwritten."""

import cv2
import numpy as np
import pytest
from sklearn.datasets import load_digits

from tools import make_digits


def test_digits_are_written_whole_and_can_be_read_back(tmp_path):
    folder = tmp_path / "digits"
    assert not make_digits.is_complete(folder)
    counts = make_digits.write_digits(folder)
    assert counts == {"train": 1437, "val": 360} and make_digits.is_complete(folder)
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


def test_digits_overwrite_nothing(tmp_path, monkeypatch):
    (tmp_path / "mine.txt").write_text("precious")
    monkeypatch.setattr("sys.argv", ["make_digits.py", str(tmp_path)])
    with pytest.raises(SystemExit, match="move it away"):
        make_digits.main()
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
