"""Segmenting many pictures: what is refused as a whole, and what is left out while the others go on."""

import pytest
from test_predict import segmenter

from denseclip_hf.prediction import predict_sources


@pytest.mark.parametrize("opacity", [3, -0.1, float("nan")])
def test_an_opacity_is_a_share(tmp_path, opacity):
    with pytest.raises(ValueError, match="`opacity` must be from 0 to 1, got"):
        predict_sources(segmenter(), [], tmp_path / "out", opacity=opacity, progress=False)
    assert not (tmp_path / "out").exists()
