"""The instructor's kit: student copies of the chapters, and their marking with ``nbgrader`` (see ``README.md``).

| module | what it does |
| --- | --- |
| `student_copy` | a chapter -> the notebook that is handed out |
| `judge` | marks what was handed in; nothing of it runs outside a sandbox |
| `course` | release, collect, mark, give back: the commands, on a folder that ``nbgrader`` understands |
"""
