import io
import tarfile

import numpy as np
import pytest
import skimage.data

from data_prep.detectors import decode_ssd, objectron, ssd_anchors
from data_prep.install_detector import COMMAND, package_path
from see3d_jax.errors import InputError


def test_ssd_boxes_decode_to_their_anchors():
    anchors = ssd_anchors(300)
    assert len(anchors) == 1917 and anchors.min() > 0
    found = decode_ssd(np.zeros((1917, 4), np.float32), anchors)
    np.testing.assert_allclose(found[:, :2] + found[:, 2:] / 2, anchors[:, :2], atol=1e-6)
    np.testing.assert_allclose(found[:, 2:], anchors[:, 2:], atol=1e-6)


def test_a_damaged_package_is_refused_in_one_line(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        objectron(str(tmp_path / "none.tgz"))
    with tarfile.open(tmp_path / "other.tgz", "w:gz") as package:
        package.addfile(tarfile.TarInfo("package/readme"), io.BytesIO(b""))
    with pytest.raises(InputError, match="is damaged"):
        objectron(str(tmp_path / "other.tgz"))


def test_the_installed_network_knows_people_and_cats_from_things():
    if not package_path().is_file():
        pytest.skip(f"not installed: {COMMAND}")
    detect = objectron(str(package_path()))
    found = {
        name: {d.label for d in detect(getattr(skimage.data, name)())}
        for name in ("astronaut", "chelsea", "coffee", "rocket")
    }
    assert found == {
        "astronaut": {"face", "person"}, "chelsea": {"cat"}, "coffee": set(), "rocket": set()
    }  # fmt: skip
