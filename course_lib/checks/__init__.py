"""What ``check("02.1", answer)`` tests: one module a chapter, ``chapter_02.py``, one function an exercise, ``exercise_1``."""
