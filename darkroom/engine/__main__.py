"""`python -m darkroom.engine`: the engine process."""

from .engine import main

if __name__ == "__main__":
    main()
