"""Networks, under the name that scripts outside of this repository import them by."""

from wide.models.networks import *  # noqa: F403
