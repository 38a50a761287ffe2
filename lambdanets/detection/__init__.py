"""A wing: boxes, classes and masks of the objects in a picture are learnt from COCO files."""
