"""`python -m sqa_convert` is `sqa-convert`."""

from .cli.convert import main

if __name__ == "__main__":
    main()
