"""The oci engine: a plan's image out of the wheels' own bytes, without a daemon, without root, without installing."""

from __future__ import annotations

import os
from collections.abc import Iterable

from builder.base import BaseImage
from builder.engines import Arrivals, BuiltImage, Steps
from builder.render import Plan
from builder.store import Store


class OciEngine:
    """Makes images in the store; layers of wheels are recipes there, computed once for all cells."""

    name = "oci"
    recipe = "1.1.1"
    """Changes with what is made of the same plan: the recipes of bases, of wheels and of bytecode, without importing
    what makes them."""

    def __init__(self, *, workers: int | None = None) -> None:
        self._workers = workers or os.cpu_count() or 1

    def build(self, plan: Plan, base: BaseImage | None, *, store: Store, steps: Steps) -> BuiltImage:
        """Make the image in the store, and read out of its bytes what they say of it.

        Raises WheelError for a wheel that is none, HashMismatchError for one that was damaged in the store, which is
        then no longer there.
        """
        # Imported here: a build that finds its image complete needs nothing of what makes one.
        from builder.engines.oci import image  # noqa: PLC0415

        return image.build(plan, base, store=store, steps=steps, workers=self._workers)

    def arrivals(self, plans: Iterable[tuple[Plan, BaseImage | None]], *, store: Store, steps: Steps) -> Arrivals:
        """Begin to make the layers of all the images, each as soon as its wheels are in the store."""
        from builder.engines.oci import arrivals  # noqa: PLC0415 (as above)

        return arrivals.Arrivals(plans, store=store, steps=steps, workers=self._workers)
