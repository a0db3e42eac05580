"""Names of axes and the dictionaries that travel between the rooms.

Axes, in the words every docstring uses: `batch`, `frames`, `tokens`, `channels` (features of a
token), `heads`, `out` and `in_` (rows and columns of a weight), `groups` (of input channels that
share a scale).
"""

from torch import Tensor

Sample = dict[str, Tensor]
"""Arguments of one call of the network, batch axis included: for a video transformer
`hidden_states` [batch, frames, channels, height, width], `encoder_hidden_states` [batch, tokens,
channels], `timestep` [batch]."""

State = dict[str, Tensor]
"""What a block receives: the streamed tensors (changed by every block) and the conditioning
(the same for every block of the network)."""
