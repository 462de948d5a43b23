"""The Craft of Training: every technique of the course, implemented for real.

``course_lib.lab`` is the laboratory that all chapters share (data, models, the training loop, comparisons, figures);
each module beside it is one chapter's technique and is named after it.
"""

from course_lib import _torchvision_mend

__version__ = "0.1.0"

_torchvision_mend.apply_if_needed()
