"""`python -m pipeline` is the same as `pipeline`."""

from __future__ import annotations

from pipeline.process import set_up

set_up()  # before anything else is imported

from pipeline.cli import main  # noqa: E402  which loads torch, when a command asks for it

__all__ = ["main"]

if __name__ == "__main__":
    main()
