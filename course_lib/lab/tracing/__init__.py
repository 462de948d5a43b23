"""Which numbers of a network belong together: its channels, followed through everything that it does with them.

====================  ===============================================================================================
``channel_groups``    the groups of channels of a network, and the layers in which each unit of them lies
``open_attention``    attention whose heads can be followed, in place of torch's
``CannotShrink``      why not, and where
====================  ===============================================================================================

``operations`` traces a network (``torch.fx``), ``labels`` sends labels through it instead of numbers, ``channels``
makes units and groups of what is tied. Whoever cuts units out, or lets them change places, needs their members.
"""

from course_lib.lab.tracing.attention import Attention, open_attention
from course_lib.lab.tracing.channels import ChannelGroup, Channels, Member, channel_groups, follow, groups_of
from course_lib.lab.tracing.labels import IS_OUTPUT, Labelling, compact
from course_lib.lab.tracing.operations import (
    BATCH_NORMS,
    CONVOLUTIONS,
    ELEMENTWISE,
    INSTANCE_NORMS,
    TRANSPOSED,
    CannotShrink,
    Inputs,
    Results,
    operation,
    owner,
    place,
    tensors_in,
    trace,
)

__all__ = [
    "BATCH_NORMS",
    "CONVOLUTIONS",
    "ELEMENTWISE",
    "INSTANCE_NORMS",
    "IS_OUTPUT",
    "TRANSPOSED",
    "Attention",
    "CannotShrink",
    "ChannelGroup",
    "Channels",
    "Inputs",
    "Labelling",
    "Member",
    "Results",
    "channel_groups",
    "compact",
    "follow",
    "groups_of",
    "open_attention",
    "operation",
    "owner",
    "place",
    "tensors_in",
    "trace",
]
