"""``python -m dynrank.train``, which is ``dynrank-train``."""

from dynrank.app.commands.start import dynrank_train as main

if __name__ == "__main__":
    main()
