"""Pictures of figures of any size."""

import struct

import pytest
from matplotlib.figure import Figure

from adamerge_jax.report.pictures import write_png


@pytest.mark.parametrize(("size", "expected"), [((4, 3), (600, 450)), ((60, 15), (4899, 1225))])
def test_a_large_figure_has_fewer_pixels_per_inch(size, expected, tmp_path, drawn_figures):
    file = tmp_path / "figure.png"
    with drawn_figures():
        write_png(Figure(figsize=size), file)
    pixels = struct.unpack(">II", file.read_bytes()[16:24])
    assert pixels == pytest.approx(expected, abs=1)
