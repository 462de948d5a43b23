"""One server for the room: JupyterHub on one machine, each learner in namespaces of their own (see ``README.md``).

    python -m classroom.hub --folder class --names names.txt        starts it
    python -m classroom.hub.roster --folder class add ada bob       passwords for more; also: reset, remove, list
    python -m classroom.hub.publish --folder class                  hands out what has been released since
    python -m classroom.hub.load --learners 30 --chapter 08         what does a room need?

| module | what it does |
| --- | --- |
| `room` | the folder of a class, and what the hub is told about it |
| `roster` | names and passwords; slows down guessing |
| `spawner` | starts a learner's server where it sees the course and its own folder, and no more |
| `proxy` | in front of hub and servers |
| `publish` | the released student copies as a git repository, from which each learner's folder is updated |
| `inside/` | what runs beside the learner: the update before the server starts, the merge of an edited notebook |
| `groups` | memory of a learner as a sum, where a cgroup can be written |
| `client` | a learner as a program, for tests and for `load` |
| `load` | the load test |
"""
