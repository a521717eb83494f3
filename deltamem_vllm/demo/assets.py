"""Where the shipped demo model and its adapters lie."""

from pathlib import Path
from typing import Final, Literal, get_args

DemoAdapter = Literal["tsw", "msw", "ssw"]
"""`tsw`: one 8x8 state per layer; `msw`: four of them; `ssw`: one, written once a message."""

DEMO_ADAPTERS: Final[tuple[DemoAdapter, ...]] = get_args(DemoAdapter)

_HERE = Path(__file__).parent


def model_dir() -> Path:
    """The backbone: an ordinary Hugging Face checkpoint with its tokenizer."""
    return _HERE / "model"


def adapter_dir(name: DemoAdapter = "msw") -> Path:
    """One of the adapters that were trained on the backbone."""
    return _HERE / "adapters" / name
