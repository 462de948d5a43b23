"""The instructor's kit: hand out, mark, show, and one server for the room (see ``README.md``).

| module | what it does |
| --- | --- |
| `student_copy` | a chapter -> the notebook that is handed out |
| `judge` | marks what was handed in; nothing of it runs outside a sandbox |
| `course` | release, collect, mark, give back: the commands, on a folder that ``nbgrader`` understands |
| `slides` | a chapter -> one file of slides |
| `hub` | one server for the room, and its load test |
| `progress` | a page that shows how far a class has come |
| `timings` | how long each section of a chapter takes, for the guide |
| `bundle`, `stick` | the course, its packages and data on a stick; what installs them there |
"""
