"""The record of a file's description, and values that several programs write in the same way."""

import pytest
from filling import refused

from models.checkpoints.description import Description, gelu_of, names_of, numbers_of, side_of, size_of


@pytest.mark.parametrize("size, patch, taken, notes", [
    (384, 14, 378, 1), ((384, 392), 14, (378, 392), 1), (224, 16, 224, 0), (8, 14, 8, 0), (384, None, 384, 0)])
def test_image_sizes_are_rounded_down_to_whole_patches(size, patch, taken, notes):
    """A convolution ignores the rest, as in SigLIP SO400M/14 at 384 px. A size below one patch stays, and is refused later."""
    found = Description()
    found.take_size(size, patch)
    assert found.row == {"img_size": taken} and len(found.notes) == notes
    assert not notes or ("in whole patches of 14: its program reads them at 384 x " in found.notes[0])


def test_values_are_converted_or_refused():
    assert (gelu_of("gelu_pytorch_tanh"), gelu_of("quick_gelu"), gelu_of("gelu")) == ("tanh", "quick", "erf")
    assert (numbers_of([1, 0.5, 2]), size_of(8), size_of([8, 4]), side_of([16, 16])) == ((1.0, 0.5, 2.0), 8, (8, 4), 16)
    assert names_of({"1": "b", "0": "a"}) == ["a", "b"] and names_of({"1": "b"}) is None
    refused("its patch size is .16, 8., but models here have square patches", side_of, [16, 8])
    refused("its activation is relu", gelu_of, "relu")
    for function, value in ((numbers_of, [1, 2]), (size_of, 0), (size_of, 1 << 20)):
        with pytest.raises(ValueError):
            function(value)
