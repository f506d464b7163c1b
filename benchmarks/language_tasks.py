"""The language of `benchmarks.language`: six digits in, known symbols out; a task says which.

    [task] x1 x2 x3 x4 x5 x6 = y1 … yk          e.g.  [sort] 4 1 7 1 0 9 = 0 1 1 4 7 9

`KNOWN` are the tasks that the base model learns. `SHIFTED` are the eight that it is adapted to, and `TUNING` the two
that choose learning rates. A shifted task has the token of a known one, so the base answers it, wrongly.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["KNOWN", "NO_LABEL", "SHIFTED", "TUNING", "VOCABULARY", "Task", "draw", "mixture"]

DIGITS, LETTERS, LENGTH = 10, 10, 6
NO_LABEL = -100  # transformers' mark for positions without a loss
PERMUTED = torch.tensor([3, 7, 0, 9, 5, 1, 8, 2, 6, 4])


@dataclass(frozen=True)
class Task:
    """`answer`: digits (n, 6) -> symbols (n, k), k ≤ 6. `token` names the known task whose token it has.

    `steps` is the length of an adaptation, chosen by trial on another seed so that LoRA ends below 100 %.
    """

    token: str
    answer: Callable[[Tensor], Tensor]
    steps: int = 0


KNOWN: dict[str, Task] = {
    name: Task(name, answer)
    for name, answer in {
        "copy": lambda x: x,
        "reverse": lambda x: x.flip(1),
        "rotate": lambda x: x.roll(-1, dims=1),
        "swap": lambda x: x.view(-1, 3, 2).flip(2).flatten(1),
        "sort": lambda x: x.sort(dim=1).values,
        "next": lambda x: (x + 1) % DIGITS,
        "complement": lambda x: DIGITS - 1 - x,
        "letters": lambda x: DIGITS + x,
        "add": lambda x: (x[:, :3] + x[:, 3:]) % DIGITS,
        "subtract": lambda x: (x[:, :3] - x[:, 3:]) % DIGITS,
        "total": lambda x: x.cumsum(dim=1) % DIGITS,
        "highest": lambda x: x.cummax(dim=1).values,
        "lookup": lambda x: x.gather(1, x % LENGTH),
    }.items()
}

SHIFTED: dict[str, Task] = {
    "reverse, then next": Task("reverse", lambda x: (x.flip(1) + 1) % DIGITS, 32),
    "permuted letters": Task("letters", lambda x: DIGITS + PERMUTED[x], 14),
    "lowest so far": Task("highest", lambda x: x.cummin(dim=1).values, 14),
    "next but one": Task("next", lambda x: (x + 2) % DIGITS, 30),
    "rotate, permuted letters": Task("rotate", lambda x: DIGITS + PERMUTED[x.roll(-1, dims=1)], 15),
    "lookup into letters": Task("lookup", lambda x: DIGITS + x.gather(1, x % LENGTH), 27),
    "sort into letters": Task("sort", lambda x: DIGITS + x.sort(dim=1).values, 36),
    "sort downward": Task("sort", lambda x: x.sort(dim=1, descending=True).values, 110),
}

TUNING: dict[str, Task] = {
    "reverse, permuted": Task("reverse", lambda x: PERMUTED[x.flip(1)], 56),
    "highest, then next": Task("highest", lambda x: (x.cummax(dim=1).values + 1) % DIGITS, 22),
}

EQUALS = DIGITS + LETTERS
TOKENS = {name: EQUALS + 1 + number for number, name in enumerate(KNOWN)}
VOCABULARY = EQUALS + 1 + len(KNOWN)


def draw(task: Task, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`count` random examples: inputs (n, 13) with the answer but for its end, labels (n, 6) of positions 8 to 13."""
    x = torch.randint(DIGITS, (count, LENGTH), generator=generator)
    labels = torch.full((count, LENGTH), NO_LABEL)
    answer = task.answer(x)
    labels[:, : answer.shape[1]] = answer
    shown = labels[:, :-1].masked_fill(labels[:, :-1] == NO_LABEL, EQUALS)
    ends = torch.tensor([TOKENS[task.token], EQUALS]).expand(count, 2)
    return torch.cat([ends[:, :1], x, ends[:, 1:], shown], dim=1), labels


def mixture(tasks: dict[str, Task], each: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`each` examples of every task, as one batch."""
    inputs, labels = zip(*(draw(task, each, generator) for task in tasks.values()))
    return torch.cat(inputs), torch.cat(labels)
