"""Images in folders, under the name that scripts outside of this repository import them by."""

from wide.data.image_folders import UNREADABLE, read_image  # noqa: F401
