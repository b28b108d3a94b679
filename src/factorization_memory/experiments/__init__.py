"""Trainings side by side: contenders of equal size, processes, the record of a comparison."""
