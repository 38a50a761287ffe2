"""Pictures: from a file, a folder or shards to the batches of an epoch.

`folder`, `val_or_all` and `digits` list labelled pictures; they are imported when they are first used, since others
here (`order`) need no picture.
"""

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {
    "BadData": "errors",
    "BadImage": "errors",
    "DiskFault": "errors",
    "FolderData": "data.images",
    "Ignored": "data.images",
    "Images": "data.images",
    "absolute": "data.source",
    "check_labels": "data.images",
    "digits": "data.sklearn_digits",
    "folder": "data.folders",
    "open_image": "data.decode",
    "val_or_all": "data.folders",
}

__all__ = [
    "BadData",
    "BadImage",
    "DiskFault",
    "FolderData",
    "Ignored",
    "Images",
    "absolute",
    "check_labels",
    "digits",
    "folder",
    "open_image",
    "val_or_all",
]

if TYPE_CHECKING:
    from lambdanets.data.decode import open_image
    from lambdanets.data.folders import folder, val_or_all
    from lambdanets.data.images import FolderData, Ignored, Images, check_labels
    from lambdanets.data.sklearn_digits import digits
    from lambdanets.data.source import absolute
    from lambdanets.errors import BadData, BadImage, DiskFault


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"lambdanets.data has no {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"lambdanets.{_HOME[name]}"), name)
