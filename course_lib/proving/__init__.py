"""What proves that the notebooks are true: their figures carry their data, and a rerun is compared with what is stored.

======================  =============================================================================================
``figures``             each matplotlib figure that a notebook shows carries its content as data beside its picture
``agreement``           whether texts and numbers of two runs agree, and in words where they do not
``figure_comparison``   the same for the contents of two figures
``nbval_plugin``        makes ``nbval`` use both
``leftovers``           what a notebook's kernel left behind: processes, ports, temporary files
``run_notebook``        ``make run``: executes a chapter in place
``readme``              the README's table of chapters
======================  =============================================================================================

A learner needs none of it: the laboratory registers ``figures``; the rest is for ``make test`` and ``make run``.
"""

import tempfile
from pathlib import Path

WITHOUT_WEIGHTS = {"TORCH_HOME": str(Path(tempfile.gettempdir()) / "no-pretrained-weights-here")}
"""For kernels: a cache of torch.hub that is not there. Who has pretrained weights is shown what all others are."""
