"""Which epoch is the best one, by --select, and when to look for no better one, by --patience."""

from utils.settings import Recipe

# A value of an epoch's record, and 1 where more is better.
SELECTIONS = {"top1": ("val_top1", 1), "nll": ("val_nll", -1), "refinement": ("val_refinement", -1)}


def is_better(record: dict, best: dict, select: str) -> bool:
    name, sign = SELECTIONS[select]
    return sign * record[name] > sign * best[name]


def is_stalled(history: list[dict], best: dict | None, recipe: Recipe) -> bool:
    """Whether the last --patience epochs brought no better one. The recipe has a patience."""
    if best is None:  # before the first epoch
        return False
    return len(history) - best["epoch"] >= recipe.patience


def stall_line(history: list[dict], best: dict, recipe: Recipe) -> str:
    return (
        f"--patience {recipe.patience}: stopped after epoch {len(history)} of {recipe.epochs}; "
        f"since epoch {best['epoch']} none was better by validation {recipe.select}"
    )
