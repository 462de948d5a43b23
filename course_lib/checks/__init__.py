"""What ``check("02.1", answer)`` tests: a module a chapter (``chapter_02.py``), a function an exercise in it."""
