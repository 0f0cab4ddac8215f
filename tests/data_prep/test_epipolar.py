import numpy as np

from data_prep.epipolar import fit_fundamental, fit_homography, homography_error, sampson_error


def test_sampson_error_is_in_pixels():
    # a camera that slides sideways: epipolar lines are rows, so F = [t]ₓ with t = x
    f = np.array([[0.0, 0, 0], [0, 0, -1], [0, 1, 0]])
    a = np.array([[10.0, 20], [300, 50]])
    for d in (0.5, 3.0):
        error = sampson_error(f, a, a + [40, d])
        # the distance is shared between both images: d/√2
        np.testing.assert_allclose(error, d / np.sqrt(2), rtol=1e-6)
        np.testing.assert_allclose(sampson_error(1e3 * f, a, a + [40, d]), error, rtol=1e-6)


def test_missing_matrices_explain_nothing():
    a = np.zeros((3, 2), np.float32)
    assert fit_homography(a, a, 1.0, 0)[0] is None
    assert fit_fundamental(a, a, 1.0, 0)[0] is None
    assert np.isinf(sampson_error(None, a, a)).all()
    assert np.isinf(homography_error(None, a, a)).all()


def test_fits_are_repeatable():
    g = np.random.default_rng(0)
    points = g.uniform([-2, -1.5, 3], [2, 1.5, 9], (200, 3))
    a = (500 * points[:, :2] / points[:, 2:]).astype(np.float32)
    moved = points + [0.6, 0.1, 0.2]
    b = (500 * moved[:, :2] / moved[:, 2:]).astype(np.float32)
    b[::7] += 25.0
    first, second = (fit_fundamental(a, b, 1.0, seed=3)[0] for _ in range(2))
    np.testing.assert_array_equal(first, second)
