"""The crop of a view at which a teacher's equivariance is measured."""

from dtcache.errors import ConfigError, TeacherError
from dtcache.recipe import Box, TapSpec, ViewSpec
from dtcache.teacher.denoiser import Denoiser


def find_crop(
    denoiser: Denoiser, taps: tuple[TapSpec, ...], view: ViewSpec, latent_stride: int
) -> Box | None:
    """Return a central box of about half the view's height and width, or None if there is none.

    The box lies on the grid of the coarsest of all `taps`. Then each position of a crop's map
    coincides with a position of the whole view's map; off the grid, the two would be sampled at
    different positions. There is no box if the view is too small, or if the teacher does not take
    images of the crop's size.
    """
    grid = max(tap.stride for tap in taps)

    def centred(side: int) -> tuple[int, int]:
        size = side // 2 // grid * grid
        return (side - size) // 2 // grid * grid, size

    (top, height), (left, width) = centred(view.height), centred(view.width)
    if not (height and width):
        return None
    try:
        offered = denoiser.find_taps(height, width, latent_stride)
    except (ConfigError, TeacherError):
        return None
    if {tap.stride for tap in offered} != {tap.stride for tap in taps}:
        return None
    return Box(top=top, left=left, height=height, width=width)
