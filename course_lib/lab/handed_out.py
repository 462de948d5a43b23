"""Of each function in which a bug is to be found: the digest of its source as the chapter hands it out.

Who runs the cell unchanged is told so, and not what the bug is (``lab.exercises.digest``). The chapters are compared
with these by ``tests/lab/test_handed_out.py``.
"""

HANDED_OUT = {
    "00.5": "7a0082f3c1002b35",
    "01.6": "ac7a96cae832b6e8",
    "02.6": "035e451b1a65e8ac",
    "03.5": "7e596256dae2b4db",
    "04.5": "92c99468d3fc219c",
    "05.5": "c01cb3b0b1c6afa5",
    "06.5": "58d0c77f6f917cc4",
    "07.6": "0405e57dc0cd8935",
    "08.6": "349440c53e89d926",
    "09.5": "cf127cb99848efe9",
    "10.3": "cb897bea2995babf",
    "11.3": "56b587cda1cd6a80",
    "12.5": "616ef2c57fd02c41",
    "13.5": "36f1c304c2a94628",
    "14.5": "95153c9352251280",
    "15.3": "c9874cc1d46b932c",
    "16.3": "3aadaa388f9c8dac",
    "17.2": "9425c005278c8aa3",
}
