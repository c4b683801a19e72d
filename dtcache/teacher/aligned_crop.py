"""The crop of a view at which a teacher can be asked whether it follows: aligned, and of a size
that it takes.
"""

from dtcache.errors import ConfigError, TeacherError
from dtcache.recipe import Box, TapSpec, ViewSpec
from dtcache.teacher.denoiser import Denoiser


def find_crop(
    denoiser: Denoiser, taps: tuple[TapSpec, ...], view: ViewSpec, latent_stride: int
) -> Box | None:
    """Return a central box of about half the view's sides, on the grid of the coarsest of all
    `taps`.

    Aligned so, every map of the crop has a place in the whole view's map; off the grid the two
    would be sampled at other positions. None where the view is too small or the teacher does not
    take the crop's size.
    """
    grid = max(tap.stride for tap in taps)

    def centred(side: int) -> tuple[int, int]:
        size = side // 2 // grid * grid
        return (side - size) // 2 // grid * grid, size

    (top, height), (left, width) = centred(view.height), centred(view.width)
    if not (height and width):
        return None
    try:
        found = denoiser.find_taps(height, width, latent_stride)
    except (ConfigError, TeacherError):
        return None
    if {tap.stride for tap in found} != {tap.stride for tap in taps}:
        return None
    return Box(top=top, left=left, height=height, width=width)
