"""``python -m srpkd COMMAND`` is ``srpkd COMMAND``."""

from .cli import main

if __name__ == "__main__":
    main()
