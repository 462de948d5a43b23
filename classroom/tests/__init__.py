"""Tests of the classroom kit: ``make class-test``."""
