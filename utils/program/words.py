"""Words of messages."""


def counted(count: int, one: str, several: str | None = None) -> str:
    """`1 image`, `3 images`; with `several` any words: `1 image is`, `3 images are`."""
    if count == 1:
        return f"1 {one}"
    return f"{count} {several or one + 's'}"
