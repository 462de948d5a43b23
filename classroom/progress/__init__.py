"""A page for the instructor: who has passed what, where people are held up, and what they guessed.

    python -m classroom.progress FOLDER [--chapter 02] [--pseudonyms] [--port 8765]

| file | what is in it |
| --- | --- |
| ``lesson`` | what a chapter asks: its exercises and its predictions |
| ``files`` | the learners' progress files, read as what they are: files that somebody else wrote |
| ``board`` | the page as data: counted, in order, without any answer |
| ``pseudonyms`` | invented names, kept on this machine |
| ``server`` | the page, on localhost, behind a token |
"""
