"""The label table, and masks read from label maps."""

import numpy as np
import pytest

from daamlib import cityscapes


def test_masks_of_the_images_that_show_a_class():
    car = cityscapes.label_id("car")
    maps = np.zeros((3, 10, 10), np.uint8)
    maps[0, 0, 0] = car  # 1 %
    maps[2, :2] = car
    which, masks = cityscapes.class_masks(maps, "car")
    assert which == [2]
    assert np.array_equal(masks, (maps == car)[2:])
    which, _ = cityscapes.class_masks(list(maps), "car", min_area=0.01)
    assert which == [0, 2]


def test_a_class_that_no_image_shows_is_named():
    with pytest.raises(ValueError, match="none of 2 images shows a rider on 2% of its area"):
        cityscapes.class_masks(np.zeros((2, 4, 4), np.uint8), "rider")
