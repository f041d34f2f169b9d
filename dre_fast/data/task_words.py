"""Tasks as words of a command line: a label column, ``NAME=COLUMN,COLUMN``, or YAML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from dre_fast.data.cohort import Cohort, CohortError
from dre_fast.data.tasks import Task, truth_value


def column_task(name: str, cohort: Cohort) -> Task:
    """The task of one label column: binary when all its values mean yes or no, else multiclass."""
    plain = all(truth_value(value) is not None for value in cohort.label_values(name))
    return Task(name, "binary" if plain else "multiclass")


def panel_task(word: str) -> Task:
    """``NAME=COLUMN,COLUMN`` as a multilabel task of these columns."""
    name, _, columns = word.partition("=")
    return Task(name, "multilabel", columns=tuple(columns.split(",")))


def parse_tasks(words: Sequence[str] | None, cohort: Cohort, survival: Sequence[str] = ()) -> list[Task]:
    """Tasks that words mean, with their classes.

    Args:
        words: each a label column; ``NAME=COLUMN,COLUMN``, several columns of yes or no; or YAML as in ``loss.tasks`` of
            a run, ``{name: os, kind: survival, columns: [MONTHS, STATUS], method: hazard}``. None: the only label column
            that has at least two values.
        survival: each ``NAME=TIME,EVENT``, with Cox's loss.

    Raises:
        CohortError: no such column, or a yes-or-no column that says only one of them.
        ValueError: a word that is no task, or two tasks of one name.
    """
    if words is None and not survival:
        usable = [name for name in cohort.label_names if len(cohort.label_values(name)) > 1]
        if len(usable) != 1:
            raise CohortError(
                f"{cohort.source}: name what to learn with --tasks; label columns with two values or more: "
                f"{', '.join(usable) or 'none'}"
            )
        words = usable
    tasks = [_task(word, cohort) for word in words or ()]
    for word in survival:
        name, _, columns = word.partition("=")
        if columns.count(",") != 1:
            raise ValueError(f"{word!r}: a survival task is NAME=TIME,EVENT, two label columns")
        tasks.append(Task(name, "survival", columns=tuple(columns.split(","))))
    names = [task.name for task in tasks]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"two tasks are called {twice!r}")
    found = [cohort.resolve(task) for task in tasks]
    for task in found:
        target = cohort.encode(task)  # labels that cannot be read are named now
        if task.kind == "binary" and len(target[~target.isnan()].unique()) < 2:
            values = ", ".join(map(repr, cohort.label_values(task.columns[0]))) or "no label"
            raise CohortError(
                f"{cohort.source}, column {task.columns[0]!r}: task {task.name!r} needs slides of both kinds, and all "
                f"say {values}; add slides of the other kind, or name another column"
            )
    return found


def _task(word: str, cohort: Cohort) -> Task:
    if word.lstrip().startswith("{"):
        return _of_yaml(word)
    if "=" in word:
        return panel_task(word)
    if word not in cohort.label_names:
        raise CohortError(
            f"{cohort.source}: no label column {word!r}; label columns: {', '.join(cohort.label_names) or 'none'}"
        )
    return column_task(word, cohort)


def _of_yaml(word: str) -> Task:
    import yaml

    try:
        said: Any = yaml.safe_load(word)
    except yaml.YAMLError as error:
        raise ValueError(f"task {word!r}: not YAML ({error})") from None
    known = [field.name for field in fields(Task)]
    unknown = [key for key in said if key not in known]
    if unknown or "name" not in said:
        raise ValueError(f"task {word!r}: a task has {', '.join(known)}; got {', '.join(map(str, said))}")
    return Task(**said)
