"""Round-to-nearest: the baseline that learns nothing."""

from recon.engine.reconstruction import Reconstruction


class RoundToNearest(Reconstruction):
    """Each weight to the nearest point of its row's grid, absmax range; inputs per token.

    Every default of `Reconstruction` is this method.
    """
