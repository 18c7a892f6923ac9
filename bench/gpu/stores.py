"""The stores that the parts of a run share: random weights, in the form that new stores have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from random_store import write_random_store
from transformers import AutoConfig

from .session import Session
from .sizes import STORED

FORM: dict[str, Any] = {
    "scheme": STORED.form.scheme,
    "group_size": STORED.form.group_size,
    "two_level": STORED.two_level,
}


def random_store(session: Session, name: str, config: dict[str, Any]) -> Path:
    """The store of that name. The first part that asks writes it, beside what the run keeps until its end."""
    store = session.kept.parent / "stores" / name
    if not store.exists():
        store.parent.mkdir(exist_ok=True)
        write_random_store(AutoConfig.for_model(**config), store, session.device, **FORM)
    return store
