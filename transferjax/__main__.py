"""``python -m transferjax VERB ...``: the command line."""

from transferjax.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
