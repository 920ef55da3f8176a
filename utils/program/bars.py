"""Progress bars: with the time left, at a terminal alone, and gone when they have ended."""

from tqdm import tqdm


def progress_bar(items=None, title: str | None = None, shown: bool = True, **options) -> tqdm:
    """tqdm over `items`, with its `options`. Not `shown`: not even at a terminal."""
    # For tqdm, None means at a terminal alone, and True nowhere.
    return tqdm(items, title, leave=False, disable=None if shown else True, **options)
