"""A model's repeated blocks, and running them one by one on the inputs that they had.

To calibrate a block, the model would have to run from its start each time. Where blocks only hand
their output on to the next one, as a transformer's layers do, that can be spared: the inputs of one
block are kept, and become those of the next by running the block once. Whether a model is so is
looked up in a run of it (:class:`Chain`), never assumed.
"""

from .chain import Chain
from .inputs import BlockInputs
from .stages import stages

__all__ = ["BlockInputs", "Chain", "stages"]
