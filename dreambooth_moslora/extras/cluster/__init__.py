"""Many trainings on many machines, by Ray: a subject is a task, and so is a cell of a study."""
