"""The laboratory: what every chapter of the course uses, and no technique.

``load`` and ``batches`` (data), ``mlp``, ``convnet``, ``resnet``, ``vit`` (models), ``Recipe``, ``fit``, ``evaluate``
(training), ``compare`` (arms over seeds), ``Claims`` (tested claims), ``measure``, ``compare_speed``, ``peak_memory``
(cost), ``explorer`` (widgets), ``check`` and ``progress`` (exercises), ``predict`` and ``answered`` (guesses before
results), ``plotting`` (figures), ``surfaces`` (losses of two weights).

Imported in a notebook, it sets the look of all figures and makes each of them carry its data beside its picture.
"""

try:
    from course_lib.lab import plotting, surfaces
    from course_lib.lab.claims import Claims
    from course_lib.lab.costs import cost, file_bytes, flops, savings
    from course_lib.lab.data import batches, load, normalise, random_shift
    from course_lib.lab.exercises import check, progress
    from course_lib.lab.experiments import Comparison, Interval, Reach, compare, mean_interval
    from course_lib.lab.models import convnet, freeze, mlp, resnet, thaw, vit
    from course_lib.lab.predictions import answered, predict
    from course_lib.lab.runtime import check_machine, describe_machine, device, profile, quick, seed_everything
    from course_lib.lab.stepping import after_each_step
    from course_lib.lab.timing import compare_speed, measure, peak_memory
    from course_lib.lab.training import Diverged, History, Recipe, cross_entropy, evaluate, fit, fresh, logits_of
    from course_lib.lab.widgets import choice, explorer, log_slider, slider
    from course_lib.proving import figures
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"{error.name} is not installed. Run 'pip install -r requirements.txt' in the folder of the course and the "
        "environment of this kernel, then restart the kernel",
        name=error.name,
    ) from error

__all__ = [
    "Claims",
    "Comparison",
    "Diverged",
    "History",
    "Interval",
    "Reach",
    "Recipe",
    "after_each_step",
    "answered",
    "batches",
    "check",
    "check_machine",
    "choice",
    "compare",
    "compare_speed",
    "convnet",
    "cost",
    "cross_entropy",
    "describe_machine",
    "device",
    "evaluate",
    "explorer",
    "file_bytes",
    "fit",
    "flops",
    "freeze",
    "fresh",
    "load",
    "log_slider",
    "logits_of",
    "mean_interval",
    "measure",
    "mlp",
    "normalise",
    "peak_memory",
    "plotting",
    "predict",
    "profile",
    "progress",
    "quick",
    "random_shift",
    "resnet",
    "savings",
    "seed_everything",
    "slider",
    "surfaces",
    "thaw",
    "vit",
]

plotting.style()

figures.register()
