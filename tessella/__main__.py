"""`python -m tessella COMMAND …`, and `accelerate launch -m tessella COMMAND …`."""

from tessella.commands import main

if __name__ == "__main__":
    main()
