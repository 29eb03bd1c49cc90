"""Given alignments: the 10x matrix and the keypoints, and files that are neither."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pairing.geometry import Affine
from pairing.registration.given import read_alignment
from shards.errors import BadInput

PIXEL_SIZE_UM = 0.2125
POINTS_UM = np.array([[0.0, 0.0], [1000.0, 10.0], [300.0, 800.0], [40.0, 999.0], [600.0, 500.0]])

similarities = st.builds(
    lambda scale, angle, x, y, mirror: Affine.similarity(scale, angle, (x, y), mirror=mirror),
    st.floats(0.3, 3),
    st.floats(-4, 4),
    st.floats(-5000, 5000),
    st.floats(-5000, 5000),
    st.booleans(),
)


def write_matrix(path: Path, morphology_px_from_he_px: Affine) -> Path:
    rows = [",".join(repr(v) for v in row) for row in morphology_px_from_he_px.matrix]
    path.write_text("\n".join(rows) + "\n")
    return path


def write_keypoints(path: Path, fixed: np.ndarray, moved: np.ndarray) -> Path:
    lines = ["fixedX,fixedY,alignmentX,alignmentY"]
    lines += [f"{a!r},{b!r},{c!r},{d!r}" for (a, b), (c, d) in zip(fixed, moved, strict=True)]
    path.write_text("\n".join(lines).replace("np.float64(", "").replace(")", "") + "\n")
    return path


@given(similarities)
def test_the_matrix_maps_slide_to_morphology_so_it_is_inverted(
    tmp_path_factory: pytest.TempPathFactory, he_px_from_morphology_px: Affine
) -> None:
    path = tmp_path_factory.mktemp("m") / "he_imagealignment.csv"
    write_matrix(path, he_px_from_morphology_px.inverse)
    method, he_px_from_xenium_um, fit = read_alignment(path, PIXEL_SIZE_UM)
    assert (method, fit) == ("matrix", None)
    np.testing.assert_allclose(
        he_px_from_xenium_um(POINTS_UM),
        he_px_from_morphology_px(POINTS_UM / PIXEL_SIZE_UM),
        atol=1e-5,
    )


@given(similarities)
def test_exact_keypoints_give_the_transform_back(
    tmp_path_factory: pytest.TempPathFactory, he_px_from_morphology_px: Affine
) -> None:
    fixed = POINTS_UM / PIXEL_SIZE_UM
    path = tmp_path_factory.mktemp("k") / "keypoints.csv"
    write_keypoints(path, fixed, he_px_from_morphology_px(fixed))
    method, he_px_from_xenium_um, fit = read_alignment(path, PIXEL_SIZE_UM)
    assert method == "keypoints"
    assert fit is not None
    assert fit.n_points == len(fixed)
    assert fit.max_um < 1e-6
    np.testing.assert_allclose(
        he_px_from_xenium_um(POINTS_UM), he_px_from_morphology_px(fixed), atol=1e-5
    )


def test_all_keypoints_count_and_residuals_are_in_um_of_the_slide(tmp_path: Path) -> None:
    fixed = np.array([[0.0, 0.0], [4000.0, 0.0], [4000.0, 4000.0], [0.0, 4000.0]])
    he_px_from_morphology_px = Affine.scale(0.5)  # so the slide has 0.425 µm per pixel
    moved = he_px_from_morphology_px(fixed)
    moved[0] += (8.0, 0.0)
    _, _, fit = read_alignment(write_keypoints(tmp_path / "k.csv", fixed, moved), PIXEL_SIZE_UM)
    assert fit is not None
    # One corner of a square moved by d: an affine takes up 3/4 of it, d/4 is left at each corner,
    # and the stretched x axis changes the implied pixel size by less than 1 %.
    np.testing.assert_allclose(fit.residuals_um, np.full(4, 2.0 * 0.425), rtol=0.01)
    assert fit.rms_um == pytest.approx(fit.max_um)


KEYPOINTS = "fixedX,fixedY,alignmentX,alignmentY\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "an empty file"),
        ("1,0,0\n0,1,0\n", r"an affine is 3 x 3 finite numbers, not \(2, 3\)"),
        ("1,0,0\n0,1,0\n0,0,1\n0,0,1\n", r"an affine is 3 x 3 finite numbers, not \(4, 3\)"),
        ("1,0\n0,1\n", "(?s)row 1.*3 finite numbers.*2 values"),
        ("1,0,0\n0,1,0,7\n0,0,1\n", "(?s)row 2.*3 finite numbers.*4 values"),
        ("1,0,0\n0,1,zero\n0,0,1\n", "(?s)row 2.*3 finite numbers.*could not convert.*'zero'"),
        ("a,b,c\n1,0,0\n0,1,0\n0,0,1\n", "(?s)row 1.*3 finite numbers.*could not convert.*'a'"),
        ("1;0;0\n0;1;0\n0;0;1\n", "(?s)values parted by commas.*semicolons"),
        ("0,97;0,1;12,5\n-0,1;0,97;3,0\n0;0;1\n", "(?s)values parted by commas.*semicolons"),
        ("1\t0\t0\n0\t1\t0\n0\t0\t1\n", "(?s)values parted by commas.*tabs"),
        ("1,0,0\n2,0,0\n0,0,1\n", "the affine is singular"),
        ("1,0,0\n0,1,0\n5,5,1\n", "last row of an affine is 0, 0, 1"),
        ("1,0,nan\n0,1,0\n0,0,1\n", "(?s)row 1.*3 finite numbers.*1, 0, nan"),
        (KEYPOINTS, "(?s)at least three keypoints.*0 keypoints"),
        (f"{KEYPOINTS}1,2,3,4\n5,6,7,8\n", "(?s)at least three keypoints.*2 keypoints"),
        (
            f"{KEYPOINTS}0,0,0,0\n1,1,1,1\n2,2,2,2\n5,5,5,5\n",
            "(?s)do not lie on one line.*4 keypoints, on one line of the morphology image",
        ),
        (f"{KEYPOINTS}0,0,0,0\n9,1,9,1\n2,x,2,2\n", "(?s)row 3.*4 finite numbers.*'x'"),
        (
            f"{KEYPOINTS}0,0,4,4\n900,1,4,4\n2,700,4,4\n50,60,4,4\n",
            "(?s)do not lie on one line.*4 keypoints, on one line of the slide",
        ),
        (KEYPOINTS.replace(",", ";"), "(?s)values parted by commas.*semicolons"),
    ],
)
def test_what_is_no_alignment_is_refused_with_words(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "alignment.csv"
    path.write_text(text)
    with pytest.raises(BadInput, match=words) as caught:
        read_alignment(path, PIXEL_SIZE_UM)
    assert "Xenium Explorer" in caught.value.remedy
    assert caught.value.where.startswith(str(path))


@pytest.mark.parametrize("lines", ["\n", "\r\n"])
@pytest.mark.parametrize("kind", ["matrix", "keypoints"])
def test_a_byte_order_mark_and_any_line_ends_are_read(
    tmp_path: Path, kind: str, lines: str
) -> None:
    he_px_from_morphology_px = Affine.similarity(0.8, 1.0, (300.0, 20.0))
    fixed = POINTS_UM / PIXEL_SIZE_UM
    path = tmp_path / "he_imagealignment.csv"
    if kind == "matrix":
        write_matrix(path, he_px_from_morphology_px.inverse)
    else:
        write_keypoints(path, fixed, he_px_from_morphology_px(fixed))
    text = path.read_text().replace("\n", lines) + lines
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    method, he_px_from_xenium_um, _ = read_alignment(path, PIXEL_SIZE_UM)
    assert method == kind
    np.testing.assert_allclose(
        he_px_from_xenium_um(POINTS_UM), he_px_from_morphology_px(fixed), atol=1e-6
    )


def test_text_of_another_encoding_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "alignment.csv"
    path.write_bytes("1,0,0\n0,1,0\n0,0,1\n".encode("utf-16"))
    with pytest.raises(BadInput, match=r"(?s)a csv file.*utf-8"):
        read_alignment(path, PIXEL_SIZE_UM)


def test_a_missing_alignment_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="No such file"):
        read_alignment(tmp_path / "none.csv", PIXEL_SIZE_UM)
