"""``python -m srpkd COMMAND`` is ``srpkd COMMAND``."""

from .cli import main

main()
