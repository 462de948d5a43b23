"""Marking: the learner's code runs in a sandbox and only answers; whether an answer is right is decided outside.

| module | where it runs | what it does |
| --- | --- | --- |
| `judge` | outside | one submission -> a verdict on each exercise, by the course's own `check` |
| `slices` | outside | what a learner's cells need of the chapter: imports, recipes, short functions |
| `process` | outside | the other end of the pipe: a process in the sandbox, with a deadline |
| `sandbox` | outside | starts that process with no more than it needs |
| `wire` | both | plain data over the pipe, never pickle |
| `worker` | inside | runs the learner's cells, calls the learner's function |
| `trial` | inside, another one | judges a design that has to be trained; no code of a learner is in there |
| `nbgrader_judge` | outside | all this in place of nbgrader's own execution of a submission |
"""
