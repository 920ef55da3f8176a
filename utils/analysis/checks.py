"""What a table takes for granted of a run's files, checked where they are read.

A run that fails one is listed apart from the tables, with the words of the error.
"""


def check_identity(identity: dict) -> None:
    """Model, label and seed are what names and groups are made of. Raises KeyError, ValueError."""
    check_texts(identity, ("model", "label"))
    if not isinstance(identity["seed"], int | str | None):
        raise ValueError(f"the seed is {identity['seed']!r}")


def check_texts(values: dict, keys: tuple[str, ...]) -> None:
    """Raises KeyError, ValueError."""
    for key in keys:
        if not isinstance(values[key], str):
            raise ValueError(f"the {key} is {values[key]!r}, and no text")


def check_mappings(values: dict, keys: tuple[str, ...]) -> None:
    """Raises KeyError, ValueError."""
    for key in keys:
        if not isinstance(values[key], dict):
            raise ValueError(f"the {key} are {values[key]!r}, and no mapping")


def check_measured(measured: dict, is_validated: bool = True) -> None:
    """What every table takes for granted is there, and every metric is a number.

    `is_validated`: with metrics on validation, and a temperature. Raises KeyError, ValueError.
    """
    metrics_of_rows = [measured["test"]["raw"]]
    if is_validated:
        check_numbers(measured, ("temperature", "temperature_at_bound"))
        metrics_of_rows += [measured["val"], measured["test"]["scaled"]]
    for metrics in metrics_of_rows:
        check_numbers(metrics, ("top1", "ece", *metrics))


def check_numbers(values: dict, keys: tuple[str, ...]) -> None:
    """Raises KeyError, ValueError, OverflowError."""
    for key in keys:
        if not isinstance(values[key], int | float):
            raise ValueError(f"the {key} is {values[key]!r}, and no number")
        float(values[key])  # JSON has integers that are too large for it
