"""`python -m tests.callbacks.soak`; each rank starts here."""

from tests.callbacks.soak.run import main

if __name__ == "__main__":
    raise SystemExit(main())
