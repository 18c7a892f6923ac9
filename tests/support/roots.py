"""Made-up roots of a file system: another root shows another machine."""

from pathlib import Path


def plant(root: Path, **texts: str) -> Path:
    """Writes files below ``root``; a name's double underscores are slashes."""
    for name, text in texts.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root
