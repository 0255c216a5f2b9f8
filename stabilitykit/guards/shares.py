"""How much of its value a setting has in a task; each takes the task, from 0, and the number of tasks."""

from __future__ import annotations

import math


def cosine_over_tasks(task: int, num_tasks: int, floor: float = 0.1) -> float:
    """Of ten tasks 0 has 100 %, 2 90.5 %, 5 50 %, 9 the floor of 10 %; the stability guide's learning rate."""
    return max(floor, 0.5 * (1 + math.cos(math.pi * task / num_tasks)))


def linear_to_half(task: int, num_tasks: int) -> float:
    """100 % at the first task, 50 % at the last; the stability guide's replay weights."""
    return 1 - 0.5 * task / max(1, num_tasks - 1)


def unchanged(_task: int, _num_tasks: int) -> float:
    """100 %, always: the setting is held, and not moved."""
    return 1.0
